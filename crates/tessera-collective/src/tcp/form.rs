//! Forming a group: the root, those who connect to it, and the mesh between them.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Instant;

use rustix::rand::{GetRandomFlags, getrandom};
use tessera_types::Rank;

use super::accept::{Acceptor, Credentials, Joined};
use super::id::{CommunicatorId, Nonce};
use super::link::Peer;
use super::socket;
use super::transport::TcpTransport;
use super::waker::{Stop, Wait, Waker};
use super::wire::{ADDRESS_BYTES, Hello, REPLY_BYTES, decode_reply, read_address, write_address};
use crate::MAX_WORLD_SIZE;
use crate::abort::AbortHandle;
use crate::communicator::Communicator;
use crate::config::CollectiveConfig;
use crate::error::{CollectiveError, PeerAddress, Result};

const WAITING_FOR_RANKS: &str = "forming the group";
const WAITING_FOR_ROOT: &str = "waiting for rank 0 to see all ranks";
const WAITING_FOR_MESH: &str = "connecting ranks with each other";

/// The listening end of rank 0, from the making of the id to the forming of the group.
pub struct Root {
    listener: TcpListener,
    id: CommunicatorId,
    world_size: u32,
    abort: AbortHandle,
    config: CollectiveConfig,
}

impl Root {
    /// Listens on `listen` (port 0: any free one), an address that all ranks can reach, for a group of
    /// `world_size` ranks in the epoch of `abort`. Publish the id after this returned.
    pub fn bind(
        listen: SocketAddr,
        world_size: u32,
        abort: &AbortHandle,
        config: &CollectiveConfig,
    ) -> Result<(Self, CommunicatorId)> {
        check_seat(Rank(0), world_size)?;
        if listen.ip().is_unspecified() {
            return Err(CollectiveError::UnspecifiedAddress { address: listen });
        }
        let (listener, address) = listen_on(listen)?;
        let id = CommunicatorId::new(address, random_nonce()?);
        let (abort, config) = (abort.clone(), config.clone());
        Ok((Self { listener, id, world_size, abort, config }, id))
    }

    /// Lets all other ranks in and becomes rank 0. Whoever has another id, epoch or world size, or a rank
    /// that is taken, is refused, and the root goes on waiting.
    ///
    /// At the deadline the error names the ranks that are missing.
    pub fn accept(self, deadline: Instant) -> Result<Communicator> {
        let waker = Waker::attached(&self.abort)?;
        let wait = Wait { abort: &self.abort, waker: &waker, deadline: Some(deadline) };
        let credentials = credentials(&self.id, self.world_size, &self.abort);
        let mut acceptor = Acceptor::new(&self.listener, credentials, 1..self.world_size);
        let joined = collect(&mut acceptor, &wait, self.id.address(), WAITING_FOR_RANKS)?;

        let mut roster = write_address(self.id.address()).to_vec();
        roster.extend(joined.iter().flat_map(|joined| write_address(joined.listen)));
        for Joined { rank, stream, address, .. } in &joined {
            let sent = socket::write_all(stream, &roster, &wait);
            sent.map_err(|stop| lost(stop, &wait, *rank, *address, WAITING_FOR_RANKS))?;
        }
        let mut peers: Vec<Option<Peer>> = vec![None];
        peers.extend(joined.into_iter().map(|joined| Some(Peer::from(joined))));
        finish(Rank(0), peers, waker, &self.abort, &self.config, deadline)
    }
}

/// Joins the group that `id` names as `rank` (not 0) of `world_size`, in the epoch of `abort`. Listens for
/// ranks above on `listen_ip`, an address that they can reach.
///
/// Fails at `deadline`, at once when the root refuses this rank, and with [`CollectiveError::Aborted`]
/// when the handle is used meanwhile.
pub fn connect(
    id: &CommunicatorId,
    listen_ip: IpAddr,
    rank: Rank,
    world_size: u32,
    deadline: Instant,
    abort: &AbortHandle,
    config: &CollectiveConfig,
) -> Result<Communicator> {
    check_seat(rank, world_size)?;
    if rank.0 == 0 {
        let rule = "rank 0 is the root, which accepts";
        return Err(CollectiveError::InvalidSeat { rank, world_size, rule });
    }
    let any_port = SocketAddr::new(listen_ip, 0);
    if listen_ip.is_unspecified() {
        return Err(CollectiveError::UnspecifiedAddress { address: any_port });
    }
    let (listener, listen) = listen_on(any_port)?;
    let waker = Waker::attached(abort)?;
    let wait = Wait { abort, waker: &waker, deadline: Some(deadline) };
    let credentials = credentials(id, world_size, abort);
    let Credentials { nonce, epoch, .. } = credentials;
    let hello = Hello { nonce, epoch, world_size, rank, listen };

    let root = greet(Rank(0), id.address(), &hello, &wait)?;
    let roster = read_roster(&root, world_size, &wait)?;
    let mut peers = vec![Some(root)];
    for below in 1..rank.0 {
        peers.push(Some(greet(Rank(below), roster[below as usize], &hello, &wait)?));
    }
    peers.push(None);
    let mut acceptor = Acceptor::new(&listener, credentials, rank.0 + 1..world_size);
    let above = collect(&mut acceptor, &wait, listen, WAITING_FOR_MESH)?;
    peers.extend(above.into_iter().map(|joined| Some(Peer::from(joined))));
    finish(rank, peers, waker, abort, config, deadline)
}

impl From<Joined> for Peer {
    fn from(joined: Joined) -> Self {
        Self::new(joined.rank, joined.address, joined.stream)
    }
}

fn check_seat(rank: Rank, world_size: u32) -> Result<()> {
    let rule = match world_size {
        0 => "a group has at least one rank",
        size if size > MAX_WORLD_SIZE => "the group is too large",
        size if rank.0 >= size => "ranks are below the world size",
        _ => return Ok(()),
    };
    Err(CollectiveError::InvalidSeat { rank, world_size, rule })
}

fn listen_on(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    socket::listen(address).map_err(|source| CollectiveError::Listen { address, source })
}

fn random_nonce() -> Result<Nonce> {
    let mut nonce = Nonce::default();
    let filled = getrandom(&mut nonce, GetRandomFlags::empty());
    let source = match filled {
        Ok(filled) if filled == nonce.len() => return Ok(nonce),
        Ok(_) => io::ErrorKind::UnexpectedEof.into(),
        Err(error) => error.into(),
    };
    Err(CollectiveError::System { what: "random bytes", source })
}

fn credentials(id: &CommunicatorId, world_size: u32, abort: &AbortHandle) -> Credentials {
    Credentials { nonce: id.nonce(), epoch: abort.epoch(), world_size }
}

fn collect(
    acceptor: &mut Acceptor<'_>,
    wait: &Wait<'_>,
    listen: SocketAddr,
    stage: &'static str,
) -> Result<Vec<Joined>> {
    acceptor.collect(wait).map_err(|stop| match stop {
        Stop::Aborted => aborted(wait.abort),
        Stop::TimedOut => CollectiveError::BootstrapDeadline { stage, missing: acceptor.missing() },
        Stop::Failed(source) => CollectiveError::Listen { address: listen, source },
    })
}

/// Connects to a rank that listens and introduces this one.
fn greet(rank: Rank, address: SocketAddr, hello: &Hello, wait: &Wait<'_>) -> Result<Peer> {
    let stream = socket::connect(address, wait).map_err(|stop| match stop {
        Stop::Failed(source) => CollectiveError::Connect { rank, address, source },
        stop => lost(stop, wait, rank, address, WAITING_FOR_MESH),
    })?;
    let mut reply = [0; REPLY_BYTES];
    socket::write_all(&stream, &hello.encode(), wait)
        .and_then(|()| socket::read_exact(&stream, &mut reply, wait))
        .map_err(|stop| lost(stop, wait, rank, address, WAITING_FOR_MESH))?;
    match decode_reply(&reply) {
        Some(Ok(())) => Ok(Peer::new(rank, address, stream)),
        Some(Err(refusal)) => Err(CollectiveError::Refused { rank, address, refusal }),
        None => Err(protocol(rank, address, "the answer to the greeting is none")),
    }
}

/// Where every rank listens, by rank; the root's own address comes first.
fn read_roster(root: &Peer, world_size: u32, wait: &Wait<'_>) -> Result<Vec<SocketAddr>> {
    let mut bytes = vec![0; world_size as usize * ADDRESS_BYTES];
    let read = socket::read_exact(root.stream(), &mut bytes, wait);
    read.map_err(|stop| lost(stop, wait, Rank(0), root.address(), WAITING_FOR_ROOT))?;
    let addresses: Option<Vec<SocketAddr>> =
        bytes.chunks(ADDRESS_BYTES).map(read_address).collect();
    addresses.ok_or_else(|| protocol(Rank(0), root.address(), "an address in the list is none"))
}

/// The communicator, once a barrier has shown that every rank holds its whole part of the mesh.
fn finish(
    rank: Rank,
    peers: Vec<Option<Peer>>,
    waker: Arc<Waker>,
    abort: &AbortHandle,
    config: &CollectiveConfig,
    deadline: Instant,
) -> Result<Communicator> {
    let world_size = peers.len() as u32;
    let mut transport = TcpTransport::new(rank, peers, waker, abort.clone(), config);
    transport.first_barrier(deadline).map_err(|error| match error {
        CollectiveError::Timeout { waiting_for, .. } => {
            CollectiveError::BootstrapDeadline { stage: WAITING_FOR_MESH, missing: waiting_for }
        }
        error => error,
    })?;
    Ok(Communicator::new(rank, world_size, abort.clone(), Box::new(transport)))
}

fn lost(
    stop: Stop,
    wait: &Wait<'_>,
    rank: Rank,
    address: SocketAddr,
    stage: &'static str,
) -> CollectiveError {
    let address = PeerAddress::Socket(address);
    match stop {
        Stop::Aborted => aborted(wait.abort),
        Stop::TimedOut => CollectiveError::BootstrapDeadline { stage, missing: vec![rank] },
        Stop::Failed(source) => CollectiveError::PeerLost { rank, address, source },
    }
}

fn aborted(abort: &AbortHandle) -> CollectiveError {
    abort.check().expect_err("a wait stops as aborted only once the flag is set")
}

fn protocol(rank: Rank, address: SocketAddr, violation: &'static str) -> CollectiveError {
    CollectiveError::Protocol { rank, address: PeerAddress::Socket(address), violation }
}
