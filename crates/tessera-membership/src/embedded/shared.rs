//! The state machine shared between connections, with its clock.
//!
//! Invariants
//! - The lock is never held across an await.
//! - Before each use the clock is brought in: leases expire, or, if the process stood still so that
//!   nobody could renew them, begin anew.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::mvcc::MvccStore;
use crate::config::EmbeddedConfig;

/// How often the clock is brought in at least, so that a longer gap means that the process stood still.
const MAX_GAP: Duration = Duration::from_millis(250);

/// A handle to one store. It outlives the server in front of it, so that a test may stop and start
/// that server, or put another one (with faults) before it.
#[derive(Debug, Clone)]
pub struct SharedStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    timed: Mutex<TimedStore>,
    origin: Instant,
    revision: watch::Sender<i64>,
}

/// The store and the last time it was used.
#[derive(Debug)]
struct TimedStore {
    store: MvccStore,
    last_used: Duration,
    stall_tolerance: Duration,
}

impl TimedStore {
    fn advance(&mut self, now: Duration) {
        if now.saturating_sub(self.last_used) > self.stall_tolerance {
            self.store.renew_leases(now);
        } else {
            self.store.expire_leases(now);
        }
        self.last_used = now;
    }
}

impl SharedStore {
    /// An empty store.
    pub fn new(config: EmbeddedConfig) -> Self {
        let stall_tolerance = config.stall_tolerance.max(MAX_GAP * 2);
        let store = MvccStore::new(config, crate::random_seed());
        let (revision, _) = watch::channel(store.revision());
        let timed = TimedStore { store, last_used: Duration::ZERO, stall_tolerance };
        Self {
            inner: Arc::new(Inner { timed: Mutex::new(timed), origin: Instant::now(), revision }),
        }
    }

    /// Uses the store at the current time. Watches hear of what changed.
    pub fn with<T>(&self, use_store: impl FnOnce(&mut MvccStore, Duration) -> T) -> T {
        let now = self.inner.origin.elapsed();
        let mut timed = self.lock();
        timed.advance(now);
        let result = use_store(&mut timed.store, now);
        let revision = timed.store.revision();
        self.inner.revision.send_if_modified(|told| {
            let has_changed = *told != revision;
            *told = revision;
            has_changed
        });
        result
    }

    /// Renews all leases before the store is served (again): nobody could renew them until now.
    pub(crate) fn resume(&self) {
        let now = self.inner.origin.elapsed();
        let mut timed = self.lock();
        timed.store.renew_leases(now);
        timed.last_used = now;
    }

    /// The revision, to be waited on.
    pub fn revisions(&self) -> watch::Receiver<i64> {
        self.inner.revision.subscribe()
    }

    /// Expires leases for ever. Ends only by being dropped.
    pub(crate) async fn keep_time(&self) {
        loop {
            let (now, deadline) = self.with(|store, now| (now, store.leases().next_deadline()));
            let until = deadline.map_or(MAX_GAP, |at| at.saturating_sub(now));
            tokio::time::sleep(until.clamp(Duration::from_millis(1), MAX_GAP)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, TimedStore> {
        // Requests are checked before they change anything, so that a panic leaves a sound store.
        let timed = &self.inner.timed;
        timed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed_store() -> TimedStore {
        TimedStore {
            store: MvccStore::new(EmbeddedConfig::default(), 1),
            last_used: Duration::ZERO,
            stall_tolerance: Duration::from_secs(2),
        }
    }

    #[test]
    fn leases_expire_while_the_store_runs_and_not_while_it_stands_still() {
        let mut timed = timed_store();
        timed.store.lease_grant(7, 5, Duration::ZERO).unwrap();
        for second in 1..5 {
            timed.advance(Duration::from_secs(second));
        }
        assert!(timed.store.leases().exists(7));
        timed.advance(Duration::from_secs(60));
        assert!(timed.store.leases().exists(7), "the store stood still");
        for second in 61..=65 {
            timed.advance(Duration::from_secs(second));
        }
        assert!(!timed.store.leases().exists(7));
    }
}
