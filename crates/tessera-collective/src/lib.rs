//! Collectives between the ranks of one tensor-parallel group: ordered all-reduce, all-gather,
//! broadcast, barrier, and an abort that ends all of them at once.
//!
//! Invariants
//! - A sum is `((r0 + r1) + r2) + …` in f32 by ascending rank, whatever the size, the chunking or the
//!   transport (ENGINE §3): threads and TCP give the same bits.
//! - One communicator belongs to one epoch and one owner thread. It is never reused: after the first
//!   failure or abort every later call fails too, and a new epoch builds a new one.
//! - A failed call leaves no plausible number behind: every output byte is 0xFF, which is NaN as f32
//!   and no token as u32. Whoever reports a step reads the [`AbortFlag`] first (CLUSTER §2).
//! - Lengths and headers that come from a peer are compared with what is expected, never trusted.
//!
//! Transports
//! - [`threads`]: all ranks in one process.
//! - [`tcp`]: a full mesh of sockets, for machines without a GPU. It copies through the kernel, so where
//!   there is a GPU the group belongs on NCCL.
//! - NCCL joins as a third transport. It implements [`HostCollective`] by staging host slices through
//!   pinned memory, so callers with host slices stay as they are; collectives on device pointers are
//!   further methods of its own type, which the CUDA backend keeps beside the [`Communicator`]. Its
//!   `ncclCommAbort` attaches to the [`AbortHandle`] in the same way as the wakers of the other two.
//!
//! Modules: `communicator` (the owner's handle and the transport trait), `abort` (handle and flag),
//! `config`, `error`, `operation` (what ranks compare), `reduce` (the one ordered sum), `views` (floats
//! as bytes), [`threads`], [`tcp`].

mod abort;
mod communicator;
mod config;
mod error;
mod operation;
mod reduce;
pub mod tcp;
pub mod threads;
mod views;

pub use abort::{AbortFlag, AbortHandle};
pub use communicator::{Communicator, HostCollective};
pub use config::{CollectiveConfig, ConfigError, MAX_SPIN_US};
pub use error::{CollectiveError, PeerAddress, Refusal, Result};
pub use operation::{Operation, OperationKind};
pub use tcp::CommunicatorId;

/// Most ranks of one group.
pub const MAX_WORLD_SIZE: u32 = 1024;

#[cfg(target_endian = "big")]
compile_error!("frames carry numbers in the order of the host, which is little-endian everywhere");
