//! What can go wrong between ranks.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;

use tessera_types::{Epoch, Rank};

use crate::operation::Operation;

pub type Result<T, E = CollectiveError> = std::result::Result<T, E>;

/// Where a peer lives, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAddress {
    /// A thread of this process.
    Thread,
    Socket(SocketAddr),
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Thread => f.write_str("a thread of this process"),
            Self::Socket(address) => address.fmt(f),
        }
    }
}

/// Why a rank that listens sent a newcomer away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The newcomer holds the id of another communicator.
    WrongNonce,
    WrongEpoch,
    WrongWorldSize,
    /// The rank does not exist, or does not connect to the one it spoke to.
    WrongRank,
    /// Another process holds this rank already.
    RankTaken,
    /// The listener expects another protocol version.
    WrongVersion,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WrongNonce => "the id names another communicator",
            Self::WrongEpoch => "the epoch is another one",
            Self::WrongWorldSize => "the world size differs",
            Self::WrongRank => "this rank is not expected here",
            Self::RankTaken => "this rank is taken",
            Self::WrongVersion => "the protocol version differs",
        })
    }
}

/// A collective or the forming of a communicator failed. Whatever the variant, the communicator is
/// finished: outputs are filled with 0xFF and later calls return [`CollectiveError::Aborted`].
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    #[error("epoch {epoch} was aborted: {reason}")]
    Aborted { epoch: Epoch, reason: String },
    #[error("lost rank {rank} at {address}")]
    PeerLost { rank: Rank, address: PeerAddress, source: io::Error },
    #[error("rank {rank} at {address} aborted: {reason}")]
    PeerAborted { rank: Rank, address: PeerAddress, reason: String },
    #[error("rank {rank} at {address} runs {got} while this rank runs {expected}")]
    Mismatch { rank: Rank, address: PeerAddress, expected: Operation, got: Operation },
    #[error("rank {rank} at {address} broke the protocol: {violation}")]
    Protocol { rank: Rank, address: PeerAddress, violation: &'static str },
    #[error("{operation} timed out waiting for {}", ranks(waiting_for))]
    Timeout { operation: Operation, waiting_for: Vec<Rank> },
    #[error(
        "all_gather of {input} elements from {world_size} ranks needs an output of {expected}, got {output}"
    )]
    OutputLength { input: usize, output: usize, expected: usize, world_size: u32 },
    #[error("root {root} is not a rank in a world of {world_size}")]
    InvalidRoot { root: Rank, world_size: u32 },
    #[error("rank {rank} has no place in a world of {world_size}: {rule}")]
    InvalidSeat { rank: Rank, world_size: u32, rule: &'static str },
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("{address} cannot be reached by peers: bind to an address of one interface")]
    UnspecifiedAddress { address: SocketAddr },
    #[error("cannot connect to rank {rank} at {address}")]
    Connect { rank: Rank, address: SocketAddr, source: io::Error },
    #[error("rank {rank} at {address} refused this rank: {refusal}")]
    Refused { rank: Rank, address: SocketAddr, refusal: Refusal },
    #[error("deadline passed while {stage}: waiting for {}", ranks(missing))]
    BootstrapDeadline { stage: &'static str, missing: Vec<Rank> },
    #[error("the operating system refused {what}")]
    System { what: &'static str, source: io::Error },
}

impl CollectiveError {
    /// The error and its sources on one line, for the reason of an abort.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}

fn ranks(list: &[Rank]) -> String {
    let names: Vec<String> = list.iter().map(|rank| rank.to_string()).collect();
    match names.as_slice() {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", names.join(", ")),
    }
}
