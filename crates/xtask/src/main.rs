//! House keeping of the workspace: `cargo xtask tidy` checks the rules that no compiler knows, `cargo xtask
//! ci` runs everything that must hold before a change is merged, `cargo xtask gpu` packs what a machine with a GPU runs.
//!
//! Modules: [`ci`] (the stages), [`cuda`] (those of the CUDA backend, without a GPU), [`gpu`] (the kit), [`tidy`] (the rules).

mod ci;
mod cuda;
mod gpu;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask <command>

  tidy   layers, purity, epochs, features and shape of the sources
  ci     rustfmt, clippy, tidy and all tests; stops at the first stage that fails
  cuda   the stages of ci that concern the CUDA backend, on an emulated GPU
  gpu    builds what tests/gpu/run.sh runs on a machine with a GPU, into target/gpu-kit";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let passed = match arguments[..] {
        ["tidy"] => tidy::run(&root()),
        ["ci"] => ci::run(&root()),
        ["cuda"] => cuda::run(&root()),
        ["gpu"] => gpu::run(&root()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The workspace's root, two levels above this package.
fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.ancestors().nth(2).expect("xtask lies in crates/ of the workspace").to_path_buf()
}

/// The cargo that runs this.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}
