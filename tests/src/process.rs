//! A child process with its output in a file. Dropping it kills it with all its descendants, and prints
//! the end of its output when the test failed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::Signal;

use crate::tree::{self, ProcessId};
use crate::wait;

/// Lines of a log that a failed test prints.
const LOG_TAIL_LINES: usize = 120;

/// A running program.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    id: ProcessId,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; its output goes to `<directory>/<name>.log`. Standard input is a pipe that
    /// closes with this process.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn start(name: &str, command: &mut Command, directory: &Path) -> Self {
        let log = directory.join(format!("{name}.log"));
        let out = File::create(&log).expect("the log can be created");
        let err = out.try_clone().expect("the log can be shared");
        let child =
            command.stdin(Stdio::piped()).stdout(out).stderr(err).spawn().unwrap_or_else(|error| {
                panic!("{:?} cannot be started: {error}", command.get_program())
            });
        let id = ProcessId::of(child.id()).expect("an unreaped child is in /proc");
        Self { name: name.to_owned(), child, id, log }
    }

    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Everything it printed so far.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into())
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        self.id.signal(signal);
    }

    /// Its status if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let what = format!("{} ends", self.name);
        wait::for_value(&what, || self.exited())
    }

    /// Running processes that it started, directly or not.
    pub fn descendants(&self) -> Vec<ProcessId> {
        tree::descendants(self.id.pid)
    }

    /// Prints the end of its output, for a test that failed.
    pub fn print_log(&self) {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        eprintln!("---- end of the output of {} ({} lines in all)", self.name, lines.len());
        eprintln!("{}\n----", tail.join("\n"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let descendants = self.descendants();
        self.id.signal(Signal::KILL);
        for process in descendants {
            process.signal(Signal::KILL);
        }
        // A killed child always ends; there is nothing to do about an error here.
        let _ = self.child.wait();
        if std::thread::panicking() {
            self.print_log();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_and_nothing_outlives_the_handle() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "echo out; echo err >&2; sleep 600 & sleep 601"]);
        let process = Process::start("shell", &mut shell, directory.path());
        wait::until("both children start", || process.descendants().len() == 2);
        wait::until("both lines", || process.log() == "out\nerr\n");
        let all = process.descendants();
        drop(process);
        tree::assert_gone(&all);
    }
}
