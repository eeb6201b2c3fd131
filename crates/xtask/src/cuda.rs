//! What can be said of the CUDA backend without a GPU: it is compiled by the pinned compiler, and its kernels run on an
//! emulated GPU (tests/cuda-emulator), which the program finds as it would find a driver.

use std::path::Path;
use std::process::Command;

use crate::cargo;
use crate::ci::{command, program, run_to_end, stage};

/// Where the emulator's libraries are built.
const EMULATOR: &str = "target/cuda-emulator";
const LINT: &[&str] = &[
    "clippy",
    "--locked",
    "-p",
    "tessera-kernels",
    "--features",
    "cuda",
    "--all-targets",
    "--",
    "-D",
    "warnings",
];
const KERNELS: &[&str] =
    &["test", "--locked", "-p", "tessera-kernels", "--features", "cuda", "--", "cuda"];
/// The vision tower of every fixture, and one model in f32 and BF16; a GPU runs all (tests/gpu/run.sh).
const MODEL: &[&str] = &[
    "test",
    "--locked",
    "-p",
    "tessera-model",
    "--features",
    "cuda",
    "--test",
    "cuda",
    "--",
    "yarn",
    "visual",
];
const BUILD: &[&str] = &["build", "--locked", "-p", "tessera", "--features", "cuda"];
const PROGRAM: &[&str] =
    &["test", "--locked", "-p", "tessera-tests", "--features", "cuda", "--test", "cuda"];

/// Whole clusters: two ranks on one GPU, and one rank with captured steps.
const CLUSTER: &[&str] = &[
    "test",
    "--locked",
    "-p",
    "tessera-tests",
    "--features",
    "cuda",
    "--test",
    "gpu",
    "--",
    "two_ranks",
    "choices",
];

/// Runs all stages; whether all passed. Stops at the first that fails.
pub fn run(root: &Path) -> bool {
    stage("cuda toolkit", || program(root, Path::new("deploy/cuda-toolkit.sh"), &[]))
        && stage("cuda emulator", || {
            program(root, Path::new("make"), &["-s", "-j2", "-C", "tests/cuda-emulator", "test"])
        })
        && stage("cuda clippy", || command(root, LINT))
        && stage("cuda kernels", || on_emulator(root, KERNELS))
        && stage("cuda model", || on_emulator(root, MODEL))
        && stage("cuda program", || {
            command(root, BUILD) && command(root, PROGRAM) && on_emulator(root, CLUSTER)
        })
}

/// Runs cargo where the emulated driver is found first.
fn on_emulator(root: &Path, arguments: &[&str]) -> bool {
    let libraries = root.join(EMULATOR);
    run_to_end(
        Command::new(cargo()).args(arguments).env("LD_LIBRARY_PATH", libraries).current_dir(root),
    )
}
