//! One GPU as one rank uses it: context, one stream, the kernels.
//!
//! cudarc's safe layer tracks an event per allocation, which a captured graph does not survive; so this is built on
//! its calls (`driver::result`), and order is kept by having one stream only.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::event::Event;
use super::graph_capture::Graph;
use super::library::{self, check};
use super::memory::{DeviceBuffer, PinnedBuffer};
use super::module::{Launch, Modules};
use crate::cuda_check::{CudaCheck, GpuInfo};
use crate::cuda_error::CudaError;
use crate::error::{KernelError, Result};

/// Address in the memory of a GPU.
pub(crate) type DevicePtr = u64;

/// Lowest compute capability that the kernels are made for.
const LOWEST_CAPABILITY: (u32, u32) = (8, 0);

/// The primary context of a GPU, shared by all ranks of this process that use it.
#[derive(Debug)]
pub(super) struct Context {
    ordinal: u32,
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: a context may be made current in any thread, and in several at once; the driver locks it itself.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn retain(ordinal: u32, device: sys::CUdevice) -> Result<Self, CudaError> {
        // SAFETY: the device was given by the driver; the reference is given back on drop.
        let raw =
            check("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        Ok(Self { ordinal, device, raw })
    }

    /// Makes it the calling thread's, as most calls require.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as this value.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.raw) })
    }

    /// Free and total bytes of the GPU.
    pub(super) fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        check("cuMemGetInfo", result::mem_get_info())
    }

    /// Explains a refused allocation by what is free; other errors stay as they are.
    pub(super) fn explain(
        &self,
        call: &'static str,
        asked_bytes: usize,
        error: DriverError,
    ) -> CudaError {
        let full = error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        match (full, self.memory()) {
            (true, Ok((free_bytes, total_bytes))) => CudaError::OutOfMemory {
                ordinal: self.ordinal,
                asked_bytes,
                free_bytes,
                total_bytes,
            },
            _ => check::<()>(call, Err(error)).expect_err("an error stays one"),
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: gives back the reference taken in `retain`. An error here means that the driver is already
        // shutting down with the process, which frees all.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// The one stream of a rank: what it enqueues runs in order.
#[derive(Debug)]
struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made in `Gpu::open` and destroyed once; pending work completes first.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// One GPU as one rank uses it. Owned by the rank's thread; several ranks may open the same GPU.
///
/// Copies, fills, launches and graphs are enqueued and return at once. An error of the device may come out of any
/// later call; after one the GPU is of no more use to this process.
#[derive(Debug)]
pub(crate) struct Gpu {
    modules: Modules,
    stream: Stream,
    context: Arc<Context>,
    info: GpuInfo,
}

// SAFETY: handles of the driver may be used from any thread once the context is bound there, which every method
// does first. It is not Sync: two threads could interleave within a captured graph.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Opens GPU `ordinal` and loads all kernels, so that nothing is loaded inside a step.
    ///
    /// # Errors
    /// No or too old a driver or cuBLASLt, no such GPU, too old a GPU, no memory.
    pub(crate) fn open(ordinal: u32) -> Result<Self> {
        Self::try_open(ordinal).map_err(|source| KernelError::Cuda { operation: "open", source })
    }

    fn try_open(ordinal: u32) -> Result<Self, CudaError> {
        library::driver()?;
        library::cublaslt()?;
        let (device, info) = inspect(ordinal)?;
        let context = Arc::new(Context::retain(ordinal, device)?);
        context.bind()?;
        let raw = check(
            "cuStreamCreate",
            result::stream::create(result::stream::StreamKind::NonBlocking),
        )?;
        let stream = Stream { context: Arc::clone(&context), raw };
        let modules = Modules::load(&context, info.shared_bytes)?;
        Ok(Self { modules, stream, context, info })
    }

    pub(crate) fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// The stream, for libraries that enqueue by themselves. Call [`Gpu::bind`] before them.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream.raw
    }

    /// Makes the GPU the calling thread's, for libraries that are called directly.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context.bind().map_err(failed("bind"))
    }

    /// Begins a launch of the kernel `name`. A name that no kernel has is a programmer's error and panics.
    pub(crate) fn launch(&self, name: &'static str) -> Launch<'_> {
        Launch::new(self, name, self.modules.function(name))
    }

    /// Zeroed memory of this GPU. Not inside a capture.
    ///
    /// # Errors
    /// The memory is not free; the error says how much is.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<DeviceBuffer> {
        let buffer = DeviceBuffer::new(&self.context, bytes).map_err(failed("alloc"))?;
        self.fill(buffer.ptr(), 0, bytes)?;
        Ok(buffer)
    }

    /// Zeroed memory of the host that the GPU copies from and to without a detour, and may address itself.
    pub(crate) fn alloc_pinned(&self, bytes: usize) -> Result<PinnedBuffer> {
        PinnedBuffer::new(&self.context, bytes).map_err(failed("alloc_pinned"))
    }

    /// Enqueues a copy. `src` must not be written before an [`Event`] recorded afterwards is done.
    pub(crate) fn copy_to_device(
        &self,
        src: &PinnedBuffer,
        range: Range<usize>,
        dst: DevicePtr,
    ) -> Result<()> {
        self.bind()?;
        let bytes = &src.as_slice()[range];
        // SAFETY: pinned memory stays where it is; the owner keeps it until the copy's event is done.
        let copied = unsafe { result::memcpy_htod_async(dst, bytes, self.stream.raw) };
        check("cuMemcpyHtoDAsync", copied).map_err(failed("copy_to_device"))
    }

    /// Enqueues a copy. `dst` holds the bytes once an [`Event`] recorded afterwards is done.
    pub(crate) fn copy_to_host(
        &self,
        src: DevicePtr,
        dst: &mut PinnedBuffer,
        range: Range<usize>,
    ) -> Result<()> {
        self.bind()?;
        let bytes = &mut dst.as_mut_slice()[range];
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, src, self.stream.raw) };
        check("cuMemcpyDtoHAsync", copied).map_err(failed("copy_to_host"))
    }

    /// Enqueues a copy within the GPU; the two ranges must not overlap.
    pub(crate) fn copy_on_device(
        &self,
        src: DevicePtr,
        dst: DevicePtr,
        bytes: usize,
    ) -> Result<()> {
        self.bind()?;
        // SAFETY: addresses of buffers whose owner outlives the step; a wrong one is reported by the device.
        let copied = unsafe { result::memcpy_dtod_async(dst, src, bytes, self.stream.raw) };
        check("cuMemcpyDtoDAsync", copied).map_err(failed("copy_on_device"))
    }

    /// Enqueues the writing of `bytes` equal bytes.
    pub(crate) fn fill(&self, dst: DevicePtr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: as above.
        let filled = unsafe { result::memset_d8_async(dst, byte, bytes, self.stream.raw) };
        check("cuMemsetD8Async", filled).map_err(failed("fill"))
    }

    /// Marks this place in the stream.
    pub(crate) fn record(&self) -> Result<Event> {
        Event::record(&self.context, self.stream.raw).map_err(failed("record"))
    }

    /// Waits, without end, until all that was enqueued is done. For start-up and host-staged collectives.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as this value.
        let done = unsafe { result::stream::synchronize(self.stream.raw) };
        check("cuStreamSynchronize", done).map_err(failed("synchronize"))
    }

    /// From here on what is enqueued is not run but kept, until [`Gpu::end_capture`].
    pub(crate) fn begin_capture(&self) -> Result<()> {
        self.bind()?;
        // Of the calling thread only: other ranks of this process go on allocating.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as this value.
        let begun = unsafe { result::stream::begin_capture(self.stream.raw, mode) };
        check("cuStreamBeginCapture", begun).map_err(failed("begin_capture"))
    }

    /// Ends the capture and makes it ready to run. Must follow every [`Gpu::begin_capture`], also when what was to
    /// be captured failed.
    ///
    /// # Errors
    /// What was captured cannot be replayed; the stream takes work again all the same.
    pub(crate) fn end_capture(&self) -> Result<Graph> {
        self.bind()?;
        // SAFETY: the stream lives as long as this value.
        let captured = unsafe { result::stream::end_capture(self.stream.raw) };
        let captured = check("cuStreamEndCapture", captured).map_err(failed("end_capture"))?;
        Graph::new(&self.context, captured).map_err(failed("end_capture"))
    }
}

/// Looks up GPU `ordinal`; the driver must be initialised.
///
/// # Errors
/// No such GPU, or one that is too old.
fn inspect(ordinal: u32) -> Result<(sys::CUdevice, GpuInfo), CudaError> {
    use sys::CUdevice_attribute_enum as Attribute;

    let count = count()?;
    if ordinal >= count {
        return Err(CudaError::NoSuchGpu { ordinal, count });
    }
    let device = check("cuDeviceGet", result::device::get(ordinal as i32))?;
    let name = check("cuDeviceGetName", result::device::get_name(device))?;
    let attribute = |which| {
        // SAFETY: the device was given by the driver.
        let value = unsafe { result::device::get_attribute(device, which) };
        check("cuDeviceGetAttribute", value).map(|value| value.unsigned_abs())
    };
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < LOWEST_CAPABILITY {
        let (major, minor) = capability;
        return Err(CudaError::ArchitectureTooOld { ordinal, name, major, minor });
    }
    // SAFETY: the device was given by the driver.
    let memory_bytes = check("cuDeviceTotalMem", unsafe { result::device::total_mem(device) })?;
    let info = GpuInfo {
        ordinal,
        name,
        capability,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_bytes,
    };
    Ok((device, info))
}

fn count() -> Result<u32, CudaError> {
    let count = check("cuDeviceGetCount", result::device::get_count())?;
    Ok(count.unsigned_abs())
}

/// What this machine has for the CUDA backend: libraries and GPUs, or what is missing.
pub fn check_machine() -> CudaCheck {
    let driver = library::driver();
    let count = driver.as_ref().map_or(0, |_| count().unwrap_or(0));
    let gpus = (0..count).map(|ordinal| inspect(ordinal).map(|(_, info)| info)).collect();
    CudaCheck { driver, cublaslt: library::cublaslt(), gpus }
}

/// Free and total bytes of a GPU, whoever uses it.
///
/// # Errors
/// No driver, no such GPU.
pub fn memory(ordinal: u32) -> Result<(usize, usize)> {
    let memory = || {
        library::driver()?;
        let (device, _) = inspect(ordinal)?;
        Context::retain(ordinal, device)?.memory()
    };
    memory().map_err(failed("memory"))
}

/// Names the operation that a call of the driver belonged to.
pub(super) fn failed(operation: &'static str) -> impl Fn(CudaError) -> KernelError {
    move |source| KernelError::Cuda { operation, source }
}
