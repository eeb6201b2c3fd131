//! Between the store and the formation machine: records in, transactions out.

use tessera_cluster::formation::{Compare, Event, TxnOutcome};
use tessera_cluster::{
    ActiveRecord, ClusterError, EpochRecord, GroupName, IdRecord, Keys, MemberInfo, ReadyRecord,
    Record, StoreKey,
};
use tessera_engine::error::chain;
use tessera_membership::{Change, KeyValue, Op, Store, Txn, WatchEvent};

/// What a watch event says to one group's machine. A record that cannot be read is skipped: what it
/// replaces stands.
pub(super) fn events_of(keys: &Keys, group: &GroupName, event: WatchEvent) -> Vec<Event> {
    match event {
        WatchEvent::Snapshot { entries, .. } => {
            let puts = entries.into_iter().filter_map(|entry| put_event(keys, group, &entry));
            puts.chain([Event::Synced]).collect()
        }
        WatchEvent::Changes { changes, .. } | WatchEvent::Resync { changes, .. } => {
            let event = |change: Change| match change {
                Change::Put(entry) => put_event(keys, group, &entry),
                Change::Delete { key } => delete_event(keys, group, &key),
            };
            changes.into_iter().filter_map(event).collect()
        }
        WatchEvent::Connected { .. } => Vec::new(),
        WatchEvent::Disconnected { error, silent_for } => {
            tracing::debug!(error = %chain(&error), ?silent_for, "the membership store is away");
            Vec::new()
        }
    }
}

fn put_event(keys: &Keys, group: &GroupName, entry: &KeyValue) -> Option<Event> {
    let KeyValue { key, value, mod_revision, create_revision, .. } = entry;
    let (mod_revision, create_revision) = (*mod_revision, *create_revision);
    let skipped = |error: ClusterError| {
        tracing::error!(key, error = %chain(&error), "a record in the store cannot be read");
    };
    match keys.parse(key)? {
        StoreKey::Member(_) => {
            let member = Box::new(MemberInfo::from_bytes(value).map_err(skipped).ok()?);
            Some(Event::MemberPut { member, create_revision, mod_revision })
        }
        StoreKey::Epoch(of) if of == *group => {
            let record = Box::new(EpochRecord::from_bytes(value).map_err(skipped).ok()?);
            Some(Event::EpochPut { record, mod_revision })
        }
        StoreKey::Active(of) if of == *group => {
            let record = Box::new(ActiveRecord::from_bytes(value).map_err(skipped).ok()?);
            Some(Event::ActivePut { record, mod_revision })
        }
        StoreKey::Ready { group: of, .. } if of == *group => {
            let record = ReadyRecord::from_bytes(value).map_err(skipped).ok()?;
            Some(Event::ReadyPut { record, mod_revision })
        }
        StoreKey::Id { group: of, .. } if of == *group => {
            let record = IdRecord::from_bytes(value).map_err(skipped).ok()?;
            Some(Event::IdPut { record })
        }
        _ => None,
    }
}

fn delete_event(keys: &Keys, group: &GroupName, key: &str) -> Option<Event> {
    match keys.parse(key)? {
        StoreKey::Member(instance) => Some(Event::MemberDeleted { instance }),
        StoreKey::Active(of) if of == *group => Some(Event::ActiveDeleted),
        StoreKey::Ready { group: of, epoch, instance } if of == *group => {
            Some(Event::ReadyDeleted { epoch, instance })
        }
        _ => None,
    }
}

/// Does `op` if all compares hold.
pub(super) async fn transact(store: &Store, compares: Vec<Compare>, op: Op) -> TxnOutcome {
    let conditions: Vec<_> = compares
        .into_iter()
        .map(|compare| {
            tessera_membership::Compare::mod_revision_is(compare.key, compare.mod_revision)
        })
        .collect();
    match store.txn(Txn::when(conditions).then([op])).await {
        Ok(outcome) if outcome.succeeded => TxnOutcome::Committed,
        Ok(_) => TxnOutcome::Conflict,
        Err(error) => {
            tracing::warn!(error = %chain(&error), "a transaction has no answer");
            TxnOutcome::Unknown
        }
    }
}
