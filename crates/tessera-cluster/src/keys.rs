//! The keys of the store, written and read in one place.
//!
//! ```text
//! /tessera/{cluster}/members/{instance}                       MemberInfo, under a lease
//! /tessera/{cluster}/groups/{group}/epoch                     EpochRecord, never deleted
//! /tessera/{cluster}/groups/{group}/ready/{epoch}/{instance}  ReadyRecord, under the member's lease
//! /tessera/{cluster}/groups/{group}/id/{epoch}                IdRecord, under rank 0's lease
//! /tessera/{cluster}/groups/{group}/active                    ActiveRecord, what routers read
//! /tessera/{cluster}/drain                                    InstanceId, under the holder's lease
//! /tessera/{cluster}/canary/{fingerprint}/{numerics}          CanaryRecord, written by the first group
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tessera_types::{Epoch, InstanceId, ModelFingerprint, NumericsId};

use crate::error::ClusterError;

/// Longest cluster or group name, the limit of a DNS label.
pub const MAX_NAME_CHARS: usize = 63;

macro_rules! name_newtype {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Accepts 1 to 63 characters of `a-z`, `0-9` and `-`.
            pub fn new(name: impl Into<String>) -> Result<Self, ClusterError> {
                let name = name.into();
                match is_valid_name(&name) {
                    true => Ok(Self(name)),
                    false => Err(ClusterError::InvalidName { kind: $kind, name }),
                }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ClusterError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = ClusterError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name_newtype!(
    /// Name of a cluster: all its keys live under `/tessera/{cluster}/`.
    ClusterName,
    "cluster"
);
name_newtype!(
    /// Name of a decoder group inside a cluster.
    GroupName,
    "group"
);

fn is_valid_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty() && name.len() <= MAX_NAME_CHARS && name.chars().all(allowed)
}

/// A key read back. Ordered and hashable, so that a mirror of the store can be a map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoreKey {
    Member(InstanceId),
    Epoch(GroupName),
    Ready { group: GroupName, epoch: Epoch, instance: InstanceId },
    Id { group: GroupName, epoch: Epoch },
    Active(GroupName),
    DrainLock,
    Canary { fingerprint: ModelFingerprint, numerics: NumericsId },
}

/// Writes and reads the keys of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    cluster: ClusterName,
    prefix: String,
}

impl Keys {
    /// Keys of `cluster`.
    pub fn new(cluster: ClusterName) -> Self {
        let prefix = format!("/tessera/{cluster}/");
        Self { cluster, prefix }
    }

    /// The cluster whose keys these are.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Prefix of every key of the cluster, ending in `/`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Prefix of all member keys.
    pub fn members_prefix(&self) -> String {
        format!("{}members/", self.prefix)
    }

    /// Prefix of all keys of one group.
    pub fn group_prefix(&self, group: &GroupName) -> String {
        format!("{}groups/{group}/", self.prefix)
    }

    /// Key of one member.
    pub fn member(&self, instance: InstanceId) -> String {
        format!("{}members/{instance}", self.prefix)
    }

    /// Key of the group's epoch record.
    pub fn epoch(&self, group: &GroupName) -> String {
        format!("{}groups/{group}/epoch", self.prefix)
    }

    /// Key under which a member says that it can take part in `epoch`.
    pub fn ready(&self, group: &GroupName, epoch: Epoch, instance: InstanceId) -> String {
        format!("{}groups/{group}/ready/{epoch}/{instance}", self.prefix)
    }

    /// Key of the communicator id of `epoch`.
    pub fn id(&self, group: &GroupName, epoch: Epoch) -> String {
        format!("{}groups/{group}/id/{epoch}", self.prefix)
    }

    /// Key of the group's active record.
    pub fn active(&self, group: &GroupName) -> String {
        format!("{}groups/{group}/active", self.prefix)
    }

    /// Key of the lock that lets one group drain at a time.
    pub fn drain_lock(&self) -> String {
        format!("{}drain", self.prefix)
    }

    /// Key of the tokens that the canary prompt gives with these weights and numerics.
    pub fn canary(&self, fingerprint: ModelFingerprint, numerics: NumericsId) -> String {
        format!("{}canary/{fingerprint}/{numerics}", self.prefix)
    }

    /// Writes any key.
    pub fn format(&self, key: &StoreKey) -> String {
        match key {
            StoreKey::Member(instance) => self.member(*instance),
            StoreKey::Epoch(group) => self.epoch(group),
            StoreKey::Ready { group, epoch, instance } => self.ready(group, *epoch, *instance),
            StoreKey::Id { group, epoch } => self.id(group, *epoch),
            StoreKey::Active(group) => self.active(group),
            StoreKey::DrainLock => self.drain_lock(),
            StoreKey::Canary { fingerprint, numerics } => self.canary(*fingerprint, *numerics),
        }
    }

    /// Reads a key; `None` for keys of other clusters and for keys that this build does not know, which
    /// a newer build may have written.
    pub fn parse(&self, key: &str) -> Option<StoreKey> {
        let path = key.strip_prefix(self.prefix.as_str())?;
        let parts: Vec<&str> = path.split('/').collect();
        match parts[..] {
            ["drain"] => Some(StoreKey::DrainLock),
            ["members", instance] => Some(StoreKey::Member(parse_instance(instance)?)),
            ["canary", fingerprint, numerics] => Some(StoreKey::Canary {
                fingerprint: fingerprint
                    .parse()
                    .ok()
                    .filter(|f: &ModelFingerprint| f.to_string() == fingerprint)?,
                numerics: numerics
                    .parse()
                    .ok()
                    .filter(|n: &NumericsId| n.to_string() == numerics)?,
            }),
            ["groups", group, ref rest @ ..] => parse_group_key(GroupName::new(group).ok()?, rest),
            _ => None,
        }
    }
}

fn parse_group_key(group: GroupName, rest: &[&str]) -> Option<StoreKey> {
    match *rest {
        ["epoch"] => Some(StoreKey::Epoch(group)),
        ["active"] => Some(StoreKey::Active(group)),
        ["id", epoch] => Some(StoreKey::Id { group, epoch: parse_epoch(epoch)? }),
        ["ready", epoch, instance] => Some(StoreKey::Ready {
            group,
            epoch: parse_epoch(epoch)?,
            instance: parse_instance(instance)?,
        }),
        _ => None,
    }
}

/// Only the form that is written is read back, so that a record has exactly one key.
fn parse_epoch(text: &str) -> Option<Epoch> {
    let epoch = Epoch(text.parse().ok()?);
    (epoch.to_string() == text).then_some(epoch)
}

fn parse_instance(text: &str) -> Option<InstanceId> {
    InstanceId::parse(text).filter(|instance| instance.to_string() == text)
}

#[cfg(test)]
mod tests {
    use tessera_types::Hash256;

    use super::*;

    fn keys() -> Keys {
        Keys::new(ClusterName::new("prod-1").unwrap())
    }

    #[test]
    fn every_key_survives_its_own_text() {
        let keys = keys();
        let group = GroupName::new("g0").unwrap();
        let instance = InstanceId::random();
        let all = [
            StoreKey::Member(instance),
            StoreKey::Epoch(group.clone()),
            StoreKey::Ready { group: group.clone(), epoch: Epoch(12), instance },
            StoreKey::Id { group: group.clone(), epoch: Epoch(u64::MAX) },
            StoreKey::Active(group),
            StoreKey::DrainLock,
            StoreKey::Canary {
                fingerprint: ModelFingerprint(Hash256([0xab; 32])),
                numerics: NumericsId(Hash256([7; 32])),
            },
        ];
        for key in all {
            let text = keys.format(&key);
            assert!(text.starts_with(keys.prefix()), "{text}");
            assert_eq!(keys.parse(&text), Some(key));
        }
    }

    #[test]
    fn foreign_and_malformed_keys_are_not_ours() {
        let keys = keys();
        let instance = InstanceId::random();
        for text in [
            "/tessera/prod-2/groups/g0/epoch".to_owned(),
            "/tessera/prod-1".to_owned(),
            "/tessera/prod-1/groups/g0/epoch/".to_owned(),
            "/tessera/prod-1/groups/G0/epoch".to_owned(),
            "/tessera/prod-1/groups//epoch".to_owned(),
            "/tessera/prod-1/groups/g0/id/007".to_owned(),
            "/tessera/prod-1/groups/g0/id/-1".to_owned(),
            format!("/tessera/prod-1/members/{}", instance.to_string().to_uppercase()),
            format!("/tessera/prod-1/members/{}", instance.0.simple()),
            format!("/tessera/prod-1/groups/g0/ready/+1/{instance}"),
        ] {
            assert_eq!(keys.parse(&text), None, "{text}");
        }
    }

    #[test]
    fn names_are_dns_labels_without_upper_case() {
        let longest = "a".repeat(MAX_NAME_CHARS);
        for good in ["a", "g0", "qwen2-5", longest.as_str()] {
            assert!(GroupName::new(good).is_ok(), "{good}");
        }
        let too_long = "a".repeat(MAX_NAME_CHARS + 1);
        for bad in ["", "A", "a/b", "a.b", "a b", "ä", too_long.as_str()] {
            assert!(ClusterName::new(bad).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<GroupName>("\"a/b\"").is_err());
    }
}
