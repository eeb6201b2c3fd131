//! Keys, values, comparisons and transactions in Tessera's own words. etcd-client's types stop here.

use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn as EtcdTxn,
    TxnOp, TxnOpResponse,
    proto::{PbKeyValue, PbTxnResponse},
};

use crate::error::StoreError;

/// One key as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key. Tessera's keys are text; others are not shown.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// Revision of the last write.
    pub mod_revision: i64,
    /// Revision of the write that created the key.
    pub create_revision: i64,
    /// The lease the key hangs on; 0 for none.
    pub lease: i64,
}

impl KeyValue {
    /// `None`, with a warning, if the key is not text and so not one of ours.
    pub(crate) fn from_wire(kv: PbKeyValue) -> Option<Self> {
        match String::from_utf8(kv.key) {
            Ok(key) => Some(Self {
                key,
                value: kv.value,
                mod_revision: kv.mod_revision,
                create_revision: kv.create_revision,
                lease: kv.lease,
            }),
            Err(error) => {
                tracing::warn!(key = %String::from_utf8_lossy(error.as_bytes()), "ignoring a key that is not text");
                None
            }
        }
    }
}

/// All keys under a prefix at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixSnapshot {
    /// The revision.
    pub revision: i64,
    /// The keys, ascending.
    pub entries: Vec<KeyValue>,
}

/// One condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent { key: String },
    /// The key exists.
    Exists { key: String },
    /// The key exists with exactly this value.
    ValueIs { key: String, value: Vec<u8> },
    /// The key was last written at this revision (0: it does not exist).
    ModRevisionIs { key: String, revision: i64 },
    /// The key was created at this revision (0: it does not exist).
    CreateRevisionIs { key: String, revision: i64 },
    /// The key hangs on this lease (0: on none, or it does not exist).
    LeaseIs { key: String, lease_id: i64 },
}

impl Compare {
    /// The key does not exist.
    pub fn absent(key: impl Into<String>) -> Self {
        Self::Absent { key: key.into() }
    }

    /// The key exists.
    pub fn exists(key: impl Into<String>) -> Self {
        Self::Exists { key: key.into() }
    }

    /// The key exists with exactly this value.
    pub fn value_is(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::ValueIs { key: key.into(), value: value.into() }
    }

    /// The key was last written at this revision (0: it does not exist).
    pub fn mod_revision_is(key: impl Into<String>, revision: i64) -> Self {
        Self::ModRevisionIs { key: key.into(), revision }
    }

    /// The key was created at this revision (0: it does not exist).
    pub fn create_revision_is(key: impl Into<String>, revision: i64) -> Self {
        Self::CreateRevisionIs { key: key.into(), revision }
    }

    /// The key hangs on this lease.
    pub fn lease_is(key: impl Into<String>, lease_id: i64) -> Self {
        Self::LeaseIs { key: key.into(), lease_id }
    }

    fn into_wire(self) -> EtcdCompare {
        match self {
            Self::Absent { key } => EtcdCompare::create_revision(key, CompareOp::Equal, 0),
            Self::Exists { key } => EtcdCompare::create_revision(key, CompareOp::Greater, 0),
            Self::ValueIs { key, value } => EtcdCompare::value(key, CompareOp::Equal, value),
            Self::ModRevisionIs { key, revision } => {
                EtcdCompare::mod_revision(key, CompareOp::Equal, revision)
            }
            Self::CreateRevisionIs { key, revision } => {
                EtcdCompare::create_revision(key, CompareOp::Equal, revision)
            }
            Self::LeaseIs { key, lease_id } => EtcdCompare::lease(key, CompareOp::Equal, lease_id),
        }
    }
}

/// One operation of a transaction. A transaction may write a key at most once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Write a key, under a lease if `lease_id` is not 0.
    Put { key: String, value: Vec<u8>, lease_id: i64 },
    /// Read a key.
    Get { key: String },
    /// Read all keys under a prefix.
    GetPrefix { prefix: String },
    /// Delete a key.
    Delete { key: String },
    /// Delete all keys under a prefix.
    DeletePrefix { prefix: String },
}

impl Op {
    /// Write a key without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::put_leased(key, value, 0)
    }

    /// Write a key under a lease.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Vec<u8>>, lease_id: i64) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease_id }
    }

    /// Read a key.
    pub fn get(key: impl Into<String>) -> Self {
        Self::Get { key: key.into() }
    }

    /// Read all keys under a prefix.
    pub fn get_prefix(prefix: impl Into<String>) -> Self {
        Self::GetPrefix { prefix: prefix.into() }
    }

    /// Delete a key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// Delete all keys under a prefix.
    pub fn delete_prefix(prefix: impl Into<String>) -> Self {
        Self::DeletePrefix { prefix: prefix.into() }
    }

    fn into_wire(self) -> TxnOp {
        match self {
            Self::Put { key, value, lease_id } => {
                TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease_id)))
            }
            Self::Get { key } => TxnOp::get(key, None),
            Self::GetPrefix { prefix } => TxnOp::get(prefix, Some(GetOptions::new().with_prefix())),
            Self::Delete { key } => TxnOp::delete(key, None),
            Self::DeletePrefix { prefix } => {
                TxnOp::delete(prefix, Some(DeleteOptions::new().with_prefix()))
            }
        }
    }
}

/// If every condition holds, `then` is done, else `otherwise`; all of it at one revision. At most 128
/// conditions and operations of each kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions, all of which must hold.
    pub when: Vec<Compare>,
    /// Done if they hold.
    pub then: Vec<Op>,
    /// Done if they do not.
    pub otherwise: Vec<Op>,
}

impl Txn {
    /// A transaction under these conditions.
    pub fn when(conditions: impl Into<Vec<Compare>>) -> Self {
        Self { when: conditions.into(), ..Self::default() }
    }

    /// Done if the conditions hold.
    #[must_use]
    pub fn then(mut self, ops: impl Into<Vec<Op>>) -> Self {
        self.then = ops.into();
        self
    }

    /// Done if the conditions do not hold.
    #[must_use]
    pub fn otherwise(mut self, ops: impl Into<Vec<Op>>) -> Self {
        self.otherwise = ops.into();
        self
    }

    pub(crate) fn into_wire(self) -> EtcdTxn {
        let ops = |ops: Vec<Op>| ops.into_iter().map(Op::into_wire).collect::<Vec<_>>();
        let when: Vec<_> = self.when.into_iter().map(Compare::into_wire).collect();
        EtcdTxn::new().when(when).and_then(ops(self.then)).or_else(ops(self.otherwise))
    }
}

/// What one operation of a transaction gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpOutcome {
    /// The key was written.
    Put,
    /// What was read, ascending.
    Entries(Vec<KeyValue>),
    /// So many keys were deleted.
    Deleted(u64),
}

/// How a transaction went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnOutcome {
    /// The conditions held.
    pub succeeded: bool,
    /// Revision of the store after the transaction; if it wrote, the revision of its writes.
    pub revision: i64,
    /// One outcome per operation that was done, in order.
    pub outcomes: Vec<OpOutcome>,
}

impl TxnOutcome {
    pub(crate) fn from_wire(response: etcd_client::TxnResponse) -> Result<Self, StoreError> {
        let against =
            |detail: &str| StoreError::Protocol { call: "txn", detail: detail.to_owned() };
        let PbTxnResponse { header, responses, .. } = &response.0;
        let revision = header.as_ref().ok_or_else(|| against("no header"))?.revision;
        // `op_responses` panics on an empty answer, which is the store's fault and not ours.
        if responses.iter().any(|r| r.response.is_none()) {
            return Err(against("an operation has no response"));
        }
        let outcomes = response.op_responses().into_iter().map(|op| match op {
            TxnOpResponse::Put(_) => Ok(OpOutcome::Put),
            TxnOpResponse::Get(get) => Ok(OpOutcome::Entries(
                get.0.kvs.into_iter().filter_map(KeyValue::from_wire).collect(),
            )),
            TxnOpResponse::Delete(delete) => {
                Ok(OpOutcome::Deleted(delete.0.deleted.unsigned_abs()))
            }
            TxnOpResponse::Txn(_) => Err(against("an answer to a nested transaction")),
        });
        Ok(Self {
            succeeded: response.succeeded(),
            revision,
            outcomes: outcomes.collect::<Result<_, _>>()?,
        })
    }

    /// All keys that the transaction's reads returned, in order.
    pub fn into_entries(self) -> Vec<KeyValue> {
        let entries = self.outcomes.into_iter().filter_map(|outcome| match outcome {
            OpOutcome::Entries(entries) => Some(entries),
            OpOutcome::Put | OpOutcome::Deleted(_) => None,
        });
        entries.flatten().collect()
    }
}
