//! `cargo xtask gpu`: the program and the test binaries of the CUDA backend in one folder, to be copied with the sources to a
//! machine that has a GPU but no Rust, where `tests/gpu/run.sh` runs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::cargo;

/// Where the kit is put.
const KIT: &str = "target/gpu-kit";

/// A test binary: name in the kit, package, and what cargo calls it.
const TESTS: [(&str, &str, &str); 4] = [
    ("ops", "tessera-kernels", "ops"),
    ("golden", "tessera-model", "cuda"),
    ("same-bits", "tessera-model", "same_bits"),
    ("gpu", "tessera-tests", "gpu"),
];

/// Builds the kit; whether that worked.
pub fn run(root: &Path) -> bool {
    match pack(root) {
        Ok(bytes) => {
            println!(
                "{KIT} is complete ({} MB): copy it with the sources, then run tests/gpu/run.sh there",
                bytes >> 20
            );
            true
        }
        Err(error) => {
            eprintln!("gpu: {error}");
            false
        }
    }
}

fn pack(root: &Path) -> Result<u64, String> {
    let toolkit = Command::new("deploy/cuda-toolkit.sh").current_dir(root).status();
    if !toolkit.is_ok_and(|status| status.success()) {
        return Err("the CUDA toolkit could not be set up".into());
    }
    let kit = root.join(KIT);
    fs::create_dir_all(kit.join("deps")).map_err(|error| format!("{KIT}: {error}"))?;
    // Fixtures are found by this path.
    write(&kit.join("compiled-in"), &root.display().to_string())?;

    let program = build(root, &["build", "--package", "tessera", "--features", "cuda"], "tessera")?;
    let mut bytes = install(&program, &kit.join("tessera"))?;
    for (name, package, target) in TESTS {
        let arguments =
            ["test", "--no-run", "--package", package, "--features", "cuda", "--test", target];
        let binary = build(root, &arguments, target)?;
        bytes += install(&binary, &kit.join("deps").join(name))?;
    }
    Ok(bytes)
}

/// Runs cargo and finds the executable of `target` among what it says it made.
fn build(root: &Path, arguments: &[&str], target: &str) -> Result<PathBuf, String> {
    let output = Command::new(cargo())
        .args(arguments)
        .args(["--locked", "--message-format", "json-render-diagnostics"])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo {} failed", arguments.join(" ")));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    executable(&messages, target).ok_or_else(|| format!("cargo made no executable {target}"))
}

fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    messages.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let path = message["executable"].as_str()?;
        (message["target"]["name"] == target).then(|| PathBuf::from(path))
    })
}

/// Copies an executable without its debug information; its size in bytes.
fn install(from: &Path, to: &Path) -> Result<u64, String> {
    let stripped = Command::new("strip").arg("-o").args([to, from]).status();
    if !stripped.is_ok_and(|status| status.success()) {
        fs::copy(from, to).map_err(|error| format!("{}: {error}", to.display()))?;
    }
    let metadata = fs::metadata(to).map_err(|error| format!("{}: {error}", to.display()))?;
    Ok(metadata.len())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_that_of_the_target() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"ops"},"executable":"/t/ops-1"}
{"reason":"compiler-artifact","target":{"name":"half"},"executable":null}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "ops"), Some(PathBuf::from("/t/ops-1")));
        assert_eq!(executable(messages, "half"), None);
    }
}
