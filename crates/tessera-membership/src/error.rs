//! What can go wrong between a member and the store.

use std::time::Duration;

use tessera_cluster::lease_keeper::LostReason;

use crate::kv::KeyValue;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Failure of one call to the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store did not answer, or answered that it cannot now. Whether a write took effect is
    /// unknown.
    #[error("the store is unavailable ({call})")]
    Unavailable {
        /// The call.
        call: &'static str,
        /// What the transport or the store said.
        #[source]
        source: BoxError,
    },
    /// No answer in time. Whether a write took effect is unknown.
    #[error("the store did not answer {call} within {after:?}")]
    TimedOut {
        /// The call.
        call: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The store understood the call and refused it. Nothing was written.
    #[error("the store refused {call} with {code}: {message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// gRPC status code.
        code: String,
        /// The store's words.
        message: String,
    },
    /// The key does not exist.
    #[error("key {key} does not exist")]
    NotFound {
        /// The key.
        key: String,
    },
    /// The lease does not exist (any more).
    #[error("lease {lease_id:x} does not exist")]
    LeaseNotFound {
        /// The lease; 0 where the call names none.
        lease_id: i64,
    },
    /// A comparison did not hold. Nothing was written.
    #[error("key {key} is not as expected")]
    CompareFailed {
        /// The key that was compared.
        key: String,
        /// What stands there now; `None` if nothing does.
        current: Option<Box<KeyValue>>,
    },
    /// History up to this revision is gone.
    #[error("the store has compacted the revision asked for ({call})")]
    Compacted {
        /// The call.
        call: &'static str,
    },
    /// More keys than a view may hold.
    #[error("prefix {prefix} holds more than {limit} keys")]
    TooManyKeys {
        /// The prefix.
        prefix: String,
        /// The bound.
        limit: usize,
    },
    /// The store's answer does not follow the protocol.
    #[error("the store answered {call} against the protocol: {detail}")]
    Protocol {
        /// The call.
        call: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// A setting is out of range.
    #[error("setting {field} is out of range: {detail}")]
    InvalidConfig {
        /// The setting.
        field: &'static str,
        /// What it must be.
        detail: &'static str,
    },
    /// An endpoint is not usable as a URL.
    #[error("store endpoint {endpoint} is unusable")]
    InvalidEndpoint {
        /// The endpoint.
        endpoint: String,
        /// Why.
        #[source]
        source: BoxError,
    },
}

impl StoreError {
    /// Nothing is known about the outcome: the store is down, cut off, or slow. Try again later.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::TimedOut { .. })
    }
}

/// Failure of a registration or of a request to it.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// The lease is lost for good.
    #[error("the registration is over: {reason}")]
    Lost {
        /// Why.
        reason: LostReason,
    },
    /// The key belongs to somebody else.
    #[error("key {key} belongs to another member")]
    Conflict {
        /// The key.
        key: String,
    },
    /// The key was forgotten before it was written.
    #[error("key {key} was forgotten before it was written")]
    Forgotten {
        /// The key.
        key: String,
    },
    /// The key or value is too long, there are too many, or the key is the member's own.
    #[error("key {key} exceeds the bounds of leased keys")]
    OutOfBounds {
        /// The key.
        key: String,
    },
    /// Too many requests wait for the store already.
    #[error("{limit} requests already wait for the store")]
    TooManyPending {
        /// The bound.
        limit: usize,
    },
    /// The lease thread ended; the log says why.
    #[error("the lease thread has ended")]
    KeeperStopped,
    /// The lease's settings are out of range.
    #[error("lease settings are invalid")]
    InvalidLease(#[source] tessera_cluster::ClusterError),
    /// The store's settings are out of range.
    #[error("store settings are invalid")]
    InvalidStore(#[source] StoreError),
    /// The lease thread could not be started.
    #[error("cannot start the lease thread")]
    SpawnThread(#[source] std::io::Error),
}

/// Failure to run an embedded store.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: std::net::SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The listener has no address.
    #[error("cannot read the address of the listener")]
    LocalAddr(#[source] std::io::Error),
}
