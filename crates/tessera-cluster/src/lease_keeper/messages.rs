//! What goes into the machine and what comes out of it.

use std::fmt;
use std::time::Duration;

use crate::error::ClusterError;

/// Most keys one lease may carry; a re-registration writes them all in one transaction, and etcd
/// takes at most 128 operations.
pub const MAX_LEASED_KEYS: usize = 64;
/// Longest value of a leased key, in bytes, so that [`MAX_LEASED_KEYS`] of them fit one request.
pub const MAX_LEASED_VALUE_BYTES: usize = 16 * 1024;
/// Longest leased key, in bytes.
pub const MAX_LEASED_KEY_BYTES: usize = 1024;

/// Timing of a [`LeaseKeeper`](super::LeaseKeeper).
#[derive(Debug, Clone)]
pub struct LeaseKeeperConfig {
    /// TTL asked for. The store may grant more, and only the granted one counts.
    pub ttl: Duration,
    /// Longest wait for one answer.
    pub call_timeout: Duration,
    /// First pause after a failure.
    pub retry_min: Duration,
    /// Longest pause between two tries.
    pub retry_max: Duration,
}

impl Default for LeaseKeeperConfig {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(10),
            call_timeout: Duration::from_secs(5),
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(5),
        }
    }
}

impl LeaseKeeperConfig {
    /// Checks that a lease can be kept: several tries must fit into a TTL.
    pub fn validate(&self) -> Result<(), ClusterError> {
        let invalid = |field, detail: &str| {
            let detail = detail.to_owned();
            Err(ClusterError::InvalidConfig { field, detail })
        };
        if self.ttl < Duration::from_secs(1) || self.ttl > Duration::from_secs(3600) {
            return invalid("ttl", "must lie between 1 s and 1 h");
        }
        if self.call_timeout.is_zero() {
            return invalid("call_timeout", "must be above zero");
        }
        if self.retry_min.is_zero() || self.retry_min > self.ttl / 4 {
            return invalid("retry_min", "must lie between zero and a quarter of ttl");
        }
        if self.retry_max < self.retry_min {
            return invalid("retry_max", "must not be below retry_min");
        }
        Ok(())
    }
}

/// Names one call of the driver, so that a late answer cannot be taken for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// Names one request of the owner ([`LeaseEvent::Put`], [`LeaseEvent::Forget`]); chosen by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyRequestId(pub u64);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEvent {
    /// Time has passed; sent when [`deadline`](super::LeaseKeeper::deadline) is reached. Harmless at any time.
    Tick,
    /// The store granted a lease.
    Granted { call: CallId, lease_id: i64, ttl: Duration },
    /// The store answered a keepalive. A TTL of zero means that it does not know the lease.
    KeptAlive { call: CallId, ttl: Duration },
    /// The own keys of the call are in the store, at this revision.
    KeysWritten { call: CallId, revision: i64 },
    /// Nothing was written, because this key belongs to somebody else.
    KeysRefused { call: CallId, key: String },
    /// The keys of the call are gone or belong to somebody else.
    KeysDeleted { call: CallId },
    /// The store answered that the lease does not exist.
    LeaseGone { call: CallId },
    /// The lease is revoked.
    Revoked { call: CallId },
    /// The call failed or timed out; whether it took effect is unknown.
    Failed { call: CallId },
    /// The owner wants a key kept under the lease (or its value changed).
    Put { request: KeyRequestId, key: String, value: Vec<u8> },
    /// The owner wants a key gone.
    Forget { request: KeyRequestId, key: String },
    /// The owner leaves for good.
    Revoke,
}

/// What the driver is to do. Every action with a `call` is answered by exactly one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseAction {
    /// Ask for a lease.
    Grant { call: CallId, ttl: Duration, timeout: Duration },
    /// Keep the lease alive, once.
    KeepAlive { call: CallId, lease_id: i64, timeout: Duration },
    /// Write all keys under the lease in one transaction, provided that each is absent or ours. A
    /// key is ours if it hangs on one of `held_leases` or has the wanted value.
    WriteKeys {
        call: CallId,
        lease_id: i64,
        held_leases: Vec<i64>,
        keys: Vec<(String, Vec<u8>)>,
        timeout: Duration,
    },
    /// Delete each key that still hangs on the lease.
    DeleteKeys { call: CallId, lease_id: i64, keys: Vec<String>, timeout: Duration },
    /// Revoke the lease.
    Revoke { call: CallId, lease_id: i64, timeout: Duration },
    /// Tell everybody the new state.
    Publish(LeaseState),
    /// Answer a request of the owner.
    Answer { request: KeyRequestId, outcome: KeyOutcome },
}

/// How a [`LeaseEvent::Put`] or [`LeaseEvent::Forget`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyOutcome {
    /// The key stands in the store with this value or a newer one of ours.
    Written { revision: i64 },
    /// The key is gone from the store.
    Forgotten,
    /// The key belongs to somebody else; it is not kept.
    Conflict,
    /// The key or its value is too long, or there are too many keys.
    OutOfBounds,
    /// The lease is lost for good; see the published state.
    Lost,
}

/// Why a lease is lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LostReason {
    /// The store does not know the lease any more. Registration is being won back.
    LeaseGone,
    /// One of our keys belongs to somebody else now. Final: the member must fence itself.
    Fenced {
        /// The key.
        key: String,
    },
    /// The member revoked its lease. Final.
    Revoked,
}

impl LostReason {
    /// No new lease follows.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::LeaseGone)
    }
}

impl fmt::Display for LostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LeaseGone => f.write_str("the store does not know the lease"),
            Self::Fenced { key } => write!(f, "{key} belongs to another member"),
            Self::Revoked => f.write_str("the lease was revoked"),
        }
    }
}

/// What the rest of the process sees of its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseState {
    /// The store answered, and all own keys stand under the lease.
    Alive {
        /// The lease.
        lease_id: i64,
        /// Revision of the transaction that last wrote own keys.
        revision: i64,
    },
    /// The store did not answer, or has not yet. Keep serving.
    Unknown {
        /// The lease, if one was granted.
        lease_id: Option<i64>,
        /// Time since the last answered call about the lease was sent (since the start of the
        /// keeper, before the first), as of this publication.
        age: Duration,
    },
    /// The store said that the lease is gone, or the member left.
    Lost {
        /// Why.
        reason: LostReason,
    },
}
