//! The calls that the lease machine asks for, and how the store's answers become its events.

use std::time::Duration;

use tessera_cluster::lease_keeper::{CallId, LeaseAction, LeaseEvent};
use tokio::time::timeout;

use crate::error::StoreError;
use crate::kv::{Compare, KeyValue, Op, Txn};
use crate::store::Store;

/// How often a write is tried against keys that change under it.
const MAX_WRITE_TRIES: usize = 4;

/// Performs one call and always returns its event, within the call's time-out.
pub(crate) async fn perform(store: &Store, action: LeaseAction) -> LeaseEvent {
    match action {
        LeaseAction::Grant { call, ttl, timeout: limit } => {
            match store.lease_grant_within(ttl, limit).await {
                Ok(granted) => {
                    LeaseEvent::Granted { call, lease_id: granted.lease_id, ttl: granted.ttl }
                }
                Err(error) => failed(call, "grant", &error),
            }
        }
        LeaseAction::KeepAlive { call, lease_id, timeout: limit } => {
            match store.lease_keep_alive_within(lease_id, limit).await {
                Ok(ttl) => LeaseEvent::KeptAlive { call, ttl },
                Err(error) => failed(call, "keepalive", &error),
            }
        }
        LeaseAction::WriteKeys { call, lease_id, held_leases, keys, timeout: limit } => {
            let write = write_own_keys(store, lease_id, &held_leases, &keys);
            match bounded("write keys", limit, write).await {
                Ok(Written::At(revision)) => LeaseEvent::KeysWritten { call, revision },
                Ok(Written::Refused { key }) => LeaseEvent::KeysRefused { call, key },
                Err(error) => failed(call, "write keys", &error),
            }
        }
        LeaseAction::DeleteKeys { call, lease_id, keys, timeout: limit } => {
            let delete = delete_own_keys(store, lease_id, &keys);
            match bounded("delete keys", limit, delete).await {
                Ok(()) => LeaseEvent::KeysDeleted { call },
                Err(error) => failed(call, "delete keys", &error),
            }
        }
        LeaseAction::Revoke { call, lease_id, timeout: limit } => {
            match store.lease_revoke_within(lease_id, limit).await {
                Ok(()) => LeaseEvent::Revoked { call },
                Err(error) => failed(call, "revoke", &error),
            }
        }
        LeaseAction::Publish(_) | LeaseAction::Answer { .. } => {
            unreachable!("the driver handles these without the store")
        }
    }
}

/// Only a store that says so makes a lease gone. All else, refusals included, is a failure that may
/// pass: a full store, a lost permission.
fn failed(call: CallId, name: &'static str, error: &StoreError) -> LeaseEvent {
    match error {
        StoreError::LeaseNotFound { .. } => LeaseEvent::LeaseGone { call },
        error => {
            let cause = std::error::Error::source(error);
            let cause = cause.map(ToString::to_string).unwrap_or_default();
            tracing::warn!(call = name, %error, cause, "lease call failed");
            LeaseEvent::Failed { call }
        }
    }
}

async fn bounded<T>(
    call: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(limit, work).await.unwrap_or(Err(StoreError::TimedOut { call, after: limit }))
}

enum Written {
    At(i64),
    Refused { key: String },
}

/// Writes all keys in one transaction, each of which must be absent or ours: hanging on a lease that
/// we held, or with the very value we want. The first try expects them absent, as they are when a
/// member registers; the answer shows what stands there otherwise.
async fn write_own_keys(
    store: &Store,
    lease_id: i64,
    held_leases: &[i64],
    keys: &[(String, Vec<u8>)],
) -> Result<Written, StoreError> {
    let mut standing: Vec<KeyValue> = Vec::new();
    for _ in 0..MAX_WRITE_TRIES {
        let revision_of = |key: &str| {
            let found = standing.iter().find(|entry| entry.key == key);
            found.map_or(0, |entry| entry.mod_revision)
        };
        let unchanged = keys.iter().map(|(key, _)| Compare::mod_revision_is(key, revision_of(key)));
        let puts = keys.iter().map(|(key, value)| Op::put_leased(key, value.as_slice(), lease_id));
        let gets = keys.iter().map(|(key, _)| Op::get(key));
        let txn = Txn::when(unchanged.collect::<Vec<_>>())
            .then(puts.collect::<Vec<_>>())
            .otherwise(gets.collect::<Vec<_>>());
        let outcome = store.txn(txn).await?;
        if outcome.succeeded {
            return Ok(Written::At(outcome.revision));
        }
        standing = outcome.into_entries();
        let foreign = standing.iter().find(|entry| {
            let wanted = keys.iter().find(|(key, _)| *key == entry.key);
            let has_our_value = wanted.is_some_and(|(_, value)| *value == entry.value);
            !held_leases.contains(&entry.lease) && !has_our_value
        });
        if let Some(entry) = foreign {
            let key = entry.key.clone();
            return Ok(Written::Refused { key });
        }
    }
    Err(StoreError::Unavailable {
        call: "write keys",
        source: "the keys changed under every try".into(),
    })
}

/// Deletes each key that hangs on the lease; others are not ours to delete.
async fn delete_own_keys(store: &Store, lease_id: i64, keys: &[String]) -> Result<(), StoreError> {
    for key in keys {
        let txn = Txn::when([Compare::lease_is(key, lease_id)]).then([Op::delete(key)]);
        store.txn(txn).await?;
    }
    Ok(())
}
