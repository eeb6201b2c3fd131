//! One supervised child process: started, its output prefixed, restarted with back-off, stopped.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// First pause before a restart; doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// A child that ran this long starts again without a pause beyond the first.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// A child that exits with an error this many times in a row, each time soon after its start, has a
/// cause that restarting does not mend.
const HOPELESS_EXITS: u32 = 3;
/// Longest line of a child's output that is passed on whole.
const MAX_LINE_BYTES: usize = 16 << 10;

/// How to run one child.
#[derive(Debug, Clone)]
pub struct ChildSpec {
    /// Prefix of its output, for example `decoder g0/1`.
    pub name: String,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Time between SIGTERM and SIGKILL when it is stopped.
    pub stop_grace: Duration,
}

/// A child that is kept running until [`Supervised::stop`].
#[derive(Debug)]
pub struct Supervised {
    name: String,
    stop: watch::Sender<bool>,
    /// Exits with an error in a row, each soon after the start.
    early_exits: watch::Receiver<u32>,
    task: JoinHandle<()>,
}

impl Supervised {
    /// Starts the child and keeps it running.
    pub fn start(spec: ChildSpec) -> Self {
        let (stop, stopping) = watch::channel(false);
        let (exits, early_exits) = watch::channel(0);
        let name = spec.name.clone();
        let task = tokio::spawn(keep_running(spec, stopping, exits));
        Self { name, stop, early_exits, task }
    }

    /// Completes with the child's name when starting it again will not help: a bad setting, a broken
    /// checkpoint, a port in use. It is started again all the same.
    pub async fn hopeless(&self) -> String {
        let mut exits = self.early_exits.clone();
        if exits.wait_for(|&exits| exits >= HOPELESS_EXITS).await.is_err() {
            // The task has ended, so the child was stopped: it will not fail any more.
            std::future::pending::<()>().await;
        }
        self.name.clone()
    }

    /// SIGTERM, then SIGKILL after the grace; returns when the process is gone.
    pub async fn stop(self) {
        // The task may have ended already; then there is nobody to tell.
        let _ = self.stop.send(true);
        if let Err(error) = self.task.await {
            tracing::error!(child = self.name, %error, "supervision failed");
        }
    }
}

async fn keep_running(
    spec: ChildSpec,
    mut stopping: watch::Receiver<bool>,
    early_exits: watch::Sender<u32>,
) {
    let mut backoff = MIN_BACKOFF;
    while !*stopping.borrow() {
        let started = Instant::now();
        let failed = match spawn(&spec) {
            Ok(child) => match run_once(&spec, child, &mut stopping).await {
                Some(status) => {
                    tracing::warn!(child = spec.name, %status, "child exited, restarting");
                    // A signal says nothing about the next start, an exit code does.
                    status.code().is_some_and(|code| code != 0)
                }
                None => return,
            },
            Err(error) => {
                tracing::error!(child = spec.name, %error, "child does not start");
                true
            }
        };
        let stable = started.elapsed() >= STABLE_AFTER;
        early_exits.send_modify(|exits| *exits = if failed && !stable { *exits + 1 } else { 0 });
        if stable {
            backoff = MIN_BACKOFF;
        }
        tokio::select! {
            () = tokio::time::sleep(backoff) => backoff = (backoff * 2).min(MAX_BACKOFF),
            _ = stopping.wait_for(|stop| *stop) => return,
        }
    }
}

/// Children get a process group of their own, so that Ctrl-C in the terminal reaches the supervisor
/// alone and the stop order holds, and a pipe as standard input: when the supervisor is killed the
/// pipe closes and the child ends by itself.
fn spawn(spec: &ChildSpec) -> std::io::Result<Child> {
    Command::new(&spec.program)
        .args(&spec.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Runs until the child exits by itself (its status) or was stopped (`None`).
async fn run_once(
    spec: &ChildSpec,
    mut child: Child,
    stopping: &mut watch::Receiver<bool>,
) -> Option<ExitStatus> {
    tracing::debug!(child = spec.name, pid = child.id(), "child started");
    let output = [
        child.stdout.take().map(|pipe| tokio::spawn(forward(spec.name.clone(), pipe))),
        child.stderr.take().map(|pipe| tokio::spawn(forward(spec.name.clone(), pipe))),
    ];
    // Held until the child is gone: dropping it is the child's signal to end.
    let lifeline = child.stdin.take();
    let exited = tokio::select! {
        status = child.wait() => Some(status),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let status = match exited {
        Some(status) => status.ok(),
        None => {
            terminate(spec, &mut child).await;
            None
        }
    };
    drop(lifeline);
    for task in output.into_iter().flatten() {
        // The pipes close with the process; a grandchild that keeps one open is not waited for.
        let _ = tokio::time::timeout(Duration::from_secs(1), task).await;
    }
    status
}

async fn terminate(spec: &ChildSpec, child: &mut Child) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32))
        && let Err(error) = kill_process(pid, Signal::TERM)
    {
        tracing::debug!(child = spec.name, %error, "child is already gone");
    }
    if tokio::time::timeout(spec.stop_grace, child.wait()).await.is_err() {
        tracing::warn!(child = spec.name, "child did not stop in time, killing it");
        if let Err(error) = child.kill().await {
            tracing::error!(child = spec.name, %error, "child cannot be killed");
        }
    }
}

/// Copies lines to standard error behind the child's name. An over-long line is cut, not dropped.
async fn forward(name: String, pipe: impl AsyncRead + Unpin) {
    let mut reader = BufReader::with_capacity(MAX_LINE_BYTES, pipe);
    loop {
        let chunk = match reader.fill_buf().await {
            Ok(chunk) if !chunk.is_empty() => chunk,
            _ => return,
        };
        let end = chunk.iter().position(|&byte| byte == b'\n');
        let line = &chunk[..end.unwrap_or(chunk.len())];
        if end.is_some() || chunk.len() == MAX_LINE_BYTES {
            eprintln!("[{name}] {}", String::from_utf8_lossy(line));
            let used = end.map_or(chunk.len(), |end| end + 1);
            reader.consume(used);
            continue;
        }
        // A partial line: read on into a line of its own.
        let mut rest = line.to_vec();
        let used = chunk.len();
        reader.consume(used);
        match reader.read_until(b'\n', &mut rest).await {
            Ok(_) => {
                let text = String::from_utf8_lossy(&rest);
                eprintln!("[{name}] {}", text.trim_end_matches('\n'));
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, grace_ms: u64) -> ChildSpec {
        ChildSpec {
            name: "test".into(),
            program: "/bin/sh".into(),
            args: ["-c", script].iter().map(OsString::from).collect(),
            stop_grace: Duration::from_millis(grace_ms),
        }
    }

    #[tokio::test]
    async fn a_child_that_dies_is_started_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let marks = dir.path().join("marks");
        let child =
            Supervised::start(shell(&format!("echo x >> {}; exit 3", marks.display()), 100));
        let starts = || std::fs::read_to_string(&marks).map_or(0, |text| text.lines().count());
        for _ in 0..500 {
            if starts() >= 3 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(child.hopeless().await, "test");
        child.stop().await;
        let seen = starts();
        assert!(seen >= 3, "started {seen} times");
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(starts(), seen, "started again after stop");
    }

    #[tokio::test]
    async fn a_child_that_ignores_sigterm_is_killed() {
        let dir = tempfile::tempdir().expect("a directory");
        let pid_file = dir.path().join("pid");
        let script =
            format!("trap '' TERM; echo $$ > {}; while :; do sleep 0.05; done", pid_file.display());
        let child = Supervised::start(shell(&script, 50));
        let pid = loop {
            match std::fs::read_to_string(&pid_file) {
                Ok(text) if text.ends_with('\n') => break text.trim().to_owned(),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        child.stop().await;
        assert!(!std::path::Path::new("/proc").join(pid).exists(), "the process is still there");
    }

    #[tokio::test]
    async fn a_child_sees_the_end_of_its_lifeline() {
        let dir = tempfile::tempdir().expect("a directory");
        let done = dir.path().join("done");
        let spec = shell(&format!("cat > /dev/null; echo bye > {}", done.display()), 1000);
        let mut child = spawn(&spec).expect("a child");
        drop(child.stdin.take());
        child.wait().await.expect("an exit");
        assert!(done.exists());
    }
}
