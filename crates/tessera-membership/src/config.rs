//! Settings of the client path and of the embedded store. Defaults follow etcd's documented limits.

use std::time::Duration;

use crate::error::StoreError;
use crate::url::StoreEndpoint;

/// How to reach the store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Members of the etcd cluster, or the address of an embedded store. At least one.
    pub endpoints: Vec<StoreEndpoint>,
    /// Longest wait for a TCP connection.
    pub connect_timeout: Duration,
    /// Longest wait for one call, over all endpoints tried.
    pub call_timeout: Duration,
    /// HTTP/2 ping interval. etcd refuses clients that ping more often than every 5 s.
    pub keepalive_interval: Duration,
    /// Longest wait for an HTTP/2 pong before the connection counts as dead.
    pub keepalive_timeout: Duration,
    /// Settings of watches.
    pub watch: WatchConfig,
}

impl StoreConfig {
    /// Default settings for these endpoints.
    pub fn new(endpoints: Vec<StoreEndpoint>) -> Self {
        Self {
            endpoints,
            connect_timeout: Duration::from_secs(2),
            call_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
            watch: WatchConfig::default(),
        }
    }

    /// Checks ranges.
    pub fn validate(&self) -> Result<(), StoreError> {
        let check = |ok: bool, field, detail| match ok {
            true => Ok(()),
            false => Err(StoreError::InvalidConfig { field, detail }),
        };
        check(!self.endpoints.is_empty(), "endpoints", "must not be empty")?;
        check(!self.connect_timeout.is_zero(), "connect_timeout", "must be above zero")?;
        check(!self.call_timeout.is_zero(), "call_timeout", "must be above zero")?;
        check(
            self.keepalive_interval > Duration::from_secs(5),
            "keepalive_interval",
            "must exceed 5 s, which etcd enforces",
        )?;
        let watch = &self.watch;
        check(
            !watch.progress_interval.is_zero() && !watch.progress_timeout.is_zero(),
            "watch",
            "intervals must be above zero",
        )?;
        check(
            !watch.retry_min.is_zero() && watch.retry_min <= watch.retry_max,
            "watch.retry_min",
            "must lie between zero and retry_max",
        )?;
        check(watch.queue_events >= 1, "watch.queue_events", "must be at least 1")
    }
}

/// How a prefix is watched.
#[derive(Debug, Clone)]
pub struct WatchConfig {
    /// After this long without a message the store is asked for its progress.
    pub progress_interval: Duration,
    /// If that question is not answered within this time, the watch is opened anew.
    pub progress_timeout: Duration,
    /// First pause before a watch is opened anew.
    pub retry_min: Duration,
    /// Longest such pause.
    pub retry_max: Duration,
    /// Events that may wait for the consumer. When this many do, the watcher waits too, and the
    /// store with it; a consumer that falls behind the store's history gets a resync.
    pub queue_events: usize,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self {
            progress_interval: Duration::from_secs(5),
            progress_timeout: Duration::from_secs(10),
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(5),
            queue_events: 256,
        }
    }
}

/// Bounds of the embedded store. What does not fit is refused with `RESOURCE_EXHAUSTED`.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// Keys that may stand at once.
    pub max_keys: usize,
    /// Bytes of all keys and values that may stand at once.
    pub max_bytes: usize,
    /// Bytes of keys and values in one request (etcd: 1.5 MiB).
    pub max_request_bytes: usize,
    /// Operations in one transaction, and comparisons (etcd: 128).
    pub max_txn_ops: usize,
    /// Events kept for watches that resume; older ones are compacted away.
    pub max_history_events: usize,
    /// Bytes of the events kept.
    pub max_history_bytes: usize,
    /// Leases that may exist at once.
    pub max_leases: usize,
    /// Watches that may be open at once, over all connections.
    pub max_watchers: usize,
    /// Smallest TTL that is granted, in seconds (etcd with its default timing: 2).
    pub min_ttl_seconds: i64,
    /// A store that did not run for this long (a stopped process) renews all leases instead of
    /// expiring them, since nobody could renew them meanwhile. etcd does so after an election.
    pub stall_tolerance: Duration,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            max_keys: 65_536,
            max_bytes: 64 << 20,
            max_request_bytes: 3 << 19,
            max_txn_ops: 128,
            max_history_events: 16_384,
            max_history_bytes: 32 << 20,
            max_leases: 4_096,
            max_watchers: 4_096,
            min_ttl_seconds: 2,
            stall_tolerance: Duration::from_secs(2),
        }
    }
}
