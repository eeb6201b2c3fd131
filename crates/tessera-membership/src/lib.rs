//! How a process is a member of a cluster: the client path to etcd, and a small store that speaks the
//! same wire for clusters of one machine. The only crate that names etcd-client.
//!
//! Invariants
//! - One client path. The embedded store is reached over the same wire as etcd and passes the same
//!   contract tests.
//! - No call hangs, no watch ends, and a store that is down is *unknown*, never *lost* (CLUSTER §4).
//! - Everything is bounded: keys, bytes, history, leases, watchers, queues, calls in time.
//! - etcd-client's types do not leave this crate.
//!
//! Modules: [`url`] (where the store is), [`store`] (calls) over [`kv`] (keys, comparisons,
//! transactions), [`watch`] (a prefix followed for ever), [`registration`] (a member's keys under a
//! lease, on a thread of its own), [`embedded`] (the store itself), [`config`], [`error`].

pub mod config;
pub mod embedded;
mod endpoints;
pub mod error;
pub mod kv;
mod lease_calls;
pub mod registration;
pub mod store;
pub mod url;
pub mod watch;

pub use config::{EmbeddedConfig, StoreConfig, WatchConfig};
pub use embedded::EmbeddedStore;
pub use error::{EmbeddedError, RegistrationError, StoreError};
pub use kv::{Compare, KeyValue, Op, OpOutcome, PrefixSnapshot, Txn, TxnOutcome};
pub use registration::{Membership, Registration};
pub use store::{GrantedLease, Store};
pub use tessera_cluster::lease_keeper::{LeaseKeeperConfig, LeaseState, LostReason};
pub use url::{ClusterAddress, MembershipUrl, MembershipUrlError, StoreEndpoint};
pub use watch::{Change, PrefixWatch, WatchEvent};

/// A seed for jitter, different in every process and call. It decides nothing but pauses.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library keys its hash maps from the system's random source.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
