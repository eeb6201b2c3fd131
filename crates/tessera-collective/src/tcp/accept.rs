//! The listening side of forming a group: strangers and mistaken ranks are sent away, expected ranks are
//! kept, and nobody who stalls holds up the others.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;

use rustix::event::{PollFd, PollFlags};
use tessera_types::{Epoch, Rank};

use super::id::Nonce;
use super::socket::{Progress, accepted, read_some, write_some};
use super::waker::{Stop, Wait};
use super::wire::{BadHello, Hello, encode_reply};
use crate::error::Refusal;

/// Connections that have not said yet who they are; beyond these the oldest is closed.
const MAX_UNNAMED: usize = 64;

/// What every member of a group must know.
#[derive(Clone, Copy)]
pub(super) struct Credentials {
    pub nonce: Nonce,
    pub epoch: Epoch,
    pub world_size: u32,
}

/// A rank that was let in.
pub(super) struct Joined {
    pub rank: Rank,
    pub stream: TcpStream,
    pub address: SocketAddr,
    /// Where it listens for ranks above it.
    pub listen: SocketAddr,
}

/// A connection whose greeting is still on its way.
struct Unnamed {
    stream: TcpStream,
    address: SocketAddr,
    hello: [u8; Hello::NUM_BYTES],
    received: usize,
}

/// Collects one connection from each rank of a range.
pub(super) struct Acceptor<'a> {
    listener: &'a TcpListener,
    credentials: Credentials,
    expected: Range<u32>,
    unnamed: Vec<Unnamed>,
    /// One place per expected rank.
    joined: Vec<Option<Joined>>,
}

impl<'a> Acceptor<'a> {
    pub(super) fn new(
        listener: &'a TcpListener,
        credentials: Credentials,
        expected: Range<u32>,
    ) -> Self {
        let joined = expected.clone().map(|_| None).collect();
        Self { listener, credentials, expected, unnamed: Vec::new(), joined }
    }

    /// Ranks that have not come.
    pub(super) fn missing(&self) -> Vec<Rank> {
        let places = self.expected.clone().zip(&self.joined);
        places.filter(|(_, place)| place.is_none()).map(|(rank, _)| Rank(rank)).collect()
    }

    /// Returns once every expected rank is connected, by ascending rank. On a stop, [`Self::missing`]
    /// tells who is not.
    pub(super) fn collect(&mut self, wait: &Wait<'_>) -> Result<Vec<Joined>, Stop> {
        loop {
            self.accept_waiting()?;
            self.hear_unnamed();
            if self.joined.iter().all(Option::is_some) {
                return Ok(self.joined.drain(..).flatten().collect());
            }
            let mut fds = vec![PollFd::new(self.listener, PollFlags::IN)];
            fds.extend(self.unnamed.iter().map(|u| PollFd::new(&u.stream, PollFlags::IN)));
            let first_joined = fds.len();
            let streams = self.joined.iter().flatten().map(|joined| &joined.stream);
            fds.extend(streams.map(|stream| PollFd::new(stream, PollFlags::RDHUP)));
            wait.sleep(&mut fds, None)?;
            let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
            let is_gone: Vec<bool> =
                fds[first_joined..].iter().map(|fd| fd.revents().intersects(gone)).collect();
            self.forget(&is_gone);
        }
    }

    /// Frees the places of ranks that left before all had come: they may connect again. `is_gone` has
    /// an entry for each occupied place, in order.
    fn forget(&mut self, is_gone: &[bool]) {
        let occupied = self.joined.iter_mut().filter(|place| place.is_some());
        for (place, _) in occupied.zip(is_gone).filter(|(_, gone)| **gone) {
            *place = None;
        }
    }

    fn accept_waiting(&mut self) -> Result<(), Stop> {
        loop {
            match self.listener.accept() {
                Ok((stream, address)) => {
                    // A connection that fails already is the connecting side's loss.
                    let Ok(stream) = accepted(stream) else { continue };
                    if self.unnamed.len() == MAX_UNNAMED {
                        self.unnamed.remove(0);
                    }
                    let hello = [0; Hello::NUM_BYTES];
                    self.unnamed.push(Unnamed { stream, address, hello, received: 0 });
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
            }
        }
    }

    fn hear_unnamed(&mut self) {
        for mut unnamed in std::mem::take(&mut self.unnamed) {
            match read_some(&unnamed.stream, &mut unnamed.hello[unnamed.received..]) {
                Ok(Progress::NotReady) => self.unnamed.push(unnamed),
                Ok(Progress::Moved(moved)) => {
                    unnamed.received += moved;
                    match unnamed.received == Hello::NUM_BYTES {
                        true => self.answer(unnamed),
                        false => self.unnamed.push(unnamed),
                    }
                }
                Err(_) => {}
            }
        }
    }

    fn answer(&mut self, unnamed: Unnamed) {
        let Unnamed { stream, address, hello, .. } = unnamed;
        let judged = match Hello::decode(&hello) {
            Ok(hello) => self.judge(&hello).map(|place| (place, hello)),
            Err(BadHello::Version) => Err(Refusal::WrongVersion),
            Err(BadHello::Stranger) => return,
        };
        let reply = encode_reply(judged.map(|_| ()));
        // The send buffer of a new connection is empty, so eight bytes always fit; a connection that
        // has failed meanwhile is dropped and its rank may come again.
        let sent = write_some(&stream, &[io::IoSlice::new(&reply)]);
        let is_sent = matches!(sent, Ok(Progress::Moved(moved)) if moved == reply.len());
        if let (Ok((place, hello)), true) = (judged, is_sent) {
            let (rank, listen) = (hello.rank, hello.listen);
            self.joined[place] = Some(Joined { rank, stream, address, listen });
        }
    }

    /// The place of an expected rank, or why it is refused.
    fn judge(&self, hello: &Hello) -> Result<usize, Refusal> {
        let Credentials { nonce, epoch, world_size } = self.credentials;
        if hello.nonce != nonce {
            return Err(Refusal::WrongNonce);
        }
        if hello.epoch != epoch {
            return Err(Refusal::WrongEpoch);
        }
        if hello.world_size != world_size {
            return Err(Refusal::WrongWorldSize);
        }
        if !self.expected.contains(&hello.rank.0) {
            return Err(Refusal::WrongRank);
        }
        let place = (hello.rank.0 - self.expected.start) as usize;
        match self.joined[place] {
            Some(_) => Err(Refusal::RankTaken),
            None => Ok(place),
        }
    }
}
