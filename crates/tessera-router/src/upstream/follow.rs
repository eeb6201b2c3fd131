//! Carries the store's records into the view.

use std::collections::BTreeMap;
use std::sync::Arc;

use tessera_cluster::view::Event;
use tessera_cluster::{ActiveRecord, ClusterError, GroupName, Keys, MemberInfo, Record, StoreKey};
use tessera_membership::{Change, Store, WatchEvent};
use tessera_types::InstanceId;

use super::Shared;

/// Follows the cluster's prefix for ever.
pub(super) async fn follow(shared: Arc<Shared>, store: Store) {
    let keys = Keys::new(shared.cluster.clone());
    let mut watch = store.watch_prefix(keys.prefix());
    let mut mirror = Mirror::new(keys);
    while let Some(event) = watch.next().await {
        for event in mirror.on(event) {
            shared.apply(event);
        }
    }
}

/// The records that matter here, as the store had them last. After a silence the view is told all of
/// them again, since that is what says "the store is back".
struct Mirror {
    keys: Keys,
    members: BTreeMap<InstanceId, MemberInfo>,
    actives: BTreeMap<GroupName, ActiveRecord>,
    is_away: bool,
}

impl Mirror {
    fn new(keys: Keys) -> Self {
        Self { keys, members: BTreeMap::new(), actives: BTreeMap::new(), is_away: true }
    }

    fn on(&mut self, event: WatchEvent) -> Vec<Event> {
        match event {
            WatchEvent::Snapshot { entries, .. } => {
                (self.members, self.actives) = Default::default();
                for entry in entries {
                    self.put(&entry.key, &entry.value);
                }
                vec![self.listing()]
            }
            WatchEvent::Changes { changes, .. } => {
                changes.into_iter().filter_map(|change| self.change(change)).collect()
            }
            WatchEvent::Resync { changes, .. } => {
                for change in changes {
                    self.change(change);
                }
                vec![self.listing()]
            }
            WatchEvent::Connected { .. } if self.is_away => {
                tracing::info!("the membership store answers");
                vec![self.listing()]
            }
            WatchEvent::Connected { .. } => Vec::new(),
            WatchEvent::Disconnected { error, .. } => {
                if !std::mem::replace(&mut self.is_away, true) {
                    tracing::warn!(%error, "the membership store is away, the last view stands");
                }
                vec![Event::Disconnected]
            }
        }
    }

    fn listing(&mut self) -> Event {
        self.is_away = false;
        Event::Listing {
            members: self.members.values().cloned().collect(),
            actives: self.actives.iter().map(|(n, r)| (n.clone(), r.clone())).collect(),
        }
    }

    fn change(&mut self, change: Change) -> Option<Event> {
        match change {
            Change::Put(entry) => self.put(&entry.key, &entry.value),
            Change::Delete { key } => self.delete(&key),
        }
    }

    /// A record that cannot be read is skipped: what it replaces stands.
    fn put(&mut self, key: &str, value: &[u8]) -> Option<Event> {
        let skipped = |error: ClusterError| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(key, %error, cause, "a record in the store cannot be read");
        };
        match self.keys.parse(key)? {
            StoreKey::Member(instance) => {
                let member = MemberInfo::from_bytes(value).map_err(skipped).ok()?;
                self.members.insert(instance, member.clone());
                Some(Event::MemberPut { member: Box::new(member) })
            }
            StoreKey::Active(group) => {
                let record = ActiveRecord::from_bytes(value).map_err(skipped).ok()?;
                self.actives.insert(group.clone(), record.clone());
                Some(Event::ActivePut { group, record: Box::new(record) })
            }
            _ => None,
        }
    }

    fn delete(&mut self, key: &str) -> Option<Event> {
        match self.keys.parse(key)? {
            StoreKey::Member(instance) => {
                self.members.remove(&instance);
                Some(Event::MemberDeleted { instance })
            }
            StoreKey::Active(group) => {
                self.actives.remove(&group);
                Some(Event::ActiveDeleted { group })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tessera_cluster::{ClusterName, MemberRole};
    use tessera_membership::{KeyValue, StoreError};

    use super::*;

    fn entry(key: String, value: Vec<u8>) -> KeyValue {
        KeyValue { key, value, mod_revision: 1, create_revision: 1, lease: 0 }
    }

    fn member(keys: &Keys) -> (InstanceId, KeyValue) {
        let instance = InstanceId::random();
        let member = MemberInfo {
            instance,
            address: "host:1".to_owned(),
            build: String::new(),
            model: None,
            role: MemberRole::Router,
        };
        (instance, entry(keys.member(instance), member.to_bytes()))
    }

    fn members_of(events: &[Event]) -> Option<usize> {
        match events {
            [Event::Listing { members, .. }] => Some(members.len()),
            _ => None,
        }
    }

    #[test]
    fn the_view_is_told_all_again_when_the_store_is_back() {
        let keys = Keys::new(ClusterName::new("c").expect("a name"));
        let mut mirror = Mirror::new(keys.clone());
        let (_, first) = member(&keys);
        let snapshot = WatchEvent::Snapshot { revision: 1, entries: vec![first] };
        assert_eq!(members_of(&mirror.on(snapshot)), Some(1));
        assert!(mirror.on(WatchEvent::Connected { revision: 1 }).is_empty());
        let error = StoreError::TimedOut { call: "watch", after: Duration::from_secs(1) };
        let away = WatchEvent::Disconnected { silent_for: Duration::from_secs(1), error };
        assert_eq!(mirror.on(away), [Event::Disconnected]);
        let (instance, second) = member(&keys);
        let changes = WatchEvent::Changes { revision: 2, changes: vec![Change::Put(second)] };
        assert!(matches!(mirror.on(changes)[..], [Event::MemberPut { .. }]));
        assert_eq!(members_of(&mirror.on(WatchEvent::Connected { revision: 2 })), Some(2));
        let gone = Change::Delete { key: keys.member(instance) };
        let resync = WatchEvent::Resync { revision: 9, changes: vec![gone] };
        assert_eq!(members_of(&mirror.on(resync)), Some(1));
    }

    #[test]
    fn what_cannot_be_read_is_skipped_and_what_it_replaced_stands() {
        let keys = Keys::new(ClusterName::new("c").expect("a name"));
        let mut mirror = Mirror::new(keys.clone());
        let (instance, good) = member(&keys);
        let broken = entry(keys.member(instance), b"{".to_vec());
        let foreign = entry("/tessera/other/members/x".to_owned(), Vec::new());
        let entries = vec![good, broken, foreign];
        assert_eq!(members_of(&mirror.on(WatchEvent::Snapshot { revision: 1, entries })), Some(1));
    }
}
