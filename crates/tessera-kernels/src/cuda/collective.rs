//! Sums over ranks that are joined by a communicator of the host: the values go through pinned memory, in ascending
//! ranks as everywhere (ENGINE §3). It waits for the device, so steps of such a group are not captured.

use tessera_collective::Communicator;

use super::DevicePtr;
use super::device::Gpu;
use super::memory::PinnedBuffer;
use crate::error::Result;
use crate::reference::collective;

/// Values that are summed at a time. The cut changes no bits: each sum stands for itself.
const PIECE_BYTES: usize = 16 << 20;

/// What a rank among others needs beside its communicator.
#[derive(Debug)]
pub(super) struct HostStage(PinnedBuffer);

impl HostStage {
    /// # Errors
    /// No memory.
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self(gpu.alloc_pinned(PIECE_BYTES)?))
    }

    /// Puts the sum over ranks in the place of `len` f32 values at `data`. All before it on the stream is done when
    /// it returns, and the sums are on their way.
    ///
    /// # Errors
    /// What communicator and device report, under the name of `operation`.
    pub(super) fn all_reduce_sum(
        &mut self,
        gpu: &Gpu,
        communicator: &mut Communicator,
        operation: &'static str,
        data: DevicePtr,
        len: usize,
    ) -> Result<()> {
        const PIECE: usize = PIECE_BYTES / size_of::<f32>();
        for first in (0..len).step_by(PIECE) {
            let at = data + (first * size_of::<f32>()) as u64;
            let bytes = PIECE.min(len - first) * size_of::<f32>();
            // Waits also for the copy out of the buffer that the piece before began.
            gpu.copy_to_host(at, &mut self.0, 0..bytes)?;
            gpu.synchronize()?;
            // SAFETY: any four bytes are an f32, and pinned memory is aligned to pages, so nothing is left over.
            let (_, values, _) = unsafe { self.0.as_mut_slice()[..bytes].align_to_mut::<f32>() };
            communicator.all_reduce_sum(values).map_err(collective(operation))?;
            gpu.copy_to_device(&self.0, 0..bytes, at)?;
        }
        Ok(())
    }
}
