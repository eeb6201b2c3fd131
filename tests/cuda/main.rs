//! What the program says about GPUs that cannot be used: one message each. The machine is an emulated one, made by
//! `make -C tests/cuda-emulator`, which can be told what to lack.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tessera_tests::roles::{self, Refusal};
use tessera_tests::{fixtures, ports};

/// Exit code for what is not the caller's fault.
const FAILED: i32 = 1;

/// Folder with the emulated libraries.
fn emulator() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(folder.join("libcuda.so.1").exists(), "run `make -C tests/cuda-emulator` first");
    folder
}

/// Runs the program with libraries of `folder`, on an emulated machine with `settings`.
fn run(folder: &Path, settings: &[(&str, &str)], arguments: &[&str]) -> Refusal {
    let mut command = roles::command(arguments);
    command.env("LD_LIBRARY_PATH", folder);
    for (name, value) in settings {
        command.env(format!("CUDA_EMULATOR_{name}"), value);
    }
    roles::run_command_to_end(&mut command)
}

/// A worker on a GPU.
fn worker(role: &str, folder: &Path, settings: &[(&str, &str)], device: &str) -> Refusal {
    let membership = format!("etcd://{}", ports::free());
    let state = TempDir::new().expect("a directory");
    let model = fixtures::model("tiny");
    let mut arguments = vec![role, "--model", model.to_str().expect("UTF-8"), "--device", device];
    arguments.extend(["--membership", &membership]);
    if role == "decoder" {
        arguments.extend(["--state-dir", state.path().to_str().expect("UTF-8")]);
    }
    run(folder, settings, &arguments)
}

/// The last line names what is missing, once, and nothing panicked.
#[track_caller]
fn assert_refused(refusal: &Refusal, message: &str) {
    assert_eq!(refusal.status.code(), Some(FAILED), "{refusal:?}");
    let last = refusal.output.lines().last().unwrap_or_default();
    assert!(last.starts_with("tessera: ") && last.contains(message), "{}", refusal.output);
    assert!(!refusal.output.contains("panicked"), "{}", refusal.output);
}

#[test]
fn libraries_and_gpus_are_listed() {
    let found = run(&emulator(), &[("DEVICES", "2")], &["gpus"]);
    assert!(found.status.success(), "{}", found.output);
    for words in ["NVIDIA driver 13.0", "libcuda.so", "cuBLASLt 13.", "GPU 0: ", "GPU 1: "] {
        assert!(found.output.contains(words), "no {words:?}: {}", found.output);
    }
    assert!(!found.output.contains("missing"), "{}", found.output);
}

/// Kernels and their registers, of a Markdown table.
fn registers(table: &str) -> BTreeMap<String, u32> {
    let cells = table.lines().map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let rows =
        cells.filter_map(|cells| Some((cells.get(2)?.to_string(), cells.get(3)?.parse().ok()?)));
    rows.collect()
}

#[test]
fn the_documented_kernels_are_those_of_the_program() {
    let nothing = TempDir::new().expect("a directory");
    let listed = run(nothing.path(), &[], &["gpus", "--kernels"]);
    assert!(listed.status.success(), "{}", listed.output);
    let kernels = registers(&listed.output);
    assert!(kernels.values().all(|registers| (1..=255).contains(registers)), "{}", listed.output);

    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks/cuda-kernels.md");
    let documented = registers(&fs::read_to_string(file).expect("the document is there"));
    let names = |kernels: &BTreeMap<String, u32>| kernels.keys().cloned().collect::<BTreeSet<_>>();
    assert!(kernels.len() > 10);
    let differing = &names(&documented) ^ &names(&kernels);
    assert!(differing.is_empty(), "run `make cuda-kernels` for {differing:?}");
}

#[test]
fn a_machine_without_a_driver_is_told_so_and_computes_on_the_cpu() {
    let nothing = TempDir::new().expect("a directory");
    let found = run(nothing.path(), &[], &["gpus"]);
    if found.output.contains("found    NVIDIA driver") {
        eprintln!("skipped: this machine has a driver, which cannot be hidden");
        return;
    }
    assert_refused(&found, "no GPU of this machine can be used");
    assert!(found.output.contains("no NVIDIA driver"), "{}", found.output);
    for role in ["decoder", "encoder"] {
        assert_refused(
            &worker(role, nothing.path(), &[], "cuda"),
            "no NVIDIA driver: libcuda.so.1",
        );
    }
    let measured =
        ["bench", "kernels", "--device", "cpu", "--only", "norm", "--rows", "1", "--repeats", "1"];
    let measured = run(nothing.path(), &[], &measured);
    assert!(measured.status.success(), "{}", measured.output);
}

#[test]
fn an_old_driver_is_named_with_the_version_that_is_needed() {
    for role in ["decoder", "encoder"] {
        let refusal = worker(role, &emulator(), &[("DRIVER", "12040")], "cuda");
        assert_refused(&refusal, "the NVIDIA driver offers CUDA 12.4; 13.0 is needed");
    }
}

#[test]
fn an_old_library_is_named_with_the_version_that_is_needed() {
    let refusal = worker("decoder", &emulator(), &[("CUBLASLT", "120803")], "cuda");
    assert_refused(&refusal, "cuBLASLt 12.8 is too old: 13.0 is needed");
}

#[test]
fn an_old_gpu_is_named_with_its_capability() {
    let refusal = worker("decoder", &emulator(), &[("CAPABILITY", "75")], "cuda");
    assert_refused(&refusal, "has compute capability 7.5; 8.0 is the lowest that works");
}

#[test]
fn a_gpu_that_is_not_there_is_named_with_their_number() {
    let refusal = worker("decoder", &emulator(), &[("DEVICES", "1")], "cuda:3");
    assert_refused(&refusal, "there is no GPU 3: the driver lists 1");
    let refusal = worker("encoder", &emulator(), &[("DEVICES", "0")], "cuda");
    assert_refused(&refusal, "the NVIDIA driver is there but finds no GPU");
}

#[test]
fn a_gpu_that_is_too_small_is_named_with_what_is_free() {
    // The model alone would fit, a workspace beside it does not.
    let refusal = worker("decoder", &emulator(), &[("MEMORY_BYTES", "20000000")], "cuda");
    assert_refused(&refusal, "GPU 0 has no memory for");
    assert_refused(&refusal, "of 20000000 are free");
}

#[test]
fn a_missing_library_is_named_with_its_file() {
    let folder = TempDir::new().expect("a directory");
    let driver = emulator().join("libcuda.so.1").canonicalize().expect("it was built");
    symlink(driver, folder.path().join("libcuda.so.1")).expect("linked");
    let refusal = worker("encoder", folder.path(), &[], "cuda");
    if refusal.output.contains("found    cuBLASLt") {
        eprintln!("skipped: this machine has cuBLASLt, which cannot be hidden");
        return;
    }
    assert_refused(&refusal, "cuBLASLt was not found");
    assert_refused(&refusal, "libcublasLt.so.13");
}

#[test]
fn a_list_of_gpus_fits_the_ranks() {
    let refusal = worker("decoder", &emulator(), &[], "cuda:0,1");
    assert_refused(&refusal, "decoder.device");
    let refusal = worker("encoder", &emulator(), &[], "cuda:0,1");
    assert_refused(&refusal, "encoder.device");
}
