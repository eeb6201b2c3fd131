//! `tessera up`: a whole cluster under one supervisor.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::process::Process;
use crate::tree::ProcessId;
use crate::{binary, fixtures, grpc, http, ports, wait};

/// Where a router listens.
#[derive(Debug, Clone, Copy)]
pub struct Endpoints {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
}

impl Endpoints {
    /// Two free addresses.
    pub fn free() -> Self {
        Self { http: ports::free(), grpc: ports::free() }
    }

    pub fn http(&self) -> http::Client {
        http::Client::new(self.http)
    }

    pub fn grpc(&self) -> grpc::Client {
        grpc::Client::new(self.grpc)
    }

    /// Whether both faces say that a request would succeed.
    pub fn is_ready(&self) -> bool {
        let http_ready = self.http().try_get("/health").is_ok_and(|health| health.status == 200);
        http_ready && self.grpc().is_serving("")
    }
}

/// What to start.
#[derive(Debug, Clone)]
pub struct UpOptions {
    pub model: PathBuf,
    pub tp: u32,
    pub ranks_per_process: u32,
    pub encoders: u32,
    /// `etcd://…`; none: embedded.
    pub membership: Option<String>,
    /// F32 weights unless set: greedy tokens then equal the golden ones whatever the margin.
    pub device: &'static str,
    pub more: Vec<OsString>,
}

impl UpOptions {
    /// The committed checkpoint `name` at a tensor-parallel degree, one rank per process.
    pub fn new(name: &str, tp: u32) -> Self {
        Self {
            model: fixtures::model(name),
            tp,
            ranks_per_process: 1,
            encoders: 1,
            membership: None,
            device: "cpu-f32",
            more: Vec::new(),
        }
    }
}

/// A running `tessera up`.
#[derive(Debug)]
pub struct Cluster {
    pub endpoints: Endpoints,
    pub supervisor: Process,
    directory: TempDir,
}

impl Cluster {
    /// Starts a cluster and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    pub fn up(options: &UpOptions) -> Self {
        let mut cluster = Self::start(options);
        cluster.wait_ready();
        cluster
    }

    /// Starts a cluster.
    pub fn start(options: &UpOptions) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let endpoints = Endpoints::free();
        let mut command = Command::new(binary::tessera());
        // Temporary files of the program are then found in `temporary_files`.
        let temporary = directory.path().join("tmp");
        std::fs::create_dir(&temporary).expect("a directory");
        command.env("TMPDIR", &temporary);
        // The supervisor ends with this process, however that ends.
        command.args(["up", "--exit-with-stdin"]).arg("--model").arg(&options.model);
        command.args(["--device", options.device]);
        command.args(["--tp", &options.tp.to_string()]);
        command.args(["--ranks-per-process", &options.ranks_per_process.to_string()]);
        command.args(["--encoders", &options.encoders.to_string()]);
        command.args(["--http", &endpoints.http.to_string()]);
        command.args(["--grpc", &endpoints.grpc.to_string()]);
        if let Some(membership) = &options.membership {
            command.args(["--membership", membership]);
        }
        command.args(&options.more);
        let supervisor = Process::start("up", &mut command, directory.path());
        Self { endpoints, supervisor, directory }
    }

    /// Waits until a request would succeed.
    ///
    /// # Panics
    /// When the supervisor ends first, or the bound is reached.
    pub fn wait_ready(&mut self) {
        wait::until("the cluster is ready", || {
            if let Some(status) = self.supervisor.exited() {
                panic!("`tessera up` ended with {status}");
            }
            self.endpoints.is_ready()
        });
    }

    pub fn http(&self) -> http::Client {
        self.endpoints.http()
    }

    pub fn grpc(&self) -> grpc::Client {
        self.endpoints.grpc()
    }

    /// Running processes of a role.
    pub fn processes(&self, role: &str) -> Vec<ProcessId> {
        let is_role =
            |process: &ProcessId| process.arguments().get(1).is_some_and(|word| word == role);
        self.supervisor.descendants().into_iter().filter(is_role).collect()
    }

    /// The running decoder process of a slot; slot 0 leads.
    ///
    /// # Panics
    /// When there is none or there are several.
    pub fn decoder(&self, slot: u32) -> ProcessId {
        let mut processes = self.processes("decoder");
        processes.retain(|process| process.flag("--slot") == Some(slot.to_string()));
        assert_eq!(processes.len(), 1, "decoder processes of slot {slot}: {processes:?}");
        processes.remove(0)
    }

    /// Files that the supervisor and its children left in their temporary directory.
    pub fn temporary_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.directory.path().join("tmp")).expect("the directory");
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    }
}
