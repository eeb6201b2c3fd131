//! The owner's handle of a communicator, and the trait that transports implement.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use tessera_types::{Epoch, Rank};

use crate::abort::{AbortFlag, AbortHandle};
use crate::error::{CollectiveError, Result};
use crate::views::{as_bytes, as_bytes_mut, ids_as_bytes_mut};

/// Collectives on host slices, as a transport provides them. All ranks make the same calls in the same
/// order with the same lengths.
///
/// [`Communicator`] checks arguments and the abort flag before and after each call, fills outputs on
/// failure and never calls again after one; a transport may leave outputs half-written when it fails.
pub trait HostCollective: Send {
    /// `data[i]` becomes `((r0[i] + r1[i]) + r2[i]) + …` in f32 on every rank.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<()>;
    /// `output` `[world_size, input.len()]` becomes the inputs by ascending rank.
    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()>;
    /// `data` becomes that of `root`.
    fn broadcast(&mut self, data: &mut [u8], root: Rank) -> Result<()>;
    /// Returns once every rank has called it.
    fn barrier(&mut self) -> Result<()>;
    /// Tells peers that this rank has failed, as far as that needs no waiting. Called at most once.
    fn leave(&mut self, reason: &str);
}

/// One rank's end of a group, for one epoch. Owned by one thread: it can move to another (`Send`) but
/// not be shared (`!Sync`).
pub struct Communicator {
    rank: Rank,
    world_size: u32,
    abort: AbortHandle,
    transport: Box<dyn HostCollective>,
    has_left: bool,
    _not_sync: PhantomData<Cell<()>>,
}

impl Communicator {
    /// A world of one, in which collectives change nothing. Epoch 0.
    pub fn single() -> Self {
        Self::alone(AbortHandle::new(Epoch::default()))
    }

    /// A world of one in the epoch of `abort`.
    pub fn alone(abort: AbortHandle) -> Self {
        Self::new(Rank(0), 1, abort, Box::new(Alone))
    }

    /// Wraps a transport. `rank` is below `world_size`.
    pub fn new(
        rank: Rank,
        world_size: u32,
        abort: AbortHandle,
        transport: Box<dyn HostCollective>,
    ) -> Self {
        assert!(rank.0 < world_size, "rank {rank} is below the world size {world_size}");
        Self { rank, world_size, abort, transport, has_left: false, _not_sync: PhantomData }
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    pub fn epoch(&self) -> Epoch {
        self.abort.epoch()
    }

    /// Ends this epoch from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    /// To be read before results of this epoch are reported.
    pub fn abort_flag(&self) -> AbortFlag {
        self.abort.flag()
    }

    /// Replaces `data` `[n]` by its sum over ranks, `((r0 + r1) + r2) + …` in f32 by ascending rank.
    pub fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<()> {
        let result = self.abort.check().and_then(|()| self.transport.all_reduce_sum(data));
        self.finish(result, as_bytes_mut(data))
    }

    /// Fills `output` `[world_size, n]` with every rank's `input` `[n]` by ascending rank.
    pub fn all_gather(&mut self, input: &[f32], output: &mut [f32]) -> Result<()> {
        let result = self.gather(input.len(), output.len(), |transport| {
            transport.all_gather(as_bytes(input), as_bytes_mut(output))
        });
        self.finish(result, as_bytes_mut(output))
    }

    /// As [`Communicator::all_gather`], on bytes.
    pub fn all_gather_bytes(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let result =
            self.gather(input.len(), output.len(), |transport| transport.all_gather(input, output));
        self.finish(result, output)
    }

    /// Replaces `data` by that of `root`. The length is the same on all ranks.
    pub fn broadcast(&mut self, data: &mut [u8], root: Rank) -> Result<()> {
        let result = self.abort.check().and_then(|()| match root.0 < self.world_size {
            true => self.transport.broadcast(data, root),
            false => Err(CollectiveError::InvalidRoot { root, world_size: self.world_size }),
        });
        self.finish(result, data)
    }

    /// As [`Communicator::broadcast`], on token ids and other 32-bit words; a failure leaves `u32::MAX`.
    pub fn broadcast_u32(&mut self, data: &mut [u32], root: Rank) -> Result<()> {
        self.broadcast(ids_as_bytes_mut(data), root)
    }

    /// Returns once every rank has called it.
    pub fn barrier(&mut self) -> Result<()> {
        let result = self.abort.check().and_then(|()| self.transport.barrier());
        self.finish(result, &mut [])
    }

    fn gather(
        &mut self,
        input: usize,
        output: usize,
        call: impl FnOnce(&mut dyn HostCollective) -> Result<()>,
    ) -> Result<()> {
        self.abort.check()?;
        let (world_size, expected) = (self.world_size, input * self.world_size as usize);
        if output != expected {
            return Err(CollectiveError::OutputLength { input, output, expected, world_size });
        }
        call(&mut *self.transport)
    }

    /// The one exit of every collective. An abort that came while the transport was busy wins over its
    /// success: peers may hold half a result. Any failure ends the epoch on this rank.
    fn finish(&mut self, result: Result<()>, output: &mut [u8]) -> Result<()> {
        let result = result.and_then(|()| self.abort.check());
        let Err(error) = &result else { return Ok(()) };
        output.fill(0xFF);
        let reason = match error {
            CollectiveError::Aborted { reason, .. } => reason.clone(),
            error => error.chain(),
        };
        self.abort.abort(reason.as_str());
        if !self.has_left {
            self.has_left = true;
            self.transport.leave(&reason);
        }
        result
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("abort", &self.abort)
            .finish_non_exhaustive()
    }
}

/// The transport of a world of one.
struct Alone;

impl HostCollective for Alone {
    fn all_reduce_sum(&mut self, _data: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        output.copy_from_slice(input);
        Ok(())
    }

    fn broadcast(&mut self, _data: &mut [u8], _root: Rank) -> Result<()> {
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }

    fn leave(&mut self, _reason: &str) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiles only for types that are not `Sync`: otherwise both impls apply and inference fails.
    trait NotSync<Marker> {
        fn holds() {}
    }
    impl<T: ?Sized> NotSync<()> for T {}
    impl<T: ?Sized + Sync> NotSync<u8> for T {}

    #[test]
    fn a_communicator_has_one_owner_and_its_abort_handle_many() {
        fn send<T: Send>() {}
        fn shared<T: Send + Sync + Clone>() {}
        send::<Communicator>();
        <Communicator as NotSync<_>>::holds();
        shared::<AbortHandle>();
        shared::<AbortFlag>();
    }

    #[test]
    fn a_world_of_one_changes_nothing_until_it_is_aborted() {
        let mut communicator = Communicator::single();
        let mut data = [1.0, -0.0];
        communicator.all_reduce_sum(&mut data).unwrap();
        communicator.broadcast(&mut [1, 2], Rank(0)).unwrap();
        communicator.barrier().unwrap();
        let mut gathered = [0.0; 2];
        communicator.all_gather(&data, &mut gathered).unwrap();
        assert_eq!(gathered.map(f32::to_bits), data.map(f32::to_bits));

        communicator.abort_handle().abort("test");
        let error = communicator.all_reduce_sum(&mut data).unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { reason, .. } if reason == "test"));
        assert!(data.iter().all(|value| value.is_nan()));
    }

    #[test]
    fn wrong_arguments_end_the_communicator() {
        let mut communicator = Communicator::single();
        let mut output = [0u8; 3];
        let error = communicator.all_gather_bytes(&[1, 2], &mut output).unwrap_err();
        assert!(matches!(error, CollectiveError::OutputLength { expected: 2, output: 3, .. }));
        assert_eq!(output, [0xFF; 3]);
        assert!(matches!(communicator.barrier(), Err(CollectiveError::Aborted { .. })));

        let mut ids = [5u32];
        let error = Communicator::single().broadcast_u32(&mut ids, Rank(1)).unwrap_err();
        assert!(matches!(error, CollectiveError::InvalidRoot { root: Rank(1), .. }));
        assert_eq!(ids, [u32::MAX]);
    }
}
