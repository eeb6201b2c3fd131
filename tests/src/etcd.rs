//! A real etcd with one member, from Debian's package `etcd-server`.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::Process;
use crate::{http, ports, wait};

/// A running etcd. Its data survive [`Etcd::restart`] and end with the handle.
#[derive(Debug)]
pub struct Etcd {
    client: SocketAddr,
    peer: SocketAddr,
    // Dropped, and so killed, before its directory.
    process: Process,
    directory: TempDir,
}

impl Etcd {
    /// Starts etcd and waits until it answers.
    ///
    /// # Panics
    /// When it is not installed or does not answer.
    pub fn start() -> Self {
        let version = Command::new("etcd").arg("--version").output();
        if let Err(error) = version {
            match error.kind() {
                io::ErrorKind::NotFound => {
                    panic!(
                        "etcd is missing: install Debian's etcd-server, or run deploy/setup.sh test"
                    )
                }
                _ => panic!("etcd cannot be started: {error}"),
            }
        }
        let directory = tempfile::tempdir().expect("a directory");
        let (client, peer) = (ports::free(), ports::free());
        let process = spawn(client, peer, directory.path());
        let etcd = Self { client, peer, process, directory };
        etcd.wait_ready();
        etcd
    }

    /// As `--membership` takes it.
    pub fn membership(&self) -> String {
        format!("etcd://{}", self.client)
    }

    /// Stops it without ending it: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    /// Lets a frozen etcd go on.
    pub fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    /// Kills it; connections break.
    pub fn kill(&mut self) {
        self.process.signal(Signal::KILL);
        self.process.wait();
    }

    /// Starts it again with the data it had.
    pub fn restart(&mut self) {
        self.process = spawn(self.client, self.peer, self.directory.path());
        self.wait_ready();
    }

    fn wait_ready(&self) {
        let client = http::Client::new(self.client);
        let healthy = || client.try_get("/health").is_ok_and(|health| health.status == 200);
        wait::until("etcd is healthy", healthy);
    }
}

fn spawn(client: SocketAddr, peer: SocketAddr, directory: &Path) -> Process {
    let client = format!("http://{client}");
    let peer = format!("http://{peer}");
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(directory.join("data"));
    command.args(["--log-level", "error"]);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("default={peer}")]);
    Process::start("etcd", &mut command, directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_outlive_a_kill() {
        let mut etcd = Etcd::start();
        let client = http::Client::new(etcd.client);
        // Key and value in base64, as etcd's JSON gateway takes them.
        let put = serde_json::json!({"key": "YQ==", "value": "Yg=="});
        assert_eq!(client.post_json("/v3/kv/put", &put).status, 200);
        etcd.kill();
        assert!(client.try_get("/health").is_err());
        etcd.restart();
        let range = client.post_json("/v3/kv/range", &serde_json::json!({"key": "YQ=="})).ok();
        assert_eq!(range["kvs"][0]["value"], "Yg==");
    }
}
