//! Members under leases, through losses and restarts.

use std::time::Duration;

use tessera_membership::{
    LeaseKeeperConfig, LeaseState, LostReason, Membership, Registration, RegistrationError, Store,
    StoreEndpoint,
};

use crate::backend::{Backend, config_for};
use crate::leases::gone;

const MEMBER: &str = "/tessera/c/members/a";

fn register(backend: &Backend) -> Registration {
    register_for(backend, Duration::from_secs(2))
}

fn register_for(backend: &Backend, ttl: Duration) -> Registration {
    let mut store = config_for(vec![StoreEndpoint::from(backend.addr())]);
    store.call_timeout = Duration::from_secs(1);
    let config = LeaseKeeperConfig {
        ttl,
        call_timeout: store.call_timeout,
        retry_min: Duration::from_millis(50),
        retry_max: Duration::from_millis(500),
    };
    Membership::register_with(store, MEMBER, "info", config).unwrap()
}

async fn value(store: &Store, key: &str) -> Vec<u8> {
    store.get_existing(key).await.unwrap().value
}

pub async fn a_member_stands_while_registered_and_is_gone_after_revoke(backend: Backend) {
    let store = backend.store().await;
    let registration = register(&backend);
    let (lease_id, revision) = registration.alive().await.unwrap();
    assert_eq!(registration.lease_id(), Some(lease_id));
    let entry = store.get_existing(MEMBER).await.unwrap();
    assert_eq!((entry.lease, entry.mod_revision), (lease_id, revision));

    let revision = registration.put_leased("ready/1/a", "r").await.unwrap();
    let entry = store.get_existing("ready/1/a").await.unwrap();
    assert_eq!((entry.lease, entry.mod_revision), (lease_id, revision));
    let changed = registration.put_leased(MEMBER, "draining").await.unwrap();
    assert!(changed > revision);
    assert_eq!(value(&store, MEMBER).await, b"draining");
    let same = registration.put_leased(MEMBER, "draining").await.unwrap();
    assert_eq!(same, changed, "what stands is not written again");

    registration.forget_leased("ready/1/a").await.unwrap();
    assert_eq!(store.get("ready/1/a").await.unwrap(), None);
    let own = registration.forget_leased(MEMBER).await;
    assert!(matches!(own, Err(RegistrationError::OutOfBounds { .. })));

    let state = registration.state();
    registration.revoke().await;
    assert_eq!(store.get(MEMBER).await.unwrap(), None);
    let reason = LostReason::Revoked;
    assert_eq!(*state.borrow(), LeaseState::Lost { reason });
}

pub async fn a_lost_lease_is_won_back_with_all_keys(backend: Backend) {
    let store = backend.store().await;
    let registration = register(&backend);
    let (first, _) = registration.alive().await.unwrap();
    registration.put_leased("ready/7/a", "r").await.unwrap();
    registration.put_leased("id/7", "nccl").await.unwrap();
    let mut state = registration.state();
    store.lease_revoke(first).await.unwrap();

    let lost = LeaseState::Lost { reason: LostReason::LeaseGone };
    state.wait_for(|state| *state == lost).await.unwrap();
    let (second, revision) = registration.alive().await.unwrap();
    assert_ne!(second, first);
    for (key, value) in [(MEMBER, "info"), ("ready/7/a", "r"), ("id/7", "nccl")] {
        let entry = store.get_existing(key).await.unwrap();
        assert_eq!(entry.value, value.as_bytes());
        assert_eq!((entry.lease, entry.mod_revision), (second, revision), "{key}");
    }
}

pub async fn a_foreign_member_key_fences(backend: Backend) {
    let store = backend.store().await;
    store.put(MEMBER, "another", None).await.unwrap();
    let registration = register(&backend);
    let Err(RegistrationError::Lost { reason }) = registration.alive().await else {
        panic!("the key belongs to another member");
    };
    assert_eq!(reason, LostReason::Fenced { key: MEMBER.into() });
    assert_eq!(value(&store, MEMBER).await, b"another");
    let refused = registration.put_leased("ready/1/a", "r").await;
    assert!(matches!(refused, Err(RegistrationError::Lost { .. })));
}

pub async fn a_foreign_further_key_is_a_conflict(backend: Backend) {
    let store = backend.store().await;
    store.put("id/7", "another", None).await.unwrap();
    let registration = register(&backend);
    let refused = registration.put_leased("id/7", "ours").await;
    assert!(matches!(refused, Err(RegistrationError::Conflict { key }) if key == "id/7"));
    assert_eq!(value(&store, "id/7").await, b"another");
    registration.alive().await.unwrap();
    assert_eq!(value(&store, MEMBER).await, b"info");
}

pub async fn a_restart_of_the_store_is_unknown_and_never_a_loss(mut backend: Backend) {
    let registration = register(&backend);
    let (lease_id, _) = registration.alive().await.unwrap();
    registration.put_leased("ready/1/a", "r").await.unwrap();
    let mut state = registration.state();
    let was_lost = |state: &LeaseState| matches!(state, LeaseState::Lost { .. });

    backend.stop().await;
    let unknown = state.wait_for(|state| !matches!(state, LeaseState::Alive { .. })).await;
    assert!(!was_lost(&unknown.unwrap()), "a store that is down takes nothing");
    // A request made meanwhile waits for the store.
    let waiting = registration.put_leased("ready/2/a", "r");
    let restart = async {
        backend.start().await;
        let again = state.wait_for(|state| !matches!(state, LeaseState::Unknown { .. })).await;
        assert!(!was_lost(&again.unwrap()));
    };
    let (put, ()) = tokio::join!(waiting, restart);
    put.unwrap();
    assert_eq!(registration.alive().await.unwrap().0, lease_id, "the same lease");
    let store = backend.store().await;
    for key in [MEMBER, "ready/1/a", "ready/2/a"] {
        assert_eq!(store.get_existing(key).await.unwrap().lease, lease_id);
    }
}

pub async fn a_member_that_stops_is_forgotten_after_its_ttl(backend: Backend) {
    let store = backend.store().await;
    let registration = register_for(&backend, Duration::from_secs(1));
    registration.alive().await.unwrap();
    drop(registration);
    gone(&store, MEMBER).await;
}
