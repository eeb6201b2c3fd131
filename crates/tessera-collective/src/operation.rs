//! What ranks compare before they believe each other's bytes.

use std::fmt;

use tessera_types::{Epoch, Rank};

/// Kind of a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationKind {
    AllReduce,
    AllGather,
    Broadcast,
    Barrier,
}

/// One round of one collective. Every rank computes the same value; any difference means that ranks
/// have lost step, and ends the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    pub kind: OperationKind,
    /// Sender of a broadcast; rank 0 for the other kinds.
    pub root: Rank,
    pub epoch: Epoch,
    /// Rounds since the communicator was made; the first is 1.
    pub sequence: u64,
    /// Bytes of one rank's input as the caller gave it.
    pub num_bytes: u64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, root, epoch, sequence, num_bytes } = self;
        match kind {
            OperationKind::AllReduce => f.write_str("all_reduce")?,
            OperationKind::AllGather => f.write_str("all_gather")?,
            OperationKind::Broadcast => write!(f, "broadcast from rank {root}")?,
            OperationKind::Barrier => f.write_str("barrier")?,
        }
        write!(f, " of {num_bytes} bytes (epoch {epoch}, round {sequence})")
    }
}
