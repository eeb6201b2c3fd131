//! All ranks in one process: each rank copies its input to a staging slot, all meet at a barrier, and
//! everyone reads what it needs from the slots.
//!
//! Inputs are staged, not lent, because a rank that is aborted takes its buffer away while peers may
//! still read. Slots come in pairs used in turn: a rank can write round n + 2 only after the barrier of
//! round n + 1, which peers enter when they have read round n. So one barrier per round is enough, and
//! the locks around the slots never make anyone wait.

mod barrier;

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use tessera_types::{Epoch, Rank};

use crate::MAX_WORLD_SIZE;
use crate::abort::AbortHandle;
use crate::communicator::{Communicator, HostCollective};
use crate::config::CollectiveConfig;
use crate::error::{CollectiveError, PeerAddress, Result};
use crate::operation::{Operation, OperationKind};
use crate::reduce::{chunk, is_direct, ordered_sum};
use crate::views::{as_bytes, as_bytes_mut};

use barrier::{Barrier, Outcome};

/// Communicators of all ranks of a new group, by ascending rank, with their own abort handle.
pub fn group(world_size: u32, epoch: Epoch) -> Vec<Communicator> {
    group_with(world_size, &AbortHandle::new(epoch), &CollectiveConfig::default())
}

/// As [`group`], in the epoch of `abort`, which all ranks share. Ranks that outnumber the cores of this
/// process park at once whatever `config` says, since a spinning rank keeps its peer from running.
///
/// `world_size` is at least 1 and at most [`MAX_WORLD_SIZE`].
pub fn group_with(
    world_size: u32,
    abort: &AbortHandle,
    config: &CollectiveConfig,
) -> Vec<Communicator> {
    assert!((1..=MAX_WORLD_SIZE).contains(&world_size), "a world of {world_size} ranks");
    if world_size == 1 {
        return vec![Communicator::alone(abort.clone())];
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let has_cores = world_size as usize <= cores;
    let spin = if has_cores { config.spin() } else { Duration::ZERO };
    let group = Arc::new(Group::new(world_size as usize));
    abort.attach(group.barrier.sleepers());
    let communicator = |rank: u32| {
        let seat =
            Seat { rank: rank as usize, abort: abort.clone(), spin, timeout: config.timeout() };
        let transport = ThreadTransport { group: Arc::clone(&group), seat, sequence: 0 };
        Communicator::new(Rank(rank), world_size, abort.clone(), Box::new(transport))
    };
    (0..world_size).map(communicator).collect()
}

/// What the ranks share.
struct Group {
    barrier: Barrier,
    /// `[2][world_size]`; a round uses the row of its parity.
    slots: [Vec<RwLock<Slot>>; 2],
}

/// One rank's input to one round.
struct Slot {
    operation: Option<Operation>,
    /// Backing store, as floats so that sums can read it; grows to the largest input.
    floats: Vec<f32>,
    num_bytes: usize,
}

impl Slot {
    fn bytes(&self) -> &[u8] {
        &as_bytes(&self.floats)[..self.num_bytes]
    }

    fn write(&mut self, operation: Operation, payload: &[u8]) {
        let num_floats = payload.len().div_ceil(size_of::<f32>());
        if self.floats.len() < num_floats {
            self.floats.resize(num_floats, 0.0);
        }
        as_bytes_mut(&mut self.floats)[..payload.len()].copy_from_slice(payload);
        (self.operation, self.num_bytes) = (Some(operation), payload.len());
    }
}

/// What one rank brings to every round.
struct Seat {
    rank: usize,
    abort: AbortHandle,
    spin: Duration,
    timeout: Option<Duration>,
}

impl Group {
    fn new(world_size: usize) -> Self {
        let slot = || RwLock::new(Slot { operation: None, floats: Vec::new(), num_bytes: 0 });
        let row = || (0..world_size).map(|_| slot()).collect();
        Self { barrier: Barrier::new(world_size), slots: [row(), row()] }
    }

    /// One round: publishes `payload` and returns every rank's slot, by ascending rank. All operations
    /// are equal; payloads may differ in length where the operation cuts a vector into chunks.
    fn exchange(
        &self,
        seat: &Seat,
        operation: Operation,
        payload: &[u8],
    ) -> Result<Vec<RwLockReadGuard<'_, Slot>>> {
        let row = &self.slots[operation.sequence as usize % 2];
        let own = row[seat.rank].write();
        own.unwrap_or_else(PoisonError::into_inner).write(operation, payload);

        let deadline = seat.timeout.map(|timeout| Instant::now() + timeout);
        match self.barrier.wait(seat.rank, &seat.abort, seat.spin, deadline) {
            Outcome::Met => {}
            Outcome::Aborted => seat.abort.check()?,
            Outcome::Departed(rank) => return Err(departed(rank)),
            Outcome::TimedOut(waiting_for) => {
                return Err(CollectiveError::Timeout { operation, waiting_for });
            }
        }
        let read = |slot| RwLock::read(slot).unwrap_or_else(PoisonError::into_inner);
        let slots: Vec<_> = row.iter().map(read).collect();
        for (rank, slot) in slots.iter().enumerate() {
            let got = slot.operation.expect("a rank writes its slot before it reaches the barrier");
            if got != operation {
                let (rank, address) = (Rank(rank as u32), PeerAddress::Thread);
                return Err(CollectiveError::Mismatch { rank, address, expected: operation, got });
            }
        }
        Ok(slots)
    }
}

fn departed(rank: Rank) -> CollectiveError {
    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "its communicator was dropped");
    CollectiveError::PeerLost { rank, address: PeerAddress::Thread, source }
}

struct ThreadTransport {
    group: Arc<Group>,
    seat: Seat,
    sequence: u64,
}

impl ThreadTransport {
    fn world_size(&self) -> usize {
        self.group.slots[0].len()
    }

    fn next(&mut self, kind: OperationKind, root: Rank, num_bytes: usize) -> Operation {
        self.sequence += 1;
        let (epoch, sequence) = (self.seat.abort.epoch(), self.sequence);
        Operation { kind, root, epoch, sequence, num_bytes: num_bytes as u64 }
    }

    fn all_reduce_direct(&mut self, data: &mut [f32]) -> Result<()> {
        let operation = self.next(OperationKind::AllReduce, Rank(0), size_of_val(data));
        let slots = self.group.exchange(&self.seat, operation, as_bytes(data))?;
        let num_floats = data.len();
        ordered_sum(data, slots.len(), |rank| &slots[rank].floats[..num_floats]);
        Ok(())
    }

    fn all_reduce_in_chunks(&mut self, data: &mut [f32]) -> Result<()> {
        let (num_floats, world_size) = (data.len(), self.world_size());
        let own = chunk(num_floats, world_size, self.seat.rank);

        let scatter = self.next(OperationKind::AllReduce, Rank(0), size_of_val(data));
        let slots = self.group.exchange(&self.seat, scatter, as_bytes(data))?;
        ordered_sum(&mut data[own.clone()], world_size, |rank| &slots[rank].floats[own.clone()]);
        drop(slots);

        let gather = self.next(OperationKind::AllReduce, Rank(0), size_of_val(data));
        let slots = self.group.exchange(&self.seat, gather, as_bytes(&data[own]))?;
        for (rank, slot) in slots.iter().enumerate() {
            let part = chunk(num_floats, world_size, rank);
            let num_floats = part.len();
            data[part].copy_from_slice(&slot.floats[..num_floats]);
        }
        Ok(())
    }
}

impl HostCollective for ThreadTransport {
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<()> {
        match is_direct(data.len(), self.world_size()) {
            true => self.all_reduce_direct(data),
            false => self.all_reduce_in_chunks(data),
        }
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let operation = self.next(OperationKind::AllGather, Rank(0), input.len());
        let slots = self.group.exchange(&self.seat, operation, input)?;
        for (rank, slot) in slots.iter().enumerate() {
            output[rank * input.len()..][..input.len()].copy_from_slice(slot.bytes());
        }
        Ok(())
    }

    fn broadcast(&mut self, data: &mut [u8], root: Rank) -> Result<()> {
        let operation = self.next(OperationKind::Broadcast, root, data.len());
        let is_root = self.seat.rank == root.index();
        let payload = if is_root { &*data } else { &[] };
        let slots = self.group.exchange(&self.seat, operation, payload)?;
        if !is_root {
            data.copy_from_slice(slots[root.index()].bytes());
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        let operation = self.next(OperationKind::Barrier, Rank(0), 0);
        self.group.exchange(&self.seat, operation, &[]).map(drop)
    }

    /// Nothing to tell: the ranks share the abort handle.
    fn leave(&mut self, _reason: &str) {}
}

impl Drop for ThreadTransport {
    fn drop(&mut self) {
        self.group.barrier.depart(self.seat.rank);
    }
}
