//! The state machine by itself, in simulated time.

use std::collections::BTreeMap;
use std::time::Duration;

use etcd_client::EventType;
use etcd_client::proto::{
    PbCompactionRequest, PbDeleteRequest, PbPutRequest, PbRangeRequest, PbTxnOpRequest,
    PbTxnRequest, PbTxnRequestOp,
};
use proptest::prelude::*;

use super::mvcc::MvccStore;
use super::refusal::Refusal;
use crate::config::EmbeddedConfig;

fn store(config: EmbeddedConfig) -> MvccStore {
    MvccStore::new(config, 77)
}

fn put(key: &str, value: &str, lease: i64) -> PbPutRequest {
    let (key, value) = (key.into(), value.into());
    PbPutRequest { key, value, lease, ..PbPutRequest::default() }
}

fn delete(key: &str, range_end: &str) -> PbDeleteRequest {
    let (key, range_end) = (key.into(), range_end.into());
    PbDeleteRequest { key, range_end, ..PbDeleteRequest::default() }
}

fn all_at(revision: i64) -> PbRangeRequest {
    PbRangeRequest { key: vec![0], range_end: vec![0], revision, ..PbRangeRequest::default() }
}

type Contents = BTreeMap<Vec<u8>, Vec<u8>>;

fn contents(store: &MvccStore, revision: i64) -> Result<Contents, Refusal> {
    let response = store.range(&all_at(revision))?;
    Ok(response.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect())
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_full_store_refuses_what_grows_it_and_takes_what_does_not() {
    let config = EmbeddedConfig { max_keys: 3, max_bytes: 100, ..EmbeddedConfig::default() };
    let mut store = store(config);
    for key in ["a", "b", "c"] {
        store.put(put(key, "1", 0)).unwrap();
    }
    assert_eq!(store.put(put("d", "", 0)), Err(Refusal::NoSpace), "too many keys");
    store.put(put("a", "2", 0)).unwrap();
    let long = "x".repeat(96);
    assert_eq!(store.put(put("a", &long, 0)), Err(Refusal::NoSpace), "too many bytes");
    store.delete_range(delete("b", "")).unwrap();
    store.put(put("d", "1", 0)).unwrap();
    assert_eq!(store.revision(), 7, "five puts and a delete; refusals have no revision");
}

#[test]
fn leases_are_bounded_and_their_ttl_is_raised() {
    let config = EmbeddedConfig { max_leases: 2, ..EmbeddedConfig::default() };
    let mut store = store(config);
    let now = Duration::ZERO;
    assert_eq!(store.lease_grant(5, 1, now), Ok((5, 2)), "the smallest TTL is 2 s");
    assert_eq!(store.lease_grant(5, 1, now), Err(Refusal::LeaseExists));
    assert_eq!(store.lease_grant(6, 1 << 40, now), Err(Refusal::TtlTooLarge));
    let (fresh, _) = store.lease_grant(0, 10, now).unwrap();
    assert!(fresh > 0 && fresh != 5);
    assert_eq!(store.lease_grant(0, 10, now), Err(Refusal::TooMany("leases")));
    store.lease_revoke(5).unwrap();
    assert_eq!(store.lease_revoke(5), Err(Refusal::LeaseNotFound));
    store.lease_grant(0, 10, now).unwrap();
}

#[test]
fn an_expired_lease_deletes_its_keys_at_one_revision() {
    let mut store = store(EmbeddedConfig::default());
    store.lease_grant(1, 10, Duration::ZERO).unwrap();
    store.lease_grant(2, 10, Duration::ZERO).unwrap();
    for key in ["a", "b", "moved"] {
        store.put(put(key, "", 1)).unwrap();
    }
    store.put(put("moved", "", 2)).unwrap();
    store.lease_keep_alive(2, seconds(5)).unwrap();
    store.expire_leases(seconds(9));
    let before = store.revision();
    store.expire_leases(seconds(10));
    assert_eq!(store.revision(), before + 1);
    let events = store.history().since(before + 1).next().unwrap();
    let deleted: Vec<&[u8]> = events.events.iter().map(|e| e.kv.key.as_slice()).collect();
    assert_eq!(deleted, [b"a", b"b"]);
    assert!(events.events.iter().all(|event| event.kind == EventType::Delete));
    assert!(store.leases().exists(2));
    assert_eq!(store.lease_keep_alive(1, seconds(10)), None);
}

#[test]
fn history_is_bounded_and_says_so() {
    let config = EmbeddedConfig { max_history_events: 10, ..EmbeddedConfig::default() };
    let mut store = store(config);
    for i in 0..50 {
        store.put(put("k", &i.to_string(), 0)).unwrap();
    }
    let oldest = store.history().compact_revision();
    assert_eq!(oldest, store.revision() - 9);
    assert_eq!(contents(&store, oldest - 1), Err(Refusal::Compacted));
    assert_eq!(contents(&store, oldest).unwrap()[b"k".as_slice()], b"40");
    assert_eq!(contents(&store, store.revision() + 1), Err(Refusal::FutureRevision));

    let mut by_bytes =
        self::store(EmbeddedConfig { max_history_bytes: 1000, ..EmbeddedConfig::default() });
    for _ in 0..20 {
        by_bytes.put(put("k", &"x".repeat(100), 0)).unwrap();
    }
    assert!(by_bytes.history().since(0).count() < 6);
}

#[test]
fn compaction_is_refused_for_what_is_gone_or_not_yet() {
    let mut store = store(EmbeddedConfig::default());
    for _ in 0..5 {
        store.put(put("k", "", 0)).unwrap();
    }
    let compact = |revision| PbCompactionRequest { revision, physical: false };
    assert_eq!(store.compact(&compact(7)), Err(Refusal::FutureRevision));
    store.compact(&compact(4)).unwrap();
    assert_eq!(store.compact(&compact(4)), Err(Refusal::Compacted));
    assert_eq!(store.history().since(0).next().unwrap().revision, 4);
}

/// One change of a small key space.
#[derive(Debug, Clone)]
enum Change {
    Put(u8, u8),
    Delete(u8),
    DeleteFrom(u8),
    Txn(Vec<(u8, u8)>, u8),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0u8..8, any::<u8>()).prop_map(|(key, value)| Change::Put(key, value)),
        2 => (0u8..8).prop_map(Change::Delete),
        1 => (0u8..8).prop_map(Change::DeleteFrom),
        2 => (prop::collection::vec((0u8..8, any::<u8>()), 0..4), 0u8..8)
            .prop_map(|(puts, delete)| Change::Txn(puts, delete)),
    ]
}

fn key_name(key: u8) -> String {
    format!("k{key}")
}

/// Applies a change to the store and, if it was not refused, to the model.
fn apply(store: &mut MvccStore, model: &mut Contents, change: &Change) {
    match change {
        Change::Put(key, value) => {
            let value = value.to_string();
            store.put(put(&key_name(*key), &value, 0)).unwrap();
            model.insert(key_name(*key).into(), value.into());
        }
        Change::Delete(key) => {
            store.delete_range(delete(&key_name(*key), "")).unwrap();
            model.remove(key_name(*key).as_bytes());
        }
        Change::DeleteFrom(key) => {
            store.delete_range(delete(&key_name(*key), "\0")).unwrap();
            model.split_off(key_name(*key).as_bytes());
        }
        Change::Txn(puts, deleted) => {
            let mut ops: Vec<PbTxnOpRequest> = puts
                .iter()
                .map(|(key, value)| put(&key_name(*key), &value.to_string(), 0))
                .map(PbTxnOpRequest::RequestPut)
                .collect();
            let gone = delete(&key_name(*deleted), "");
            ops.push(PbTxnOpRequest::RequestDeleteRange(gone));
            let success = ops.into_iter().map(|op| PbTxnRequestOp { request: Some(op) }).collect();
            let mut written: Vec<u8> = puts.iter().map(|(key, _)| *key).collect();
            written.push(*deleted);
            written.sort_unstable();
            let is_sound = written.windows(2).all(|pair| pair[0] != pair[1]);
            let before = (store.revision(), contents(store, 0));
            match store.txn(PbTxnRequest { success, ..PbTxnRequest::default() }) {
                Ok(_) => {
                    assert!(is_sound, "a key written twice was taken");
                    for (key, value) in puts {
                        model.insert(key_name(*key).into(), value.to_string().into());
                    }
                    model.remove(key_name(*deleted).as_bytes());
                }
                Err(refusal) => {
                    assert_eq!(refusal, Refusal::DuplicateKey);
                    assert!(!is_sound);
                    assert_eq!((store.revision(), contents(store, 0)), before);
                }
            }
        }
    }
}

proptest! {
    /// Every kept revision reads as it was, and its events lead from one revision to the next.
    #[test]
    fn the_past_stays_as_it_was(
        changes in prop::collection::vec(change(), 1..60),
        max_history_events in 5usize..80,
    ) {
        let config = EmbeddedConfig { max_history_events, ..EmbeddedConfig::default() };
        let mut store = store(config);
        let mut model = Contents::new();
        let mut past = BTreeMap::from([(store.revision(), model.clone())]);
        for change in &changes {
            let before = store.revision();
            apply(&mut store, &mut model, change);
            prop_assert!(store.revision() <= before + 1);
            past.insert(store.revision(), model.clone());
        }
        let oldest = store.history().compact_revision().max(1);
        let mut replayed = past[&oldest].clone();
        for (revision, then) in past.range(oldest..) {
            prop_assert_eq!(&contents(&store, *revision).unwrap(), then);
            for entry in store.history().since(*revision).take_while(|e| e.revision == *revision) {
                for event in &entry.events {
                    match event.kind {
                        EventType::Put => {
                            replayed.insert(event.kv.key.clone(), event.kv.value.clone());
                        }
                        EventType::Delete => drop(replayed.remove(&event.kv.key)),
                    }
                }
            }
            prop_assert_eq!(&replayed, then);
        }
    }
}
