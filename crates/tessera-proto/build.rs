//! Generates the gRPC code of `proto/`. Needs `protoc` (Debian: protobuf-compiler).

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from("../../proto");
    let files = ["common", "inference", "encoder", "decoder"]
        .map(|name| root.join(format!("tessera/{name}/v1/{name}.proto")));
    println!("cargo:rerun-if-changed=../../proto");
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("tessera_descriptor.bin");
    tonic_prost_build::configure()
        .file_descriptor_set_path(descriptors)
        .bytes(".")
        .compile_protos(&files, &[root])?;
    Ok(())
}
