//! What goes into a formation machine and what comes out.

use std::time::Duration;

use tessera_types::{Epoch, InstanceId};

use crate::epoch_end::{EndReason, EpochEnd};
use crate::records::{ActiveRecord, EpochRecord, EpochSpec, IdRecord, MemberInfo, ReadyRecord};

/// What happened. Store events come in the order of the store's revisions.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The first full listing has been delivered; until then nothing is concluded from absence.
    Synced,
    MemberPut {
        member: Box<MemberInfo>,
        create_revision: i64,
        mod_revision: i64,
    },
    MemberDeleted {
        instance: InstanceId,
    },
    EpochPut {
        record: Box<EpochRecord>,
        mod_revision: i64,
    },
    ReadyPut {
        record: ReadyRecord,
        mod_revision: i64,
    },
    ReadyDeleted {
        epoch: Epoch,
        instance: InstanceId,
    },
    IdPut {
        record: IdRecord,
    },
    ActivePut {
        record: Box<ActiveRecord>,
        mod_revision: i64,
    },
    ActiveDeleted,
    /// Answer to `Propose`.
    Proposed {
        epoch: Epoch,
        outcome: TxnOutcome,
    },
    /// Answer to `Activate`.
    Activated {
        epoch: Epoch,
        outcome: TxnOutcome,
    },
    /// Answer to `MakeId`.
    IdMade {
        epoch: Epoch,
        id: Vec<u8>,
    },
    /// Answers to `InitCommunicator`.
    CommunicatorReady {
        epoch: Epoch,
    },
    CommunicatorFailed {
        epoch: Epoch,
        detail: String,
    },
    /// Answers to `RunCanary`.
    CanaryPassed {
        epoch: Epoch,
    },
    CanaryFailed {
        epoch: Epoch,
        detail: String,
    },
    /// The plan-stream machine of the epoch ended it.
    Ended(EpochEnd),
    /// Answer to `Leave`: nothing of the epoch runs any more.
    Left {
        epoch: Epoch,
    },
    /// Answer to `Probe`: whether that very instance answered.
    ProbeResult {
        instance: InstanceId,
        reachable: bool,
    },
    /// An operator allows the next proposal to share no member with the active epoch.
    Force,
    /// Leave and never join again.
    Retire,
    Tick,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnOutcome {
    Committed,
    /// A compare failed; nothing was written.
    Conflict,
    /// No answer: it may or may not have been written.
    Unknown,
}

/// A condition of a transaction: the key's revision of last change; 0 means that it does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    pub key: String,
    pub mod_revision: i64,
}

/// What to do. Actions that write to the store are repeated until the write is seen.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Write the epoch record if all compares hold.
    Propose { record: Box<EpochRecord>, compares: Vec<Compare> },
    /// Write our own member record again with this `last_epoch`, under the same lease.
    PublishLastEpoch { epoch: Epoch },
    /// Make the communicator id of the epoch (rank 0 only).
    MakeId { epoch: Epoch },
    /// Create the id key under our lease, if it does not exist.
    PutId { record: IdRecord },
    /// Make the communicator; answer before `deadline`. Rank 0 also begins to accept plan streams.
    InitCommunicator { spec: Box<EpochSpec>, id: Vec<u8>, deadline: Duration },
    /// Once all plan streams are open, run the canary prompt (rank 0 only).
    RunCanary { epoch: Epoch },
    /// Write our ready key under our lease.
    PutReady { record: ReadyRecord },
    /// Write the active record if all compares hold.
    Activate { record: Box<ActiveRecord>, compares: Vec<Compare> },
    /// The epoch is active: the leader may accept requests.
    Serve { epoch: Epoch },
    /// Set the epoch's flag, abort its communicator, discard the step in flight, then say `Left`.
    Leave { epoch: Epoch, reason: EndReason },
    /// Delete these keys of ours; best effort, their lease does it otherwise.
    Forget { keys: Vec<String> },
    /// Ask whether this instance answers at this address.
    Probe { instance: InstanceId, address: String },
}
