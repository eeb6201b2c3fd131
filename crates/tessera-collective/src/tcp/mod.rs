//! Ranks in several processes: a full mesh of TCP sockets.
//!
//! This transport is for machines without a GPU, where tensors live in host memory anyway. It copies
//! every byte through the kernel; on machines with GPUs a group uses NCCL. Connections are neither
//! encrypted nor authenticated beyond the id's nonce: keep them on the cluster's own network.
//!
//! Forming a group goes as with NCCL: one process binds a [`Root`], publishes its [`CommunicatorId`]
//! (through the store, CLUSTER §1) and becomes rank 0 by [`Root::accept`]; all others [`connect`] with
//! the id. Each rank tells the root where it listens, the root sends everyone the list, and each rank
//! connects to those below it. A first barrier shows that the whole mesh stands.
//!
//! Every message carries epoch, round, kind and length ([`crate::Operation`]), which must equal the
//! receiver's own. Sockets never block: one poll loop moves whatever can move in either direction, so
//! that ranks which send to each other at once can't wait for each other.

mod accept;
mod form;
mod id;
mod link;
mod socket;
mod transport;
mod waker;
mod wire;

pub use form::{Root, connect};
pub use id::{CommunicatorId, ParseIdError};
