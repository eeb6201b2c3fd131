//! Leases: who keeps which keys alive until when. Time is passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::refusal::Refusal;
use crate::config::EmbeddedConfig;

/// Largest TTL etcd grants, in seconds.
const MAX_TTL_SECONDS: i64 = 9_000_000_000;

#[derive(Debug)]
struct Lease {
    ttl_seconds: i64,
    deadline: Duration,
    keys: BTreeSet<Vec<u8>>,
}

/// All leases.
#[derive(Debug)]
pub struct LeaseBook {
    leases: BTreeMap<i64, Lease>,
    max_leases: usize,
    min_ttl_seconds: i64,
    last_id: i64,
}

impl LeaseBook {
    /// No leases. Ids are counted from `first_id`, so that two stores do not name the same ones.
    pub fn new(config: &EmbeddedConfig, first_id: i64) -> Self {
        Self {
            leases: BTreeMap::new(),
            max_leases: config.max_leases,
            min_ttl_seconds: config.min_ttl_seconds,
            last_id: first_id,
        }
    }

    /// Grants a lease with the id asked for, or a fresh one for 0. Returns id and granted TTL.
    pub fn grant(
        &mut self,
        id: i64,
        ttl_seconds: i64,
        now: Duration,
    ) -> Result<(i64, i64), Refusal> {
        if ttl_seconds > MAX_TTL_SECONDS {
            return Err(Refusal::TtlTooLarge);
        }
        if self.leases.contains_key(&id) {
            return Err(Refusal::LeaseExists);
        }
        if self.leases.len() >= self.max_leases {
            return Err(Refusal::TooMany("leases"));
        }
        let id = if id == 0 { self.fresh_id() } else { id };
        let ttl_seconds = ttl_seconds.max(self.min_ttl_seconds);
        let lease =
            Lease { ttl_seconds, deadline: now + seconds(ttl_seconds), keys: BTreeSet::new() };
        self.leases.insert(id, lease);
        Ok((id, ttl_seconds))
    }

    fn fresh_id(&mut self) -> i64 {
        loop {
            self.last_id = (self.last_id + 1) & i64::MAX;
            if self.last_id != 0 && !self.leases.contains_key(&self.last_id) {
                return self.last_id;
            }
        }
    }

    /// Renews a lease. Returns its TTL; `None` if it does not exist.
    pub fn keep_alive(&mut self, id: i64, now: Duration) -> Option<i64> {
        let lease = self.leases.get_mut(&id)?;
        lease.deadline = now + seconds(lease.ttl_seconds);
        Some(lease.ttl_seconds)
    }

    /// Renews all leases: for the time that the store did not run.
    pub fn renew_all(&mut self, now: Duration) {
        for lease in self.leases.values_mut() {
            lease.deadline = now + seconds(lease.ttl_seconds);
        }
    }

    /// Removes a lease. Returns its keys; `None` if it does not exist.
    pub fn remove(&mut self, id: i64) -> Option<BTreeSet<Vec<u8>>> {
        self.leases.remove(&id).map(|lease| lease.keys)
    }

    /// Whether the lease exists.
    pub fn exists(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// Hangs a key on a lease (0: on none), off the one it hung on.
    pub fn attach(&mut self, key: &[u8], from: i64, to: i64) {
        if let Some(lease) = self.leases.get_mut(&from) {
            lease.keys.remove(key);
        }
        if let Some(lease) = self.leases.get_mut(&to) {
            lease.keys.insert(key.to_vec());
        }
    }

    /// Leases whose time is over.
    pub fn expired(&self, now: Duration) -> Vec<i64> {
        let over = self.leases.iter().filter(|(_, l)| l.deadline <= now);
        over.map(|(id, _)| *id).collect()
    }

    /// When the next lease expires.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.leases.values().map(|lease| lease.deadline).min()
    }

    /// Ids of all leases.
    pub fn ids(&self) -> impl Iterator<Item = i64> {
        self.leases.keys().copied()
    }

    /// Remaining seconds, granted seconds and keys of a lease.
    pub fn describe(&self, id: i64, now: Duration) -> Option<(i64, i64, Vec<Vec<u8>>)> {
        let lease = self.leases.get(&id)?;
        let remaining = lease.deadline.saturating_sub(now).as_secs() as i64;
        let keys = lease.keys.iter().cloned().collect();
        Some((remaining, lease.ttl_seconds, keys))
    }
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(seconds.unsigned_abs())
}
