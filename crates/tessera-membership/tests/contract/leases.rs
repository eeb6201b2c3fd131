//! Leases and the keys that hang on them.

use std::time::Duration;

use tessera_membership::{Store, StoreError};

use crate::backend::Backend;

const SECOND: Duration = Duration::from_secs(1);

/// Waits until a key is gone.
pub async fn gone(store: &Store, key: &str) {
    while store.get(key).await.unwrap().is_some() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub async fn an_expired_lease_takes_its_keys(backend: Backend) {
    let store = backend.store().await;
    let lease = store.lease_grant(SECOND).await.unwrap();
    assert!(lease.ttl >= SECOND);
    store.put("a", "1", Some(lease.lease_id)).await.unwrap();
    store.put("b", "2", Some(lease.lease_id)).await.unwrap();
    // A key that moved off the lease stays.
    store.put("c", "3", Some(lease.lease_id)).await.unwrap();
    store.put("c", "4", None).await.unwrap();
    assert_eq!(store.get_existing("a").await.unwrap().lease, lease.lease_id);
    gone(&store, "a").await;
    gone(&store, "b").await;
    assert_eq!(store.get_existing("c").await.unwrap().value, b"4");
    let keepalive = store.lease_keep_alive(lease.lease_id).await;
    assert!(matches!(keepalive, Err(StoreError::LeaseNotFound { .. })));
}

pub async fn a_kept_lease_stays(backend: Backend) {
    let store = backend.store().await;
    let kept = store.lease_grant(SECOND).await.unwrap();
    let left = store.lease_grant(SECOND).await.unwrap();
    store.put("kept", "", Some(kept.lease_id)).await.unwrap();
    store.put("left", "", Some(left.lease_id)).await.unwrap();
    // Until the other lease, granted later, is gone, this one would be gone too.
    let keep = async {
        loop {
            let ttl = store.lease_keep_alive(kept.lease_id).await.unwrap();
            assert!(ttl >= SECOND);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = gone(&store, "left") => {}
        () = keep => {}
    }
    assert!(store.get("kept").await.unwrap().is_some());
    gone(&store, "kept").await;
}

pub async fn a_revoked_lease_is_gone_for_certain(backend: Backend) {
    let store = backend.store().await;
    let lease = store.lease_grant(60 * SECOND).await.unwrap();
    let lease_id = lease.lease_id;
    store.put("k", "", Some(lease_id)).await.unwrap();
    let left = store.lease_time_to_live(lease_id).await.unwrap();
    assert!(left.is_some_and(|left| left <= lease.ttl));

    store.lease_revoke(lease_id).await.unwrap();
    assert_eq!(store.get("k").await.unwrap(), None);
    assert_eq!(store.lease_time_to_live(lease_id).await.unwrap(), None);
    let is_gone = |result: Result<(), StoreError>| matches!(result, Err(StoreError::LeaseNotFound { lease_id: id }) if id == lease_id);
    assert!(is_gone(store.lease_revoke(lease_id).await));
    assert!(is_gone(store.lease_keep_alive(lease_id).await.map(drop)));
    assert!(is_gone(store.put("k", "", Some(lease_id)).await.map(drop)));
    assert!(is_gone(store.create("k", "", Some(lease_id)).await.map(drop)));
}
