//! Memory that operations work in: sized when slots are planned, and grown only if a wider linear is loaded after
//! that.

use super::DevicePtr;
use super::device::Gpu;
use super::memory::DeviceBuffer;
use crate::error::Result;

/// One array that an operation writes and reads before the next one needs it.
#[derive(Debug, Default)]
pub(super) struct Scratch(Option<DeviceBuffer>);

impl Scratch {
    /// At least `bytes` from here on.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn reserve(&mut self, gpu: &Gpu, bytes: usize) -> Result<DevicePtr> {
        if self.bytes() < bytes {
            // Freed first: the two need not fit side by side. Freeing waits for those who use it.
            self.0 = None;
            self.0 = Some(gpu.alloc(bytes)?);
        }
        Ok(self.0.as_ref().map_or(0, DeviceBuffer::ptr))
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, DeviceBuffer::bytes)
    }
}
