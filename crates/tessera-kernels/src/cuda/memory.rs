//! Memory of the GPU, and memory of the host that the GPU reaches.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use cudarc::driver::{result, sys};

use super::device::{Context, DevicePtr};
use super::library::check;
use crate::cuda_error::CudaError;

/// An array in the GPU's memory. Dropping it waits for the device.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    context: Arc<Context>,
    ptr: DevicePtr,
    bytes: usize,
}

impl DeviceBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        context.bind()?;
        // The driver refuses 0 bytes, which are a fair wish of a model without biases.
        // SAFETY: the memory is written before the caller sees it (`Gpu::alloc`).
        let ptr = unsafe { result::malloc_sync(bytes.max(1)) };
        let ptr = ptr.map_err(|error| context.explain("cuMemAlloc", bytes, error))?;
        Ok(Self { context: Arc::clone(context), ptr, bytes })
    }

    /// Address of its first byte, a multiple of 256.
    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new` and freed once; freeing waits for work that may use it.
            let _ = unsafe { result::free_sync(self.ptr) };
        }
    }
}

/// An array of the host's memory that is never moved, so that copies from and to it run beside the host, and that
/// the GPU may also address itself.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    context: Arc<Context>,
    data: NonNull<u8>,
    device: DevicePtr,
    bytes: usize,
}

// SAFETY: the memory is owned by this value alone and may be freed from any thread.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        context.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let allocated = bytes.max(1);
        // SAFETY: written just below, before anyone reads it.
        let data = unsafe { result::malloc_host(allocated, flags) };
        let data = data.map_err(|error| context.explain("cuMemHostAlloc", bytes, error))?;
        let data = NonNull::new(data.cast::<u8>()).expect("a successful allocation has an address");
        // SAFETY: `allocated` bytes were allocated there.
        unsafe { data.as_ptr().write_bytes(0, allocated) };
        let mut buffer = Self { context: Arc::clone(context), data, device: 0, bytes };
        // SAFETY: the address was allocated with DEVICEMAP.
        let mapped = unsafe {
            sys::cuMemHostGetDevicePointer_v2(&mut buffer.device, data.as_ptr().cast(), 0).result()
        };
        check("cuMemHostGetDevicePointer", mapped)?;
        Ok(buffer)
    }

    /// Its address as kernels see it.
    pub(crate) fn device_ptr(&self) -> DevicePtr {
        self.device
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What the host wrote, or what a copy that is done brought.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `bytes` bytes, initialised, owned by this value. The GPU writes them only in copies that the
        // caller waits for before it reads.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.bytes) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above; the caller waits for copies out of it before it writes.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.bytes) }
    }

    /// The number at `offset` bytes, which kernels may change at any time. A programmer's error beyond the end or
    /// off a multiple of 8.
    pub(crate) fn counter(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= self.bytes,
            "a counter lies in its buffer"
        );
        // SAFETY: aligned and inside, as just checked; only read and written as an atomic.
        unsafe { AtomicU64::from_ptr(self.data.as_ptr().add(offset).cast()) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new` and freed once; freeing waits for work that may use it.
            let _ = unsafe { result::free_host(self.data.as_ptr().cast()) };
        }
    }
}
