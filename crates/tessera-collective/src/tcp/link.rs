//! One connection of the mesh, and one round's messages on it.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr, TcpStream};

use rustix::event::PollFlags;
use tessera_types::{Epoch, Rank};

use super::socket::{Progress, read_some, write_some};
use super::wire::{Header, MAX_REASON_BYTES};
use crate::error::{CollectiveError, PeerAddress, Result};
use crate::operation::Operation;

/// Another rank and the connection to it.
pub(super) struct Peer {
    rank: Rank,
    address: SocketAddr,
    stream: TcpStream,
    /// A message was sent in part, so nothing sensible can follow it.
    is_cut: bool,
}

impl Peer {
    pub(super) fn new(rank: Rank, address: SocketAddr, stream: TcpStream) -> Self {
        Self { rank, address, stream, is_cut: false }
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Tells the peer why this rank leaves, if that fits into the socket now, and ends the connection.
    pub(super) fn leave(&self, epoch: Epoch, reason: &str) {
        if !self.is_cut {
            let reason = &reason.as_bytes()[..reason.len().min(MAX_REASON_BYTES)];
            let header = Header::Abort { epoch, reason_bytes: reason.len() as u64 }.encode();
            let parts = [IoSlice::new(&header), IoSlice::new(reason)];
            // Best effort: without it the peer sees the end of the connection.
            let _ = write_some(&self.stream, &parts);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn lost(&self, source: io::Error) -> CollectiveError {
        let (rank, address) = (self.rank, PeerAddress::Socket(self.address));
        CollectiveError::PeerLost { rank, address, source }
    }

    fn violation(&self, violation: &'static str) -> CollectiveError {
        let (rank, address) = (self.rank, PeerAddress::Socket(self.address));
        CollectiveError::Protocol { rank, address, violation }
    }

    /// The error of a peer that announced its abort; as much of its reason as has arrived.
    fn aborted(&self, reason_bytes: u64) -> CollectiveError {
        let mut reason = [0; MAX_REASON_BYTES];
        let num_bytes = reason_bytes.min(MAX_REASON_BYTES as u64) as usize;
        let mut received = 0;
        while received < num_bytes {
            match read_some(&self.stream, &mut reason[received..num_bytes]) {
                Ok(Progress::Moved(moved)) => received += moved,
                Ok(Progress::NotReady) | Err(_) => break,
            }
        }
        let reason = String::from_utf8_lossy(&reason[..received]).into_owned();
        let (rank, address) = (self.rank, PeerAddress::Socket(self.address));
        CollectiveError::PeerAborted { rank, address, reason }
    }
}

/// What goes over one connection in one round.
pub(super) struct Link<'a> {
    /// Index of the peer, its rank.
    pub peer: usize,
    outgoing: Option<Outgoing<'a>>,
    incoming: Option<Incoming<'a>>,
}

struct Outgoing<'a> {
    header: [u8; Header::NUM_BYTES],
    payload: &'a [u8],
    sent: usize,
}

struct Incoming<'a> {
    operation: Operation,
    header: [u8; Header::NUM_BYTES],
    payload: &'a mut [u8],
    received: usize,
}

impl<'a> Link<'a> {
    /// A message each way.
    pub(super) fn exchange(
        peer: usize,
        operation: Operation,
        payload: &'a [u8],
        into: &'a mut [u8],
    ) -> Self {
        let mut link = Self::send(peer, operation, payload);
        link.incoming = Self::receive(peer, operation, into).incoming;
        link
    }

    pub(super) fn send(peer: usize, operation: Operation, payload: &'a [u8]) -> Self {
        let header = Header::Data { operation, payload_bytes: payload.len() as u64 }.encode();
        Self { peer, outgoing: Some(Outgoing { header, payload, sent: 0 }), incoming: None }
    }

    pub(super) fn receive(peer: usize, operation: Operation, payload: &'a mut [u8]) -> Self {
        let header = [0; Header::NUM_BYTES];
        let incoming = Incoming { operation, header, payload, received: 0 };
        Self { peer, outgoing: None, incoming: Some(incoming) }
    }

    pub(super) fn is_done(&self) -> bool {
        self.awaited().is_empty()
    }

    /// What the socket must be ready for.
    pub(super) fn awaited(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::OUT, self.outgoing.as_ref().is_some_and(|o| !o.is_done()));
        flags.set(PollFlags::IN, self.incoming.as_ref().is_some_and(|i| !i.is_done()));
        flags
    }

    /// Moves what can be moved now; whether anything did. Reads first, so that a peer's last words are
    /// heard before the write to it fails.
    pub(super) fn drive(&mut self, peer: &mut Peer) -> Result<bool> {
        let mut has_moved = false;
        if let Some(incoming) = self.incoming.as_mut().filter(|incoming| !incoming.is_done()) {
            has_moved |= incoming.drive(peer)?;
        }
        if let Some(outgoing) = self.outgoing.as_mut().filter(|outgoing| !outgoing.is_done()) {
            match outgoing.drive(&peer.stream) {
                Ok(moved) => has_moved |= moved,
                Err(error) => return Err(self.last_words(peer, error)),
            }
            peer.is_cut = outgoing.sent > 0 && !outgoing.is_done();
        }
        Ok(has_moved)
    }

    /// After a failed write: the abort that the peer may have announced, else its loss.
    fn last_words(&self, peer: &Peer, error: io::Error) -> CollectiveError {
        let is_between_messages =
            self.incoming.as_ref().is_none_or(|i| i.received == 0 || i.is_done());
        let mut header = [0; Header::NUM_BYTES];
        if is_between_messages
            && let Ok(Progress::Moved(Header::NUM_BYTES)) = read_some(&peer.stream, &mut header)
            && let Some(Header::Abort { reason_bytes, .. }) = Header::decode(&header)
        {
            return peer.aborted(reason_bytes);
        }
        peer.lost(error)
    }
}

impl Outgoing<'_> {
    fn is_done(&self) -> bool {
        self.sent == Header::NUM_BYTES + self.payload.len()
    }

    /// Header and payload leave in one call, so that a small message is one packet.
    fn drive(&mut self, stream: &TcpStream) -> io::Result<bool> {
        let header = &self.header[self.sent.min(Header::NUM_BYTES)..];
        let payload = &self.payload[self.sent.saturating_sub(Header::NUM_BYTES)..];
        match write_some(stream, &[IoSlice::new(header), IoSlice::new(payload)])? {
            Progress::Moved(moved) => {
                self.sent += moved;
                Ok(true)
            }
            Progress::NotReady => Ok(false),
        }
    }
}

impl Incoming<'_> {
    fn is_done(&self) -> bool {
        self.received == Header::NUM_BYTES + self.payload.len()
    }

    fn drive(&mut self, peer: &Peer) -> Result<bool> {
        let mut has_moved = false;
        // At most the header and then what is there of the payload, so that no peer starves others.
        for _ in 0..2 {
            if self.is_done() {
                break;
            }
            let in_header = self.received < Header::NUM_BYTES;
            let buffer = match in_header {
                true => &mut self.header[self.received..],
                false => &mut self.payload[self.received - Header::NUM_BYTES..],
            };
            match read_some(&peer.stream, buffer).map_err(|error| peer.lost(error))? {
                Progress::Moved(moved) => self.received += moved,
                Progress::NotReady => break,
            }
            has_moved = true;
            if in_header && self.received == Header::NUM_BYTES {
                self.check(peer)?;
            }
        }
        Ok(has_moved)
    }

    /// The header must be the one this rank would have sent.
    fn check(&self, peer: &Peer) -> Result<()> {
        match Header::decode(&self.header) {
            None => Err(peer.violation("a message has no header")),
            Some(Header::Abort { reason_bytes, .. }) => Err(peer.aborted(reason_bytes)),
            Some(Header::Data { operation, .. }) if operation != self.operation => {
                let (rank, address) = (peer.rank, PeerAddress::Socket(peer.address));
                let (expected, got) = (self.operation, operation);
                Err(CollectiveError::Mismatch { rank, address, expected, got })
            }
            Some(Header::Data { payload_bytes, .. }) => {
                match payload_bytes == self.payload.len() as u64 {
                    true => Ok(()),
                    false => Err(peer.violation("a message is not as long as its round requires")),
                }
            }
        }
    }
}
