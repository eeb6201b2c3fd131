//! Single roles, as an operator starts them.

use std::ffi::OsStr;
use std::process::{Command, ExitStatus};

use tempfile::TempDir;

use crate::binary;
use crate::process::Process;

/// `tessera` with arguments.
pub fn command(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(binary::tessera());
    command.args(arguments);
    command
}

/// A role that was expected to refuse to start.
#[derive(Debug)]
pub struct Refusal {
    pub status: ExitStatus,
    /// All it printed.
    pub output: String,
}

/// Runs a role that should end by itself.
///
/// # Panics
/// When it does not end.
pub fn run_to_end(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Refusal {
    run_command_to_end(&mut command(arguments))
}

/// Runs a command that should end by itself.
///
/// # Panics
/// When it does not end.
pub fn run_command_to_end(command: &mut Command) -> Refusal {
    let directory = TempDir::new().expect("a directory");
    let mut process = Process::start("role", command, directory.path());
    let status = process.wait();
    Refusal { status, output: process.log() }
}
