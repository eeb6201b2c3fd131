//! However `tessera up` ends, no process, port or file is left behind.

use rustix::process::Signal;
use tessera_tests::chat::text_body;
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::process::Process;
use tessera_tests::tree::{self, ProcessId};

/// Everything of a running cluster that must go.
struct Footprint {
    processes: Vec<ProcessId>,
    ports: Vec<u16>,
}

impl Footprint {
    fn of(supervisor: &Process) -> Self {
        let mut processes = supervisor.descendants();
        processes.push(supervisor.id().clone());
        let ports = tree::listening_ports(&processes);
        Self { processes, ports }
    }

    fn assert_gone(&self) {
        tree::assert_gone(&self.processes);
        tree::assert_free(&self.ports);
    }
}

/// Starts a cluster with a request running, and takes its footprint.
fn busy_cluster(tp: u32) -> (Cluster, Footprint, tessera_tests::sse::Events) {
    let cluster = Cluster::up(&UpOptions::new("tiny", tp));
    let mut events = cluster.http().chat_stream(&text_body("Hello", 4000));
    assert_eq!(events.by_ref().take(3).count(), 3);
    let footprint = Footprint::of(&cluster.supervisor);
    // Supervisor, router, encoder and one process per rank.
    assert_eq!(footprint.processes.len(), 3 + tp as usize, "{:?}", footprint.processes);
    // The router's two faces, the embedded store, and one port of every worker, at least.
    assert!(footprint.ports.len() >= 4 + tp as usize, "{:?}", footprint.ports);
    (cluster, footprint, events)
}

#[test]
fn ctrl_c_leaves_nothing() {
    let (mut cluster, footprint, events) = busy_cluster(2);
    drop(events);
    cluster.supervisor.signal(Signal::INT);
    assert!(cluster.supervisor.wait().success());
    footprint.assert_gone();
    assert!(cluster.temporary_files().is_empty(), "{:?}", cluster.temporary_files());
}

#[test]
fn sigterm_leaves_nothing_while_a_request_runs() {
    let (mut cluster, footprint, _events) = busy_cluster(1);
    cluster.supervisor.signal(Signal::TERM);
    assert!(cluster.supervisor.wait().success());
    footprint.assert_gone();
}

/// A killed supervisor cannot stop its children: they see their lifeline close.
#[test]
fn a_killed_supervisor_leaves_nothing() {
    let (mut cluster, footprint, _events) = busy_cluster(2);
    cluster.supervisor.signal(Signal::KILL);
    assert!(!cluster.supervisor.wait().success());
    footprint.assert_gone();
}
