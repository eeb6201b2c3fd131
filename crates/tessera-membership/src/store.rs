//! The one client path to the store, used by every role for etcd and for the embedded store alike.
//!
//!
//! No call hangs: each is bounded by `call_timeout`, over all endpoints tried; see the module
//! `endpoints` for when a call is tried again.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, GetOptions, PutOptions};

use crate::config::StoreConfig;
use crate::endpoints::{Endpoints, Retry};
use crate::error::StoreError;
use crate::kv::{Compare, KeyValue, Op, PrefixSnapshot, Txn, TxnOutcome};
use crate::watch::{PrefixWatch, watch_prefix};

/// Most keys a listing may return.
pub const MAX_PREFIX_KEYS: usize = 100_000;
/// Keys per page of a listing. Pages with large values are read in smaller ones.
const MAX_PAGE_KEYS: i64 = 512;
/// How often a listing begins anew when the revision it reads at is compacted away.
const MAX_LIST_TRIES: usize = 3;

/// A handle to the store. Cheap to clone. Must be created and used inside a tokio runtime.
#[derive(Clone)]
pub struct Store {
    endpoints: Arc<Endpoints>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("endpoints", &self.endpoints.urls()).finish_non_exhaustive()
    }
}

/// Which store answered and at which revision it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub cluster_id: u64,
    pub revision: i64,
}

/// A lease as granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantedLease {
    /// Its id.
    pub lease_id: i64,
    /// TTL that the store chose, at least the one asked for.
    pub ttl: Duration,
}

impl Store {
    /// Prepares clients for all endpoints. Opens no connection: the first call does, and a store
    /// that is down shows there.
    ///
    /// Errors: settings out of range, an endpoint that is no URL.
    pub async fn connect(config: StoreConfig) -> Result<Self, StoreError> {
        config.validate()?;
        Ok(Self { endpoints: Arc::new(Endpoints::new(config).await?) })
    }

    /// The settings this store was connected with.
    pub fn config(&self) -> &StoreConfig {
        self.endpoints.config()
    }

    /// Reads one key, linearizably.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let response = self
            .call("get", Retry::Always, |mut client| {
                let key = key.to_owned();
                async move { client.get(key, None).await }
            })
            .await?;
        Ok(response.0.kvs.into_iter().find_map(KeyValue::from_wire))
    }

    /// Reads one key that must exist.
    pub async fn get_existing(&self, key: &str) -> Result<KeyValue, StoreError> {
        let found = self.get(key).await?;
        found.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })
    }

    /// Reads all keys under a prefix, all at one revision. At most [`MAX_PREFIX_KEYS`].
    pub async fn get_prefix(&self, prefix: &str) -> Result<PrefixSnapshot, StoreError> {
        Ok(self.list(prefix).await?.1)
    }

    pub(crate) async fn list(
        &self,
        prefix: &str,
    ) -> Result<(Position, PrefixSnapshot), StoreError> {
        let mut tries = 1;
        loop {
            match self.list_once(prefix).await {
                Err(StoreError::Compacted { .. }) if tries < MAX_LIST_TRIES => tries += 1,
                result => return result,
            }
        }
    }

    async fn list_once(&self, prefix: &str) -> Result<(Position, PrefixSnapshot), StoreError> {
        let mut position: Option<Position> = None;
        let mut entries = Vec::new();
        let mut from = range_start(prefix);
        let end = range_end(prefix);
        let mut page_keys = MAX_PAGE_KEYS;
        loop {
            let revision = position.map_or(0, |p| p.revision);
            let result = self
                .call("get prefix", Retry::Always, |mut client| {
                    let options = GetOptions::new()
                        .with_range(end.clone())
                        .with_limit(page_keys)
                        .with_revision(revision);
                    let from = from.clone();
                    async move { client.get(from, Some(options)).await }
                })
                .await;
            let page = match result {
                Ok(response) => response.0,
                // The transport refuses a page of more than 4 MiB.
                Err(StoreError::Refused { code, .. }) if code == "OutOfRange" && page_keys > 1 => {
                    page_keys /= 8;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let at = position_of("get prefix", page.header)?;
            let position = *position.get_or_insert(at);
            if let Some(last) = page.kvs.last() {
                // The smallest key above the last one of the page.
                from = last.key.clone();
                from.push(0);
            }
            let is_last = !page.more || page.kvs.is_empty();
            entries.extend(page.kvs.into_iter().filter_map(KeyValue::from_wire));
            if entries.len() > MAX_PREFIX_KEYS {
                return Err(StoreError::TooManyKeys {
                    prefix: prefix.to_owned(),
                    limit: MAX_PREFIX_KEYS,
                });
            }
            if is_last {
                let revision = position.revision;
                return Ok((position, PrefixSnapshot { revision, entries }));
            }
        }
    }

    /// The store's identity and current revision, read linearizably.
    pub(crate) async fn position(&self) -> Result<Position, StoreError> {
        let response = self
            .call("get position", Retry::Always, |mut client| async move {
                let options = GetOptions::new().with_count_only();
                client.get("tessera", Some(options)).await
            })
            .await?;
        position_of("get position", response.0.header)
    }

    /// Writes one key, under a lease if one is given. Returns the revision.
    pub async fn put(
        &self,
        key: &str,
        value: impl Into<Vec<u8>>,
        lease_id: Option<i64>,
    ) -> Result<i64, StoreError> {
        let value = value.into();
        let lease_id = lease_id.unwrap_or(0);
        let response = self
            .call("put", Retry::IfUnsent, |mut client| {
                let (key, value) = (key.to_owned(), value.clone());
                let options = PutOptions::new().with_lease(lease_id);
                async move { client.put(key, value, Some(options)).await }
            })
            .await
            .map_err(|error| error.with_lease(lease_id))?;
        Ok(position_of("put", response.0.header)?.revision)
    }

    /// Deletes one key; tells whether it existed.
    pub async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let response = self
            .call("delete", Retry::IfUnsent, |mut client| {
                let key = key.to_owned();
                async move { client.delete(key, None).await }
            })
            .await?;
        Ok(response.deleted() > 0)
    }

    /// Runs a transaction. That its conditions do not hold is an outcome, not an error.
    pub async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let txn = txn.into_wire();
        let response = self
            .call("txn", Retry::IfUnsent, |mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await?;
        TxnOutcome::from_wire(response)
    }

    /// Writes a key that must not exist yet. Returns the revision.
    ///
    /// Errors: [`StoreError::CompareFailed`] with what stands there.
    pub async fn create(
        &self,
        key: &str,
        value: impl Into<Vec<u8>>,
        lease_id: Option<i64>,
    ) -> Result<i64, StoreError> {
        self.replace(key, 0, value, lease_id).await
    }

    /// Writes a key that must have been written last at `mod_revision` (0: must not exist). Returns
    /// the revision.
    ///
    /// Errors: [`StoreError::CompareFailed`] with what stands there.
    pub async fn replace(
        &self,
        key: &str,
        mod_revision: i64,
        value: impl Into<Vec<u8>>,
        lease_id: Option<i64>,
    ) -> Result<i64, StoreError> {
        let txn = Txn::when([Compare::mod_revision_is(key, mod_revision)])
            .then([Op::put_leased(key, value, lease_id.unwrap_or(0))])
            .otherwise([Op::get(key)]);
        let outcome =
            self.txn(txn).await.map_err(|error| error.with_lease(lease_id.unwrap_or(0)))?;
        if outcome.succeeded {
            return Ok(outcome.revision);
        }
        Err(StoreError::CompareFailed {
            key: key.to_owned(),
            current: outcome.into_entries().pop().map(Box::new),
        })
    }

    /// Drops history before `revision`. For operators and tests; etcd is usually set to do it itself.
    pub async fn compact(&self, revision: i64) -> Result<(), StoreError> {
        self.call("compact", Retry::IfUnsent, |mut client| async move {
            client.compact(revision, None).await
        })
        .await
        .map(drop)
    }

    /// Grants a lease. TTLs are whole seconds on the wire; this one is rounded up.
    pub async fn lease_grant(&self, ttl: Duration) -> Result<GrantedLease, StoreError> {
        self.lease_grant_within(ttl, self.config().call_timeout).await
    }

    pub(crate) async fn lease_grant_within(
        &self,
        ttl: Duration,
        limit: Duration,
    ) -> Result<GrantedLease, StoreError> {
        let seconds = ttl.as_secs() as i64 + i64::from(ttl.subsec_nanos() > 0);
        let response = self
            .endpoints
            .call(limit, "lease grant", Retry::IfUnsent, |client| async move {
                client.lease_client().grant(seconds, None).await
            })
            .await?;
        Ok(GrantedLease {
            lease_id: response.id(),
            ttl: seconds_to_duration("lease grant", response.ttl())?,
        })
    }

    /// Renews a lease once. Returns the TTL it has again.
    ///
    /// Errors: [`StoreError::LeaseNotFound`] if the store is certain that it is gone.
    pub async fn lease_keep_alive(&self, lease_id: i64) -> Result<Duration, StoreError> {
        self.lease_keep_alive_within(lease_id, self.config().call_timeout).await
    }

    /// One stream per renewal, as etcd's own `KeepAliveOnce` does: a long stream can die half open,
    /// and an answer on it cannot be told from an older one.
    pub(crate) async fn lease_keep_alive_within(
        &self,
        lease_id: i64,
        limit: Duration,
    ) -> Result<Duration, StoreError> {
        // The first answer is taken by etcd-client, which checks that its TTL is above zero and
        // drops it; the second answer carries the TTL.
        let ttl = self
            .endpoints
            .call(limit, "lease keepalive", Retry::Always, |client| async move {
                let (mut keeper, mut answers) = client.lease_client().keep_alive(lease_id).await?;
                keeper.keep_alive().await?;
                Ok(answers.message().await?.map(|answer| answer.ttl()))
            })
            .await
            .map_err(|error| error.with_lease(lease_id))?;
        match ttl {
            Some(ttl) if ttl <= 0 => Err(StoreError::LeaseNotFound { lease_id }),
            Some(ttl) => seconds_to_duration("lease keepalive", ttl),
            None => Err(StoreError::Unavailable {
                call: "lease keepalive",
                source: "the stream ended".into(),
            }),
        }
    }

    /// Revokes a lease; its keys go with it.
    pub async fn lease_revoke(&self, lease_id: i64) -> Result<(), StoreError> {
        self.lease_revoke_within(lease_id, self.config().call_timeout).await
    }

    pub(crate) async fn lease_revoke_within(
        &self,
        lease_id: i64,
        limit: Duration,
    ) -> Result<(), StoreError> {
        self.endpoints
            .call(limit, "lease revoke", Retry::IfUnsent, |client| async move {
                client.lease_client().revoke(lease_id).await
            })
            .await
            .map(drop)
            .map_err(|error| error.with_lease(lease_id))
    }

    /// Time a lease has left; `None` if the store does not know it.
    pub async fn lease_time_to_live(&self, lease_id: i64) -> Result<Option<Duration>, StoreError> {
        let response = self
            .call("lease time to live", Retry::Always, |client| async move {
                client.lease_client().time_to_live(lease_id, None).await
            })
            .await?;
        match response.ttl() {
            ttl if ttl < 0 => Ok(None),
            ttl => seconds_to_duration("lease time to live", ttl).map(Some),
        }
    }

    /// Watches all keys under a prefix. See [`PrefixWatch`].
    pub fn watch_prefix(&self, prefix: impl Into<String>) -> PrefixWatch {
        watch_prefix(self.clone(), prefix.into())
    }

    pub(crate) fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    async fn call<T, F, Fut>(
        &self,
        name: &'static str,
        retry: Retry,
        send: F,
    ) -> Result<T, StoreError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.endpoints.call(self.config().call_timeout, name, retry, send).await
    }
}

/// etcd has no empty key; a range that begins with "\0" holds all.
fn range_start(prefix: &str) -> Vec<u8> {
    match prefix.as_bytes() {
        [] => vec![0],
        bytes => bytes.to_vec(),
    }
}

/// The smallest key above all keys with the prefix; "\0" means that there is none.
fn range_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

pub(crate) fn position_of(
    call: &'static str,
    header: Option<etcd_client::proto::PbResponseHeader>,
) -> Result<Position, StoreError> {
    let header =
        header.ok_or_else(|| StoreError::Protocol { call, detail: "no header".to_owned() })?;
    Ok(Position { cluster_id: header.cluster_id, revision: header.revision })
}

fn seconds_to_duration(call: &'static str, seconds: i64) -> Result<Duration, StoreError> {
    u64::try_from(seconds)
        .map(Duration::from_secs)
        .map_err(|_| StoreError::Protocol { call, detail: format!("a TTL of {seconds} s") })
}

impl StoreError {
    /// etcd's answer does not name the lease; the caller does.
    fn with_lease(self, lease_id: i64) -> Self {
        match self {
            Self::LeaseNotFound { .. } => Self::LeaseNotFound { lease_id },
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_range_holds_the_prefix_and_nothing_else() {
        assert_eq!(range_end("a/"), b"a0");
        assert_eq!(range_end(""), [0]);
        assert_eq!(range_start(""), [0]);
        assert_eq!(range_end("é"), [0xc3, 0xaa]);
    }
}
