//! The number of layers that the device has computed, which it writes itself.

use std::sync::atomic::Ordering;

use super::DevicePtr;
use super::device::Gpu;
use super::memory::PinnedBuffer;
use crate::error::Result;
use crate::progress::LayerCount;

/// A counter in memory that host and device share.
#[derive(Debug)]
pub(crate) struct LayerCounter(PinnedBuffer);

impl LayerCounter {
    /// # Errors
    /// No memory.
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self(gpu.alloc_pinned(size_of::<u64>())?))
    }

    /// Its address as kernels see it.
    pub(super) fn device_ptr(&self) -> DevicePtr {
        self.0.device_ptr()
    }
}

impl LayerCount for LayerCounter {
    fn count(&self) -> u64 {
        // A statistic: nothing else is published through it.
        self.0.counter(0).load(Ordering::Relaxed)
    }
}
