//! Keys, comparisons, transactions, and how calls fail.

use std::time::Duration;

use tessera_membership::{Compare, Op, OpOutcome, Store, StoreEndpoint, StoreError, Txn};
use tokio::task::JoinSet;

use crate::backend::{Backend, config_for, free_addr};

pub async fn a_key_is_written_read_and_deleted(backend: Backend) {
    let store = backend.store().await;
    assert_eq!(store.get("k").await.unwrap(), None);
    assert!(matches!(
        store.get_existing("k").await,
        Err(StoreError::NotFound { key }) if key == "k"
    ));

    let created = store.put("k", "one", None).await.unwrap();
    let changed = store.put("k", "two", None).await.unwrap();
    assert_eq!(changed, created + 1, "each write is one revision");
    let entry = store.get_existing("k").await.unwrap();
    assert_eq!((entry.key.as_str(), entry.value.as_slice()), ("k", b"two".as_slice()));
    assert_eq!((entry.create_revision, entry.mod_revision, entry.lease), (created, changed, 0));

    assert!(store.delete("k").await.unwrap());
    assert!(!store.delete("k").await.unwrap());
    assert_eq!(store.get("k").await.unwrap(), None);
    let again = store.put("k", "", None).await.unwrap();
    let entry = store.get_existing("k").await.unwrap();
    assert_eq!(again, changed + 2, "a delete of nothing is no revision");
    assert_eq!(entry.create_revision, again, "a new life has a new creation");
    assert!(entry.value.is_empty());
}

pub async fn a_prefix_is_listed_whole_at_one_revision(backend: Backend) {
    let store = backend.store().await;
    // More than two pages, between neighbours that do not belong to the prefix.
    let keys: Vec<String> = (0..1100).map(|i| format!("p/{i:04}")).collect();
    for chunk in keys.chunks(100) {
        let puts: Vec<Op> = chunk.iter().map(|key| Op::put(key, key.as_str())).collect();
        assert!(store.txn(Txn::when([]).then(puts)).await.unwrap().succeeded);
    }
    store.put("p", "", None).await.unwrap();
    let last = store.put("p0", "", None).await.unwrap();

    let listed = store.get_prefix("p/").await.unwrap();
    assert_eq!(listed.revision, last);
    let listed_keys = listed.entries.iter().map(|entry| &entry.key);
    assert!(listed_keys.eq(keys.iter()), "ascending, complete, no neighbours");
    assert_eq!(store.get_prefix("").await.unwrap().entries.len(), 1102);
    assert!(store.get_prefix("q").await.unwrap().entries.is_empty());
}

pub async fn a_prefix_with_large_values_is_listed_in_pieces(backend: Backend) {
    let store = backend.store().await;
    let value = vec![b'x'; 1 << 20];
    for i in 0..9 {
        store.put(&format!("p/{i}"), value.clone(), None).await.unwrap();
    }
    let listed = store.get_prefix("p/").await.unwrap();
    assert_eq!(listed.entries.len(), 9);
    assert!(listed.entries.iter().all(|entry| entry.value == value));
}

pub async fn every_comparison_holds_and_fails_as_it_says(backend: Backend) {
    let store = backend.store().await;
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    let lease_id = lease.lease_id;
    let created = store.put("k", "v", None).await.unwrap();
    let changed = store.put("k", "w", Some(lease_id)).await.unwrap();

    let holds = |compare: Compare| {
        let store = store.clone();
        async move { store.txn(Txn::when([compare])).await.unwrap().succeeded }
    };
    assert!(holds(Compare::exists("k")).await);
    assert!(holds(Compare::absent("other")).await);
    assert!(holds(Compare::value_is("k", "w")).await);
    assert!(holds(Compare::mod_revision_is("k", changed)).await);
    assert!(holds(Compare::create_revision_is("k", created)).await);
    assert!(holds(Compare::lease_is("k", lease_id)).await);
    assert!(holds(Compare::mod_revision_is("other", 0)).await);

    assert!(!holds(Compare::exists("other")).await);
    assert!(!holds(Compare::absent("k")).await);
    assert!(!holds(Compare::value_is("k", "v")).await);
    assert!(!holds(Compare::value_is("other", "")).await);
    assert!(!holds(Compare::mod_revision_is("k", created)).await);
    assert!(!holds(Compare::create_revision_is("k", changed)).await);
    assert!(!holds(Compare::lease_is("k", 0)).await);

    let both = Txn::when([Compare::exists("k"), Compare::exists("other")]);
    assert!(!store.txn(both).await.unwrap().succeeded, "all must hold");
}

pub async fn a_transaction_is_one_revision_or_nothing(backend: Backend) {
    let store = backend.store().await;
    store.put("t/old", "o", None).await.unwrap();
    let before = store.put("t/gone", "g", None).await.unwrap();

    let txn = Txn::when([Compare::absent("t/a")])
        .then([
            Op::put("t/a", "1"),
            Op::put("t/b", "2"),
            Op::delete("t/gone"),
            Op::get_prefix("t/"),
            Op::get("missing"),
        ])
        .otherwise([Op::get("t/a"), Op::delete_prefix("t/")]);
    let outcome = store.txn(txn.clone()).await.unwrap();
    assert!(outcome.succeeded);
    assert_eq!(outcome.revision, before + 1);
    assert_eq!(outcome.outcomes[..2], [OpOutcome::Put, OpOutcome::Put]);
    assert_eq!(outcome.outcomes[2], OpOutcome::Deleted(1));
    let OpOutcome::Entries(entries) = &outcome.outcomes[3] else {
        panic!("a read gives entries");
    };
    let keys: Vec<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["t/a", "t/b", "t/old"], "a transaction sees its own writes");
    assert_eq!(outcome.outcomes[4], OpOutcome::Entries(vec![]));
    for key in ["t/a", "t/b"] {
        let entry = store.get_existing(key).await.unwrap();
        assert_eq!(entry.mod_revision, outcome.revision);
    }

    let outcome = store.txn(txn).await.unwrap();
    assert!(!outcome.succeeded);
    assert_eq!(outcome.outcomes[1], OpOutcome::Deleted(3));
    assert_eq!(outcome.into_entries()[0].value, b"1");
    assert!(store.get_prefix("t/").await.unwrap().entries.is_empty());

    // A refused transaction leaves nothing behind.
    let unknown_lease = Txn::when([]).then([Op::put("x", ""), Op::put_leased("y", "", 12345)]);
    assert!(matches!(store.txn(unknown_lease).await, Err(StoreError::LeaseNotFound { .. })));
    assert_eq!(store.get("x").await.unwrap(), None);
}

pub async fn malformed_and_oversized_requests_are_refused(backend: Backend) {
    let store = backend.store().await;
    let refused_with = |result: Result<i64, StoreError>| match result {
        Err(StoreError::Refused { code, .. }) => code,
        other => panic!("expected a refusal, got {other:?}"),
    };
    assert_eq!(refused_with(store.put("", "", None).await), "InvalidArgument");
    let big = vec![0u8; 3 << 19];
    assert_eq!(refused_with(store.put("k", big, None).await), "InvalidArgument");
    store.put("k", vec![0u8; 1 << 20], None).await.unwrap();

    let txn = |ops: Vec<Op>| {
        let store = store.clone();
        async move { store.txn(Txn::when([]).then(ops)).await.map(|o| o.revision) }
    };
    let twice = vec![Op::put("a", "1"), Op::put("a", "2")];
    assert_eq!(refused_with(txn(twice).await), "InvalidArgument");
    let put_and_delete = vec![Op::put("a/b", "1"), Op::delete_prefix("a/")];
    assert_eq!(refused_with(txn(put_and_delete).await), "InvalidArgument");
    let ops = |num_ops: usize| (0..num_ops).map(|i| Op::put(format!("m/{i}"), "")).collect();
    assert_eq!(refused_with(txn(ops(129)).await), "InvalidArgument");
    txn(ops(128)).await.unwrap();

    let future = store.compact(1 << 40).await;
    assert_eq!(refused_with(future.map(|()| 0)), "OutOfRange");
}

pub async fn one_of_twenty_concurrent_creates_wins(backend: Backend) {
    let store = backend.store().await;
    let mut contenders = JoinSet::new();
    for i in 0..20 {
        let store = store.clone();
        contenders.spawn(async move { (i, store.create("epoch", format!("{i}"), None).await) });
    }
    let mut winners = Vec::new();
    while let Some(result) = contenders.join_next().await {
        match result.unwrap() {
            (i, Ok(revision)) => winners.push((i, revision)),
            (_, Err(StoreError::CompareFailed { key, current })) => {
                assert_eq!(key, "epoch");
                assert!(current.is_some(), "the loser learns what stands there");
            }
            (_, Err(error)) => panic!("{error}"),
        }
    }
    assert_eq!(winners.len(), 1);
    let entry = store.get_existing("epoch").await.unwrap();
    let (winner, revision) = winners[0];
    assert_eq!(entry.value, format!("{winner}").into_bytes());
    assert_eq!(entry.mod_revision, revision);
}

pub async fn concurrent_replacements_lose_no_update(backend: Backend) {
    let store = backend.store().await;
    store.create("counter", "0", None).await.unwrap();
    let mut writers = JoinSet::new();
    for _ in 0..5 {
        let store = store.clone();
        writers.spawn(async move {
            for _ in 0..4 {
                increment(&store).await;
            }
        });
    }
    while let Some(result) = writers.join_next().await {
        result.unwrap();
    }
    assert_eq!(store.get_existing("counter").await.unwrap().value, b"20");
}

async fn increment(store: &Store) {
    let mut entry = store.get_existing("counter").await.unwrap();
    loop {
        let count: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
        let value = (count + 1).to_string();
        match store.replace("counter", entry.mod_revision, value, None).await {
            Ok(_) => return,
            Err(StoreError::CompareFailed { current, .. }) => entry = *current.unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
}

pub async fn a_dead_endpoint_is_passed_over(backend: Backend) {
    let endpoints = vec![StoreEndpoint::from(free_addr()), StoreEndpoint::from(backend.addr())];
    let store = Store::connect(config_for(endpoints)).await.unwrap();
    // Writes too: a call that could not connect was never made.
    store.put("k", "v", None).await.unwrap();
    assert_eq!(store.get_existing("k").await.unwrap().value, b"v");
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    store.lease_keep_alive(lease.lease_id).await.unwrap();
}

pub async fn a_store_that_is_down_is_unavailable_and_not_a_hang(mut backend: Backend) {
    let store = backend.store().await;
    store.put("k", "v", None).await.unwrap();
    backend.stop().await;
    let error = store.get("k").await.unwrap_err();
    assert!(error.is_unknown(), "{error:?}");
    let error = store.put("k", "w", None).await.unwrap_err();
    assert!(error.is_unknown(), "{error:?}");
    let error = store.lease_keep_alive(1).await.unwrap_err();
    assert!(error.is_unknown(), "{error:?}");
    backend.start().await;
    assert_eq!(store.get_existing("k").await.unwrap().value, b"v");
}
