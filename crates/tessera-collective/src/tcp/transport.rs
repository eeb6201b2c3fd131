//! Collectives over the mesh.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFd;
use tessera_types::Rank;

use super::link::{Link, Peer};
use super::waker::{Stop, Wait, Waker};
use crate::abort::AbortHandle;
use crate::communicator::HostCollective;
use crate::config::CollectiveConfig;
use crate::error::{CollectiveError, Result};
use crate::operation::{Operation, OperationKind};
use crate::reduce::{chunk, chunks_mut, is_direct, ordered_sum};
use crate::views::{as_bytes, as_bytes_mut};

pub(super) struct TcpTransport {
    mesh: Mesh,
    timeout: Option<Duration>,
    sequence: u64,
    /// Inputs of other ranks, before they are summed; grows to the largest.
    scratch: Vec<f32>,
}

/// The connections of one rank.
struct Mesh {
    rank: usize,
    /// By rank; `None` at this rank's own place.
    peers: Vec<Option<Peer>>,
    waker: Arc<Waker>,
    abort: AbortHandle,
    spin: Duration,
}

impl TcpTransport {
    pub(super) fn new(
        rank: Rank,
        peers: Vec<Option<Peer>>,
        waker: Arc<Waker>,
        abort: AbortHandle,
        config: &CollectiveConfig,
    ) -> Self {
        let mesh = Mesh { rank: rank.index(), peers, waker, abort, spin: config.spin() };
        Self { mesh, timeout: config.timeout(), sequence: 0, scratch: Vec::new() }
    }

    /// The barrier that ends the forming of the group, under the deadline of that.
    pub(super) fn first_barrier(&mut self, deadline: Instant) -> Result<()> {
        self.barrier_until(Some(deadline))
    }

    fn world_size(&self) -> usize {
        self.mesh.peers.len()
    }

    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| Instant::now() + timeout)
    }

    fn next(&mut self, kind: OperationKind, root: Rank, num_bytes: usize) -> Operation {
        self.sequence += 1;
        let (epoch, sequence) = (self.mesh.abort.epoch(), self.sequence);
        Operation { kind, root, epoch, sequence, num_bytes: num_bytes as u64 }
    }

    fn barrier_until(&mut self, deadline: Option<Instant>) -> Result<()> {
        let operation = self.next(OperationKind::Barrier, Rank(0), 0);
        let links = self.mesh.others().map(|peer| Link::exchange(peer, operation, &[], &mut []));
        let links = links.collect();
        self.mesh.round(operation, links, deadline)
    }

    fn scratch(&mut self, num_floats: usize) {
        if self.scratch.len() < num_floats {
            self.scratch.resize(num_floats, 0.0);
        }
    }

    /// Every rank sends its whole input to every other and sums for itself.
    fn all_reduce_direct(&mut self, data: &mut [f32], deadline: Option<Instant>) -> Result<()> {
        let (num_floats, world_size) = (data.len(), self.world_size());
        let operation = self.next(OperationKind::AllReduce, Rank(0), size_of_val(data));
        self.scratch(num_floats * world_size);
        let scratch = &mut self.scratch[..num_floats * world_size];

        let mut links = Vec::with_capacity(world_size);
        for (peer, slot) in chunks_mut(scratch, world_size).into_iter().enumerate() {
            match peer == self.mesh.rank {
                true => slot.copy_from_slice(data),
                false => {
                    let into = as_bytes_mut(slot);
                    links.push(Link::exchange(peer, operation, as_bytes(data), into));
                }
            }
        }
        self.mesh.round(operation, links, deadline)?;
        ordered_sum(data, world_size, |rank| &scratch[rank * num_floats..][..num_floats]);
        Ok(())
    }

    /// Every rank sums its own chunk of all inputs, then all gather the sums.
    fn all_reduce_in_chunks(&mut self, data: &mut [f32], deadline: Option<Instant>) -> Result<()> {
        let (num_floats, world_size) = (data.len(), self.world_size());
        let own = chunk(num_floats, world_size, self.mesh.rank);
        let own_floats = own.len();
        let scatter = self.next(OperationKind::AllReduce, Rank(0), size_of_val(data));
        let gather = self.next(OperationKind::AllReduce, Rank(0), size_of_val(data));
        self.scratch(own_floats * world_size);
        let scratch = &mut self.scratch[..own_floats * world_size];

        let mut links = Vec::with_capacity(world_size);
        for (peer, slot) in chunks_mut(scratch, world_size).into_iter().enumerate() {
            match peer == self.mesh.rank {
                true => slot.copy_from_slice(&data[own.clone()]),
                false => {
                    let payload = as_bytes(&data[chunk(num_floats, world_size, peer)]);
                    links.push(Link::exchange(peer, scatter, payload, as_bytes_mut(slot)));
                }
            }
        }
        self.mesh.round(scatter, links, deadline)?;
        ordered_sum(&mut data[own.clone()], world_size, |rank| {
            &scratch[rank * own_floats..][..own_floats]
        });

        let sum = &mut scratch[..own_floats];
        sum.copy_from_slice(&data[own]);
        let mut links = Vec::with_capacity(world_size);
        for (peer, part) in chunks_mut(data, world_size).into_iter().enumerate() {
            if peer != self.mesh.rank {
                links.push(Link::exchange(peer, gather, as_bytes(sum), as_bytes_mut(part)));
            }
        }
        self.mesh.round(gather, links, deadline)
    }
}

impl HostCollective for TcpTransport {
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<()> {
        let deadline = self.deadline();
        match is_direct(data.len(), self.world_size()) {
            true => self.all_reduce_direct(data, deadline),
            false => self.all_reduce_in_chunks(data, deadline),
        }
    }

    fn all_gather(&mut self, input: &[u8], mut output: &mut [u8]) -> Result<()> {
        let operation = self.next(OperationKind::AllGather, Rank(0), input.len());
        let mut links = Vec::with_capacity(self.world_size());
        for peer in 0..self.world_size() {
            let (part, rest) = output.split_at_mut(input.len());
            match peer == self.mesh.rank {
                true => part.copy_from_slice(input),
                false => links.push(Link::exchange(peer, operation, input, part)),
            }
            output = rest;
        }
        self.mesh.round(operation, links, self.deadline())
    }

    fn broadcast(&mut self, data: &mut [u8], root: Rank) -> Result<()> {
        let operation = self.next(OperationKind::Broadcast, root, data.len());
        let deadline = self.deadline();
        let links = match self.mesh.rank == root.index() {
            true => self.mesh.others().map(|peer| Link::send(peer, operation, data)).collect(),
            false => vec![Link::receive(root.index(), operation, data)],
        };
        self.mesh.round(operation, links, deadline)
    }

    fn barrier(&mut self) -> Result<()> {
        self.barrier_until(self.deadline())
    }

    fn leave(&mut self, reason: &str) {
        let epoch = self.mesh.abort.epoch();
        self.mesh.peers.iter().flatten().for_each(|peer| peer.leave(epoch, reason));
    }
}

impl Mesh {
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.peers.len()).filter(move |peer| *peer != rank)
    }

    /// Moves all messages of one round.
    fn round(
        &mut self,
        operation: Operation,
        mut links: Vec<Link<'_>>,
        deadline: Option<Instant>,
    ) -> Result<()> {
        let abort = self.abort.clone();
        let waker = Arc::clone(&self.waker);
        let wait = Wait { abort: &abort, waker: &waker, deadline };
        let mut idle_since = None;
        loop {
            let mut has_moved = false;
            for link in &mut links {
                has_moved |= link.drive(peer_mut(&mut self.peers, link.peer))?;
            }
            if links.iter().all(Link::is_done) {
                return Ok(());
            }
            let paused = match has_moved {
                true => {
                    idle_since = None;
                    wait.check()
                }
                false => self.pause(&links, &wait, &mut idle_since),
            };
            paused.map_err(|stop| self.stopped(stop, operation, &links, &abort))?;
        }
    }

    /// Spins for a moment, then sleeps until a socket is ready.
    fn pause(
        &self,
        links: &[Link<'_>],
        wait: &Wait<'_>,
        idle_since: &mut Option<Instant>,
    ) -> Result<(), Stop> {
        if !self.spin.is_zero() && idle_since.get_or_insert_with(Instant::now).elapsed() < self.spin
        {
            std::hint::spin_loop();
            return wait.check();
        }
        let unfinished = links.iter().filter(|link| !link.is_done());
        let fd =
            |link: &Link<'_>| PollFd::new(peer(&self.peers, link.peer).stream(), link.awaited());
        wait.sleep(&mut unfinished.map(fd).collect(), None)
    }

    fn stopped(
        &self,
        stop: Stop,
        operation: Operation,
        links: &[Link<'_>],
        abort: &AbortHandle,
    ) -> CollectiveError {
        match stop {
            Stop::Aborted => abort.check().expect_err("the flag is set and stays so"),
            Stop::Failed(source) => CollectiveError::System { what: "waiting on sockets", source },
            Stop::TimedOut => {
                let unfinished = links.iter().filter(|link| !link.is_done());
                let waiting_for =
                    unfinished.map(|link| peer(&self.peers, link.peer).rank()).collect();
                CollectiveError::Timeout { operation, waiting_for }
            }
        }
    }
}

fn peer(peers: &[Option<Peer>], rank: usize) -> &Peer {
    peers[rank].as_ref().expect("links lead to other ranks")
}

fn peer_mut(peers: &mut [Option<Peer>], rank: usize) -> &mut Peer {
    peers[rank].as_mut().expect("links lead to other ranks")
}
