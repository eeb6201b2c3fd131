//! A process that is stopped, not dead: its sockets stay open and nothing answers.

use rustix::process::Signal;
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::Golden;
use tessera_tests::wait;

use crate::observed::{assert_cut_off_cleanly, assert_serves, start_grpc};

/// Freezes the process of a slot while a stream runs; thaws it once the stream ended.
fn freeze(slot: u32) {
    let cluster = Cluster::up(&UpOptions::new("tiny", 2));
    let epoch = cluster.grpc().group().epoch;
    let golden = Golden::load("tiny", "text");
    let reader = start_grpc(&cluster.endpoints, &golden);
    let victim = cluster.decoder(slot);
    victim.signal(Signal::STOP);
    let observed = reader.finish();
    assert!(!cluster.endpoints.is_ready(), "frozen is not ready");
    victim.signal(Signal::CONT);
    wait::until("the next epoch serves", || {
        let groups = cluster.grpc().cluster().map(|cluster| cluster.groups);
        let formed = groups.is_ok_and(|groups| groups.first().is_some_and(|g| g.epoch > epoch));
        formed && cluster.endpoints.is_ready()
    });
    assert_cut_off_cleanly(&cluster.endpoints, &golden, &observed);
    assert_serves(&cluster.endpoints, "multi_turn");
}

#[test]
fn a_frozen_follower_ends_the_epoch() {
    freeze(1);
}

#[test]
fn a_frozen_leader_ends_the_epoch() {
    freeze(0);
}
