//! Promise 4: with etcd down, serving goes on with the last known view.

use std::time::{Duration, Instant};

use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::etcd::Etcd;
use tessera_tests::wait;

use crate::observed::assert_serves;

/// Long enough that keepalives are missed, several times over.
const OUTAGE: Duration = Duration::from_secs(5);

/// Sends requests for the whole outage; each must succeed.
fn serve_through_outage(cluster: &Cluster) {
    let started = Instant::now();
    while started.elapsed() < OUTAGE {
        for case in ["text", "image_odd"] {
            assert_serves(&cluster.endpoints, case);
        }
    }
    assert!(cluster.endpoints.is_ready(), "health tells the truth: requests succeed");
}

#[test]
fn requests_succeed_while_etcd_is_frozen_and_while_it_is_gone() {
    let mut etcd = Etcd::start();
    let options = UpOptions { membership: Some(etcd.membership()), ..UpOptions::new("tiny", 2) };
    let cluster = Cluster::up(&options);
    let epoch = cluster.grpc().group().epoch;
    let processes = cluster.supervisor.descendants();

    etcd.freeze();
    serve_through_outage(&cluster);
    etcd.thaw();
    assert_serves(&cluster.endpoints, "multi_turn");

    etcd.kill();
    serve_through_outage(&cluster);
    etcd.restart();
    assert_serves(&cluster.endpoints, "multi_turn");

    wait::until("the view is fresh again", || {
        cluster.grpc().cluster().is_ok_and(|cluster| cluster.view_age_ms == 0)
    });
    assert_eq!(cluster.grpc().group().epoch, epoch, "absence from etcd never ends an epoch");
    assert_eq!(cluster.supervisor.descendants(), processes, "no process was restarted");
}
