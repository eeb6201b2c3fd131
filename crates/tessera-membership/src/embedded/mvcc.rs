//! The embedded store's state machine: keys, revisions, transactions, leases. No I/O and no clock;
//! time is passed in. It speaks etcd's own request and response messages, and behaves as etcd does,
//! compared by the contract tests.
//!
//! Invariants
//! - A request that is refused changes nothing.
//! - All changes of one request, and all keys of one lost lease, have one revision.
//! - The revision grows by one with each change, and by nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::EventType;
use etcd_client::proto::{
    PbCompactionRequest, PbDeleteRequest, PbDeleteResponse, PbKeyValue, PbPutRequest,
    PbPutResponse, PbRangeRequest, PbRangeResponse, PbResponseHeader, PbResponseOp, PbTxnOpRequest,
    PbTxnOpResponse, PbTxnRequest, PbTxnRequestOp, PbTxnResponse,
};

use super::compare::holds;
use super::history::{History, StoredEvent};
use super::lease::LeaseBook;
use super::range::KeyRange;
use super::read::read_range;
use super::refusal::Refusal;
use crate::config::EmbeddedConfig;

type Keys = BTreeMap<Vec<u8>, Arc<PbKeyValue>>;

/// See the module's documentation.
#[derive(Debug)]
pub struct MvccStore {
    config: EmbeddedConfig,
    cluster_id: u64,
    revision: i64,
    keys: Keys,
    key_bytes: usize,
    history: History,
    leases: LeaseBook,
}

/// Changes of the request that is being applied.
#[derive(Debug, Default)]
struct Pending {
    events: Vec<StoredEvent>,
}

impl MvccStore {
    /// An empty store. `identity` tells it from other stores: clients compare it, and lease ids are
    /// derived from it.
    pub fn new(config: EmbeddedConfig, identity: u64) -> Self {
        // Leases of an earlier store in the same place must not be taken for ours.
        let first_lease = (identity >> 1) as i64 & !0xffff;
        Self {
            cluster_id: identity,
            revision: 1,
            keys: Keys::new(),
            key_bytes: 0,
            history: History::new(config.max_history_events, config.max_history_bytes),
            leases: LeaseBook::new(&config, first_lease),
            config,
        }
    }

    /// The bounds of this store.
    pub fn config(&self) -> &EmbeddedConfig {
        &self.config
    }

    /// Revision of the last change; 1 before the first.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The kept events.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The leases, to read.
    pub fn leases(&self) -> &LeaseBook {
        &self.leases
    }

    /// Header of a response at the current revision.
    pub fn header(&self) -> PbResponseHeader {
        PbResponseHeader {
            cluster_id: self.cluster_id,
            member_id: self.cluster_id,
            revision: self.revision,
            raft_term: 1,
        }
    }

    /// Reads a range, now or at a past revision.
    pub fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
        check_key(&request.key)?;
        self.check_readable(request.revision)?;
        Ok(self.read(request))
    }

    fn check_readable(&self, revision: i64) -> Result<(), Refusal> {
        if revision > self.revision {
            return Err(Refusal::FutureRevision);
        }
        if revision > 0 && revision < self.history.compact_revision() {
            return Err(Refusal::Compacted);
        }
        Ok(())
    }

    fn read(&self, request: &PbRangeRequest) -> PbRangeResponse {
        let range = KeyRange::new(&request.key, &request.range_end);
        let is_past = request.revision > 0 && request.revision < self.revision;
        let standing = if is_past {
            self.range_at(&range, request.revision)
        } else {
            let entries = self.keys.range::<[u8], _>(range.bounds());
            entries.map(|(_, kv)| kv.clone()).collect()
        };
        PbRangeResponse { header: Some(self.header()), ..read_range(request, standing) }
    }

    /// The range as it stood at a past revision: the present with everything since then undone.
    fn range_at(&self, range: &KeyRange, revision: i64) -> Vec<Arc<PbKeyValue>> {
        let present = self.keys.range::<[u8], _>(range.bounds());
        let mut standing: Keys = present.map(|(key, kv)| (key.clone(), kv.clone())).collect();
        for entry in self.history.since(revision + 1).rev() {
            for event in &entry.events {
                if range.contains(&event.kv.key) {
                    match &event.prev {
                        Some(prev) => standing.insert(prev.key.clone(), prev.clone()),
                        None => standing.remove(&event.kv.key),
                    };
                }
            }
        }
        standing.into_values().collect()
    }

    /// Writes one key.
    pub fn put(&mut self, request: PbPutRequest) -> Result<PbPutResponse, Refusal> {
        let op = PbTxnOpRequest::RequestPut(request);
        match self.apply_one(op)? {
            PbTxnOpResponse::ResponsePut(response) => Ok(response),
            _ => unreachable!("a put answers as a put"),
        }
    }

    /// Deletes a range.
    pub fn delete_range(&mut self, request: PbDeleteRequest) -> Result<PbDeleteResponse, Refusal> {
        let op = PbTxnOpRequest::RequestDeleteRange(request);
        match self.apply_one(op)? {
            PbTxnOpResponse::ResponseDeleteRange(response) => Ok(response),
            _ => unreachable!("a delete answers as a delete"),
        }
    }

    fn apply_one(&mut self, op: PbTxnOpRequest) -> Result<PbTxnOpResponse, Refusal> {
        let ops = vec![PbTxnRequestOp { request: Some(op) }];
        let mut responses = self.apply(ops)?;
        let response = responses.pop().and_then(|op| op.response);
        Ok(response.expect("every operation has its response"))
    }

    /// Runs a transaction.
    pub fn txn(&mut self, request: PbTxnRequest) -> Result<PbTxnResponse, Refusal> {
        let max_ops = self.config.max_txn_ops;
        if [request.compare.len(), request.success.len(), request.failure.len()]
            .iter()
            .any(|num_ops| *num_ops > max_ops)
        {
            return Err(Refusal::TooManyOps);
        }
        let mut succeeded = true;
        for compare in &request.compare {
            check_key(&compare.key)?;
            succeeded &= holds(compare, &self.keys)?;
        }
        // Both branches must be sound, whichever is taken.
        check_ops(&request.success)?;
        check_ops(&request.failure)?;
        let ops = if succeeded { request.success } else { request.failure };
        let responses = self.apply(ops)?;
        Ok(PbTxnResponse { header: Some(self.header()), succeeded, responses })
    }

    /// Applies operations at one revision, all or none.
    fn apply(&mut self, ops: Vec<PbTxnRequestOp>) -> Result<Vec<PbResponseOp>, Refusal> {
        check_ops(&ops)?;
        self.check_state(&ops)?;
        let mut pending = Pending::default();
        let mut responses: Vec<PbTxnOpResponse> = Vec::with_capacity(ops.len());
        for op in ops.into_iter().filter_map(|op| op.request) {
            responses.push(match op {
                PbTxnOpRequest::RequestPut(put) => {
                    PbTxnOpResponse::ResponsePut(self.apply_put(put, &mut pending))
                }
                PbTxnOpRequest::RequestDeleteRange(delete) => {
                    PbTxnOpResponse::ResponseDeleteRange(self.apply_delete(&delete, &mut pending))
                }
                PbTxnOpRequest::RequestRange(range) => {
                    PbTxnOpResponse::ResponseRange(self.read(&range))
                }
                PbTxnOpRequest::RequestTxn(_) => unreachable!("refused by check_ops"),
            });
        }
        self.commit(pending);
        let header = self.header();
        let with_header = |response| PbResponseOp { response: Some(set_header(response, header)) };
        Ok(responses.into_iter().map(with_header).collect())
    }

    /// What can only be refused while looking at the state. After this nothing fails.
    fn check_state(&self, ops: &[PbTxnRequestOp]) -> Result<(), Refusal> {
        let mut request_bytes = 0;
        let mut grown_bytes = 0;
        let mut grown_keys = 0;
        for op in ops.iter().filter_map(|op| op.request.as_ref()) {
            match op {
                PbTxnOpRequest::RequestPut(put) => {
                    let standing = self.keys.get(&put.key);
                    if (put.ignore_value || put.ignore_lease) && standing.is_none() {
                        return Err(Refusal::KeyNotFound);
                    }
                    if put.lease != 0 && !self.leases.exists(put.lease) {
                        return Err(Refusal::LeaseNotFound);
                    }
                    request_bytes += put.key.len() + put.value.len();
                    match standing {
                        Some(kv) => grown_bytes += put.value.len().saturating_sub(kv.value.len()),
                        None => {
                            grown_keys += 1;
                            grown_bytes += put.key.len() + put.value.len();
                        }
                    }
                }
                PbTxnOpRequest::RequestRange(range) => self.check_readable(range.revision)?,
                PbTxnOpRequest::RequestDeleteRange(_) | PbTxnOpRequest::RequestTxn(_) => {}
            }
        }
        if request_bytes > self.config.max_request_bytes {
            return Err(Refusal::RequestTooLarge);
        }
        let has_room = self.keys.len() + grown_keys <= self.config.max_keys
            && self.key_bytes + grown_bytes <= self.config.max_bytes;
        if !has_room && grown_bytes > 0 {
            return Err(Refusal::NoSpace);
        }
        Ok(())
    }

    fn apply_put(&mut self, put: PbPutRequest, pending: &mut Pending) -> PbPutResponse {
        let revision = self.revision + 1;
        let prev = self.keys.get(&put.key).cloned();
        let value = match &prev {
            Some(prev) if put.ignore_value => prev.value.clone(),
            _ => put.value,
        };
        let lease = match &prev {
            Some(prev) if put.ignore_lease => prev.lease,
            _ => put.lease,
        };
        let kv = Arc::new(PbKeyValue {
            create_revision: prev.as_ref().map_or(revision, |prev| prev.create_revision),
            mod_revision: revision,
            version: prev.as_ref().map_or(1, |prev| prev.version + 1),
            key: put.key,
            value,
            lease,
        });
        let prev_lease = prev.as_ref().map_or(0, |prev| prev.lease);
        self.leases.attach(&kv.key, prev_lease, lease);
        if let Some(prev) = &prev {
            self.key_bytes -= prev.key.len() + prev.value.len();
        }
        self.key_bytes += kv.key.len() + kv.value.len();
        self.keys.insert(kv.key.clone(), kv.clone());
        let response = PbPutResponse {
            header: None,
            prev_kv: prev.as_deref().filter(|_| put.prev_kv).cloned(),
        };
        pending.events.push(StoredEvent { kv, prev, kind: EventType::Put });
        response
    }

    fn apply_delete(
        &mut self,
        delete: &PbDeleteRequest,
        pending: &mut Pending,
    ) -> PbDeleteResponse {
        let range = KeyRange::new(&delete.key, &delete.range_end);
        let keys = self.keys.range::<[u8], _>(range.bounds());
        let keys: Vec<Vec<u8>> = keys.map(|(key, _)| key.clone()).collect();
        let deleted = keys.len() as i64;
        let mut prev_kvs = Vec::new();
        for key in keys {
            let prev = self.remove_key(&key, pending);
            if delete.prev_kv {
                prev_kvs.extend(prev.as_deref().cloned());
            }
        }
        PbDeleteResponse { header: None, deleted, prev_kvs }
    }

    fn remove_key(&mut self, key: &[u8], pending: &mut Pending) -> Option<Arc<PbKeyValue>> {
        let prev = self.keys.remove(key)?;
        self.key_bytes -= prev.key.len() + prev.value.len();
        self.leases.attach(key, prev.lease, 0);
        let tombstone = PbKeyValue {
            key: key.to_vec(),
            mod_revision: self.revision + 1,
            ..PbKeyValue::default()
        };
        pending.events.push(StoredEvent {
            kv: Arc::new(tombstone),
            prev: Some(prev.clone()),
            kind: EventType::Delete,
        });
        Some(prev)
    }

    fn commit(&mut self, pending: Pending) {
        if !pending.events.is_empty() {
            self.revision += 1;
            self.history.push(self.revision, pending.events);
        }
    }

    /// Drops history before a revision.
    pub fn compact(&mut self, request: &PbCompactionRequest) -> Result<(), Refusal> {
        if request.revision > self.revision {
            return Err(Refusal::FutureRevision);
        }
        if request.revision <= self.history.compact_revision() {
            return Err(Refusal::Compacted);
        }
        self.history.compact(request.revision);
        Ok(())
    }

    /// Grants a lease; see [`LeaseBook::grant`].
    pub fn lease_grant(
        &mut self,
        id: i64,
        ttl_seconds: i64,
        now: Duration,
    ) -> Result<(i64, i64), Refusal> {
        self.leases.grant(id, ttl_seconds, now)
    }

    /// Renews a lease. Returns its TTL in seconds; `None` if it does not exist.
    pub fn lease_keep_alive(&mut self, id: i64, now: Duration) -> Option<i64> {
        self.leases.keep_alive(id, now)
    }

    /// Removes a lease and deletes its keys, at one revision.
    pub fn lease_revoke(&mut self, id: i64) -> Result<(), Refusal> {
        let keys = self.leases.remove(id).ok_or(Refusal::LeaseNotFound)?;
        let mut pending = Pending::default();
        for key in keys {
            self.remove_key(&key, &mut pending);
        }
        self.commit(pending);
        Ok(())
    }

    /// Revokes all leases whose time is over.
    pub fn expire_leases(&mut self, now: Duration) {
        for id in self.leases.expired(now) {
            self.lease_revoke(id).expect("an expired lease exists");
        }
    }

    /// Renews all leases: for the time that the store did not run.
    pub fn renew_leases(&mut self, now: Duration) {
        self.leases.renew_all(now);
    }
}

fn set_header(response: PbTxnOpResponse, header: PbResponseHeader) -> PbTxnOpResponse {
    let header = Some(header);
    match response {
        PbTxnOpResponse::ResponsePut(r) => {
            PbTxnOpResponse::ResponsePut(PbPutResponse { header, ..r })
        }
        PbTxnOpResponse::ResponseDeleteRange(r) => {
            PbTxnOpResponse::ResponseDeleteRange(PbDeleteResponse { header, ..r })
        }
        PbTxnOpResponse::ResponseRange(r) => {
            PbTxnOpResponse::ResponseRange(PbRangeResponse { header, ..r })
        }
        PbTxnOpResponse::ResponseTxn(r) => {
            PbTxnOpResponse::ResponseTxn(PbTxnResponse { header, ..r })
        }
    }
}

fn check_key(key: &[u8]) -> Result<(), Refusal> {
    match key {
        [] => Err(Refusal::EmptyKey),
        _ => Ok(()),
    }
}

/// What can be refused without looking at the state.
fn check_ops(ops: &[PbTxnRequestOp]) -> Result<(), Refusal> {
    let mut puts: Vec<&[u8]> = Vec::new();
    let mut deletes: Vec<KeyRange> = Vec::new();
    for op in ops {
        match &op.request {
            Some(PbTxnOpRequest::RequestPut(put)) => {
                check_key(&put.key)?;
                if put.ignore_value && !put.value.is_empty() {
                    return Err(Refusal::ValueProvided);
                }
                if put.ignore_lease && put.lease != 0 {
                    return Err(Refusal::LeaseProvided);
                }
                puts.push(&put.key);
            }
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                check_key(&delete.key)?;
                deletes.push(KeyRange::new(&delete.key, &delete.range_end));
            }
            Some(PbTxnOpRequest::RequestRange(range)) => check_key(&range.key)?,
            Some(PbTxnOpRequest::RequestTxn(_)) => {
                return Err(Refusal::Unsupported("a transaction inside a transaction"));
            }
            None => return Err(Refusal::Malformed("an operation without a request")),
        }
    }
    let is_deleted = |key: &&[u8]| deletes.iter().any(|range| range.contains(key));
    puts.sort_unstable();
    if puts.windows(2).any(|pair| pair[0] == pair[1]) || puts.iter().any(is_deleted) {
        return Err(Refusal::DuplicateKey);
    }
    Ok(())
}
