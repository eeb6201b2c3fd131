//! Pinned memory through which the host hands data to the device: a buffer is written again only when the copy out
//! of it is done, which an event tells.

use std::time::{Duration, Instant};

use super::DevicePtr;
use super::device::Gpu;
use super::event::Event;
use super::memory::PinnedBuffer;
use crate::act::DType;
use crate::error::Result;
use half::bf16;

/// Longest that a copy out of a buffer may take before the device counts as lost.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);

/// A few buffers of equal size, used in turn.
#[derive(Debug)]
pub(super) struct StagingRing {
    buffers: Vec<(PinnedBuffer, Option<Event>)>,
    next: usize,
}

impl StagingRing {
    /// # Errors
    /// No memory.
    pub(super) fn new(gpu: &Gpu, count: usize, bytes: usize) -> Result<Self> {
        let buffers = (0..count).map(|_| Ok((gpu.alloc_pinned(bytes)?, None)));
        Ok(Self { buffers: buffers.collect::<Result<Vec<_>>>()?, next: 0 })
    }

    /// Bytes of one buffer.
    pub(super) fn bytes(&self) -> usize {
        self.buffers.first().map_or(0, |(buffer, _)| buffer.bytes())
    }

    /// Waits until the next buffer is free, has `write` fill it and say how many bytes count, and enqueues the copy
    /// of these to `dst`.
    ///
    /// # Errors
    /// What the device reports; [`crate::KernelError::DeadlineExceeded`] if it no longer copies.
    pub(super) fn send(
        &mut self,
        gpu: &Gpu,
        dst: DevicePtr,
        write: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<()> {
        let (buffer, copied) = &mut self.buffers[self.next];
        if let Some(copied) = copied.take() {
            copied.wait(Instant::now() + COPY_TIMEOUT)?;
        }
        let bytes = write(buffer.as_mut_slice());
        gpu.copy_to_device(buffer, 0..bytes, dst)?;
        *copied = Some(gpu.record()?);
        self.next = (self.next + 1) % self.buffers.len();
        Ok(())
    }

    /// Enqueues the copy of f32 values to `dst`, as elements of `dtype`.
    ///
    /// # Errors
    /// As for [`StagingRing::send`].
    pub(super) fn send_values(
        &mut self,
        gpu: &Gpu,
        dst: DevicePtr,
        values: &[f32],
        dtype: DType,
    ) -> Result<()> {
        let size = dtype.size_bytes();
        let per_buffer = self.bytes() / size;
        for (index, values) in values.chunks(per_buffer).enumerate() {
            let dst = dst + (index * per_buffer * size) as u64;
            self.send(gpu, dst, |bytes| {
                match dtype {
                    DType::F32 => fill(bytes, values, |value| value.to_ne_bytes()),
                    DType::Bf16 => {
                        fill(bytes, values, |value| bf16::from_f32(value).to_ne_bytes());
                    }
                }
                values.len() * size
            })?;
        }
        Ok(())
    }

    /// Reads `values.len()` elements of `dtype` at `src`, when all that was enqueued is done. For results outside of
    /// a step; it waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub(super) fn receive_values(
        &mut self,
        gpu: &Gpu,
        src: DevicePtr,
        values: &mut [f32],
        dtype: DType,
    ) -> Result<()> {
        let size = dtype.size_bytes();
        let per_buffer = self.bytes() / size;
        // Copies out of the buffer come first on the stream.
        let (buffer, copied) = &mut self.buffers[self.next];
        for (index, values) in values.chunks_mut(per_buffer).enumerate() {
            let src = src + (index * per_buffer * size) as u64;
            gpu.copy_to_host(src, buffer, 0..values.len() * size)?;
            gpu.synchronize()?;
            let bytes = &buffer.as_slice()[..values.len() * size];
            match dtype {
                DType::F32 => read(bytes, values, f32::from_ne_bytes),
                DType::Bf16 => read(bytes, values, |bytes| bf16::from_ne_bytes(bytes).to_f32()),
            }
        }
        *copied = None;
        Ok(())
    }
}

fn fill<const SIZE: usize>(bytes: &mut [u8], values: &[f32], narrow: impl Fn(f32) -> [u8; SIZE]) {
    let (words, _) = bytes.as_chunks_mut::<SIZE>();
    words.iter_mut().zip(values).for_each(|(word, value)| *word = narrow(*value));
}

fn read<const SIZE: usize>(bytes: &[u8], values: &mut [f32], widen: impl Fn([u8; SIZE]) -> f32) {
    let (words, _) = bytes.as_chunks::<SIZE>();
    values.iter_mut().zip(words).for_each(|(value, word)| *value = widen(*word));
}
