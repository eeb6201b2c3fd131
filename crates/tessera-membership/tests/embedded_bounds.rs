//! Bounds of the embedded store as its clients meet them.

#![allow(clippy::unwrap_used)] // Test code: an unwrap is an assertion.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use etcd_client::proto::{PbDeleteRequest, PbPutRequest};
use tessera_membership::embedded::shared::SharedStore;
use tessera_membership::{
    Change, EmbeddedConfig, EmbeddedStore, MembershipUrl, PrefixWatch, Store, StoreConfig,
    StoreError, WatchEvent,
};
use tokio::net::TcpListener;

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn connect(server: &EmbeddedStore) -> Store {
    let MembershipUrl::Etcd(endpoints) = server.url() else {
        panic!("a served store has an address");
    };
    let mut config = StoreConfig::new(endpoints);
    config.watch.retry_min = Duration::from_millis(20);
    config.watch.retry_max = Duration::from_millis(100);
    Store::connect(config).await.unwrap()
}

fn put(key: &str, value: &str) -> PbPutRequest {
    PbPutRequest { key: key.into(), value: value.into(), ..PbPutRequest::default() }
}

/// The next event; one that never comes fails the test.
async fn next(watch: &mut PrefixWatch) -> WatchEvent {
    let event = tokio::time::timeout(Duration::from_secs(30), watch.next()).await;
    event.expect("the watch is silent").expect("the watch does not end")
}

async fn until_connected(watch: &mut PrefixWatch) {
    while !matches!(next(watch).await, WatchEvent::Connected { .. }) {}
}

#[tokio::test]
async fn what_does_not_fit_is_resource_exhausted() {
    let config = EmbeddedConfig { max_keys: 1, max_leases: 1, ..EmbeddedConfig::default() };
    let server = EmbeddedStore::bind(ANY_PORT, config).await.unwrap();
    let store = connect(&server).await;
    store.put("a", "", None).await.unwrap();
    let exhausted = |error: StoreError| matches!(error, StoreError::Refused { code, .. } if code == "ResourceExhausted");
    assert!(exhausted(store.put("b", "", None).await.unwrap_err()));
    store.lease_grant(Duration::from_secs(9)).await.unwrap();
    assert!(exhausted(store.lease_grant(Duration::from_secs(9)).await.unwrap_err()));
    server.shutdown().await;
}

#[tokio::test]
async fn one_watch_too_many_is_told_and_gets_its_turn_later() {
    let config = EmbeddedConfig { max_watchers: 1, ..EmbeddedConfig::default() };
    let server = EmbeddedStore::bind(ANY_PORT, config).await.unwrap();
    let store = connect(&server).await;
    let mut first = store.watch_prefix("a/");
    until_connected(&mut first).await;
    let mut second = store.watch_prefix("b/");
    assert!(matches!(next(&mut second).await, WatchEvent::Snapshot { .. }));
    let WatchEvent::Disconnected { error, .. } = next(&mut second).await else {
        panic!("there is no room for it");
    };
    assert!(matches!(error, StoreError::Refused { code, .. } if code == "ResourceExhausted"));
    drop(first);
    until_connected(&mut second).await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_watch_that_falls_behind_the_history_is_resynced() {
    let config = EmbeddedConfig { max_history_events: 4, ..EmbeddedConfig::default() };
    let server = EmbeddedStore::bind(ANY_PORT, config).await.unwrap();
    let addr = server.local_addr();
    let shared = server.store().clone();
    let writer = connect(&server).await;
    writer.put("w/gone", "", None).await.unwrap();
    let mut watch = writer.watch_prefix("w/");
    until_connected(&mut watch).await;

    // While nobody serves it, the store goes on further than its history reaches.
    server.shutdown().await;
    shared.with(|store, _| {
        let gone = PbDeleteRequest { key: "w/gone".into(), ..PbDeleteRequest::default() };
        store.delete_range(gone).unwrap();
        for i in 0..20 {
            store.put(put(&format!("w/{}", i % 2), &i.to_string())).unwrap();
        }
    });
    let listener = TcpListener::bind(addr).await.unwrap();
    let server = EmbeddedStore::serve(listener, shared).unwrap();
    let changes = loop {
        match next(&mut watch).await {
            WatchEvent::Resync { changes, .. } => break changes,
            WatchEvent::Connected { .. } | WatchEvent::Disconnected { .. } => {}
            event => panic!("history is gone, and yet {event:?}"),
        }
    };
    let keys: Vec<&str> = changes.iter().map(Change::key).collect();
    assert_eq!(keys, ["w/gone", "w/0", "w/1"]);
    assert!(matches!(&changes[0], Change::Delete { .. }));
    assert!(matches!(&changes[2], Change::Put(entry) if entry.value == b"19"));
    drop(watch);
    server.shutdown().await;
}

#[tokio::test]
async fn another_store_in_the_same_place_replaces_the_whole_view() {
    let server = EmbeddedStore::bind(ANY_PORT, EmbeddedConfig::default()).await.unwrap();
    let addr = server.local_addr();
    let store = connect(&server).await;
    store.put("w/old", "", None).await.unwrap();
    store.put("w/same", "old", None).await.unwrap();
    let mut watch = store.watch_prefix("w/");
    until_connected(&mut watch).await;

    server.shutdown().await;
    let other = SharedStore::new(EmbeddedConfig::default());
    // Its revisions run past those of the old one, so that only its identity tells them apart.
    other.with(|store, _| {
        for _ in 0..10 {
            store.put(put("w/same", "new")).unwrap();
        }
    });
    let listener = TcpListener::bind(addr).await.unwrap();
    let server = EmbeddedStore::serve(listener, other).unwrap();
    let mut told = Vec::new();
    while told.is_empty() {
        if let WatchEvent::Resync { changes, .. } = next(&mut watch).await {
            told = changes;
        }
    }
    assert!(matches!(&told[0], Change::Delete { key } if key == "w/old"));
    assert!(matches!(&told[1], Change::Put(entry) if entry.value == b"new"));
    drop(watch);
    server.shutdown().await;
}
