//! Watches that do not end.

use std::collections::BTreeMap;
use std::time::Duration;

use tessera_membership::{Change, Op, PrefixWatch, Store, StoreEndpoint, Txn, WatchEvent};

use crate::backend::{Backend, config_for, store_at};
use crate::proxy::Proxy;

/// The next event with data, skipping word of the connection.
async fn next_data(watch: &mut PrefixWatch) -> WatchEvent {
    loop {
        match watch.next().await.expect("the watch does not end") {
            WatchEvent::Connected { .. } | WatchEvent::Disconnected { .. } => {}
            event => return event,
        }
    }
}

async fn connected(watch: &mut PrefixWatch) -> i64 {
    loop {
        match watch.next().await.expect("the watch does not end") {
            WatchEvent::Connected { revision } => return revision,
            WatchEvent::Disconnected { .. } | WatchEvent::Snapshot { .. } => {}
            event => panic!("unexpected {event:?}"),
        }
    }
}

async fn disconnected(watch: &mut PrefixWatch) {
    match watch.next().await.expect("the watch does not end") {
        WatchEvent::Disconnected { .. } => {}
        event => panic!("unexpected {event:?}"),
    }
}

async fn changes(watch: &mut PrefixWatch) -> (i64, Vec<String>) {
    match next_data(watch).await {
        WatchEvent::Changes { revision, changes } => (revision, describe(&changes)),
        event => panic!("unexpected {event:?}"),
    }
}

/// `+key=value` for a put, `-key` for a delete.
fn describe(changes: &[Change]) -> Vec<String> {
    let describe = |change: &Change| match change {
        Change::Put(entry) => {
            format!("+{}={}", entry.key, String::from_utf8_lossy(&entry.value))
        }
        Change::Delete { key } => format!("-{key}"),
    };
    changes.iter().map(describe).collect()
}

pub async fn changes_arrive_in_order_with_whole_transactions(backend: Backend) {
    let store = backend.store().await;
    store.put("w/old", "o", None).await.unwrap();
    let start = store.put("elsewhere", "", None).await.unwrap();
    let mut watch = store.watch_prefix("w/");
    let WatchEvent::Snapshot { revision, entries } = next_data(&mut watch).await else {
        panic!("a watch begins with a snapshot");
    };
    assert_eq!(revision, start);
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].value, b"o");
    assert_eq!(connected(&mut watch).await, start);

    let put = store.put("w/a", "1", None).await.unwrap();
    store.put("elsewhere", "", None).await.unwrap();
    let txn = Txn::when([]).then([
        Op::put("w/b", "2"),
        Op::put("elsewhere", "2"),
        Op::delete("w/old"),
        Op::put("w/a", "3"),
    ]);
    let txn = store.txn(txn).await.unwrap().revision;
    store.delete("w/a").await.unwrap();

    assert_eq!(changes(&mut watch).await, (put, vec!["+w/a=1".to_owned()]));
    let (revision, mut whole) = changes(&mut watch).await;
    whole.sort();
    assert_eq!(revision, txn);
    assert_eq!(whole, ["+w/a=3", "+w/b=2", "-w/old"], "one event per transaction");
    assert_eq!(changes(&mut watch).await, (txn + 1, vec!["-w/a".to_owned()]));
}

pub async fn a_watch_that_was_cut_off_misses_and_repeats_nothing(backend: Backend) {
    let store = backend.store().await;
    let proxy = Proxy::to(backend.addr()).await;
    let mut watch = store_at(proxy.addr).await.watch_prefix("w/");
    connected(&mut watch).await;
    let seen = store.put("w/seen", "1", None).await.unwrap();
    assert_eq!(changes(&mut watch).await.0, seen);

    proxy.cut();
    disconnected(&mut watch).await;
    let first = store.put("w/a", "1", None).await.unwrap();
    store.put("w/a", "2", None).await.unwrap();
    store.delete("w/seen").await.unwrap();
    proxy.heal();

    assert_eq!(connected(&mut watch).await, seen, "it comes back where it stopped");
    let expected = ["+w/a=1", "+w/a=2", "-w/seen"];
    for (i, change) in expected.into_iter().enumerate() {
        let told = changes(&mut watch).await;
        assert_eq!(told, (first + i as i64, vec![change.to_owned()]));
    }
}

pub async fn after_a_compaction_the_view_is_resynced_with_deletes(backend: Backend) {
    let store = backend.store().await;
    for key in ["w/changed", "w/deleted", "w/kept"] {
        store.put(key, "old", None).await.unwrap();
    }
    let proxy = Proxy::to(backend.addr()).await;
    let mut watch = store_at(proxy.addr).await.watch_prefix("w/");
    connected(&mut watch).await;

    proxy.cut();
    disconnected(&mut watch).await;
    store.delete("w/deleted").await.unwrap();
    store.put("w/changed", "new", None).await.unwrap();
    store.put("w/born", "new", None).await.unwrap();
    let last = store.put("elsewhere", "", None).await.unwrap();
    store.compact(last).await.unwrap();
    proxy.heal();

    let WatchEvent::Resync { revision, changes } = next_data(&mut watch).await else {
        panic!("history is gone, so that only a resync can help");
    };
    assert_eq!(revision, last);
    let expected = ["-w/deleted", "+w/born=new", "+w/changed=new"];
    assert_eq!(describe(&changes), expected);
    // And it goes on from there.
    let next = store.put("w/next", "", None).await.unwrap();
    assert_eq!(self::changes(&mut watch).await.0, next);
}

pub async fn a_silent_connection_is_noticed_and_replaced(backend: Backend) {
    let store = backend.store().await;
    let proxy = Proxy::to(backend.addr()).await;
    let mut config = config_for(vec![StoreEndpoint::from(proxy.addr)]);
    config.call_timeout = Duration::from_secs(1);
    let through_proxy = Store::connect(config).await.unwrap();
    let mut watch = through_proxy.watch_prefix("w/");
    connected(&mut watch).await;

    proxy.freeze();
    let put = store.put("w/a", "1", None).await.unwrap();
    disconnected(&mut watch).await;
    let error = through_proxy.get("w/a").await.unwrap_err();
    assert!(error.is_unknown(), "{error:?}");
    proxy.heal();
    assert_eq!(changes(&mut watch).await.0, put);
    through_proxy.get_existing("w/a").await.unwrap();
}

pub async fn a_slow_consumer_gets_everything_in_order(backend: Backend) {
    let writer = backend.store().await;
    let mut config = config_for(vec![StoreEndpoint::from(backend.addr())]);
    config.watch.queue_events = 1;
    let mut watch = Store::connect(config).await.unwrap().watch_prefix("w/");
    connected(&mut watch).await;
    let mut first = None;
    for i in 0..100 {
        let revision = writer.put("w/k", format!("{i}"), None).await.unwrap();
        first.get_or_insert(revision);
    }
    let first = first.expect("something was written");
    for i in 0..100 {
        let told = changes(&mut watch).await;
        assert_eq!(told, (first + i, vec![format!("+w/k={i}")]));
    }
}

pub async fn a_large_backlog_arrives_whole(backend: Backend) {
    let store = backend.store().await;
    let proxy = Proxy::to(backend.addr()).await;
    let mut watch = store_at(proxy.addr).await.watch_prefix("w/");
    let start = connected(&mut watch).await;
    proxy.cut();
    disconnected(&mut watch).await;
    // More than one message may hold, so that the store has to split it.
    let value = vec![b'x'; 1 << 20];
    for i in 0..6 {
        store.put(&format!("w/{i}"), value.clone(), None).await.unwrap();
    }
    proxy.heal();
    assert_eq!(connected(&mut watch).await, start);
    for i in 0..6 {
        let WatchEvent::Changes { revision, changes } = next_data(&mut watch).await else {
            panic!("nothing was lost");
        };
        assert_eq!(revision, start + 1 + i);
        assert!(matches!(&changes[..], [Change::Put(entry)] if entry.value == value));
    }
}

pub async fn an_expiring_lease_is_one_change(backend: Backend) {
    let store = backend.store().await;
    let mut watch = store.watch_prefix("w/");
    connected(&mut watch).await;
    let lease = store.lease_grant(Duration::from_secs(1)).await.unwrap();
    let keys = ["w/a", "w/b", "w/c"];
    let puts = keys.map(|key| Op::put_leased(key, "", lease.lease_id));
    store.txn(Txn::when([]).then(puts)).await.unwrap();
    let mut standing = BTreeMap::new();
    let mut num_events = 0;
    while num_events < 2 {
        let WatchEvent::Changes { changes, .. } = next_data(&mut watch).await else {
            panic!("nothing was lost");
        };
        num_events += 1;
        for change in changes {
            match change {
                Change::Put(entry) => drop(standing.insert(entry.key, ())),
                Change::Delete { key } => drop(standing.remove(&key)),
            }
        }
        assert_eq!(standing.len(), if num_events == 1 { 3 } else { 0 });
    }
}
