//! Everything that must hold before a change is merged, in the order of rising cost.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::{cargo, cuda, tidy};

/// Commands and their arguments to cargo; `tidy` runs after the second.
const FORMAT: &[&str] = &["fmt", "--all", "--check"];
const CLIPPY: &[&str] =
    &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
/// The end-to-end tests start the program itself, which `cargo test` alone does not build.
const BUILD: &[&str] = &["build", "--workspace", "--locked"];
const TEST: &[&str] = &["test", "--workspace", "--locked"];
/// Interpreter with the clients' packages, made by `deploy/setup.sh test`.
const PYTHON: &str = ".venv/bin/python";
const CLIENTS: &[&str] = &["-m", "pytest", "-q", "tests/clients"];

/// Runs all stages, printing each with its time; whether all passed. Stops at the first that fails.
pub fn run(root: &Path) -> bool {
    let begin = Instant::now();
    let passed = stage("rustfmt", || command(root, FORMAT))
        && stage("clippy", || command(root, CLIPPY))
        && stage("tidy", || tidy::run(root))
        && stage("build", || command(root, BUILD))
        && stage("test", || command(root, TEST))
        && stage("clients", || program(root, &root.join(PYTHON), CLIENTS))
        && cuda::run(root);
    let verdict = if passed { "passed" } else { "failed" };
    println!("ci {verdict} after {:.1} s", begin.elapsed().as_secs_f64());
    passed
}

pub(crate) fn stage(name: &str, body: impl FnOnce() -> bool) -> bool {
    println!("== {name}");
    let begin = Instant::now();
    let passed = body();
    let verdict = if passed { "passed" } else { "FAILED" };
    println!("== {name} {verdict} in {:.1} s", begin.elapsed().as_secs_f64());
    passed
}

pub(crate) fn command(root: &Path, arguments: &[&str]) -> bool {
    program(root, cargo().as_ref(), arguments)
}

pub(crate) fn program(root: &Path, program: &Path, arguments: &[&str]) -> bool {
    run_to_end(Command::new(program).args(arguments).current_dir(root))
}

/// Whether a command succeeded.
pub(crate) fn run_to_end(command: &mut Command) -> bool {
    match command.status() {
        Ok(status) => status.success(),
        Err(error) => {
            let program = Path::new(command.get_program());
            let name = program.file_name().unwrap_or_default().display();
            eprintln!("{name}: {error}; `make test` installs what is missing");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_failed_stage_stops_what_follows() {
        let ran = RefCell::new(Vec::new());
        let run = |name: &'static str, passes| {
            stage(name, || {
                ran.borrow_mut().push(name);
                passes
            })
        };
        assert!(!(run("first", true) && run("second", false) && run("third", true)));
        assert_eq!(*ran.borrow(), ["first", "second"]);
    }

    #[test]
    fn a_command_that_fails_fails_its_stage() {
        assert!(!command(Path::new("."), &["no-such-command"]));
        assert!(command(Path::new("."), &["--version"]));
    }
}
