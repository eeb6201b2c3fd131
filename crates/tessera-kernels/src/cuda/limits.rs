//! What one GPU can do, measured: the limits that figures are compared with.

use std::cell::RefCell;
use std::time::Instant;

use super::device::Gpu;
use super::gemm::{Gemm, Product};
use super::memory::DeviceBuffer;
use crate::act::DType;
use crate::device::CudaFormat;
use crate::error::Result;

/// Copied at once: several times the second-level cache of any GPU.
const COPY_BYTES: usize = 512 << 20;
/// Copies between two looks at the clock.
const COPIES: usize = 8;
/// Rows, outputs and inputs of the product: large enough to fill any GPU.
const SIDE: u32 = 8192;
/// Products between two looks at the clock, about 10 ms on Hopper.
const PRODUCTS: usize = 8;

/// Measures a GPU.
pub struct GpuLimits {
    gpu: Gpu,
    gemm: RefCell<Gemm>,
    dtype: DType,
    /// Two halves for copies; three square matrices for products.
    memory: DeviceBuffer,
}

impl std::fmt::Debug for GpuLimits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuLimits").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}

impl GpuLimits {
    /// Opens GPU `ordinal` beside whoever uses it already.
    ///
    /// # Errors
    /// No GPU, no memory.
    pub fn new(format: CudaFormat, ordinal: u32) -> Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        let dtype = match format {
            CudaFormat::Bf16 => DType::Bf16,
            CudaFormat::F32 => DType::F32,
        };
        let matrix_bytes = (SIDE as usize).pow(2) * dtype.size_bytes();
        let memory = gpu.alloc((2 * COPY_BYTES).max(3 * matrix_bytes))?;
        let gemm = RefCell::new(Gemm::new(&gpu, false)?);
        let limits = Self { gpu, gemm, dtype, memory };
        limits.multiply_once()?;
        Ok(limits)
    }

    /// Bytes read plus bytes written per second, by copies within the GPU.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn copy_bytes_per_second(&self) -> Result<f64> {
        let (from, to) = (self.memory.ptr(), self.memory.ptr() + COPY_BYTES as u64);
        let seconds = self.time(COPIES, || self.gpu.copy_on_device(from, to, COPY_BYTES))?;
        Ok(2.0 * COPY_BYTES as f64 / seconds)
    }

    /// Multiplications and additions per second, by products of large square matrices.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn multiply_flops(&self) -> Result<f64> {
        let seconds = self.time(PRODUCTS, || self.multiply_once())?;
        Ok(2.0 * f64::from(SIDE).powi(3) / seconds)
    }

    fn multiply_once(&self) -> Result<()> {
        let matrix_bytes = u64::from(SIDE).pow(2) * self.dtype.size_bytes() as u64;
        let product = Product {
            weight: self.memory.ptr(),
            bias: None,
            x: self.memory.ptr() + matrix_bytes,
            y: self.memory.ptr() + 2 * matrix_bytes,
            rows: SIDE,
            outputs: SIDE,
            inputs: SIDE,
            dtype: self.dtype,
            output: self.dtype,
        };
        self.gemm.borrow_mut().multiply(&self.gpu, &product)
    }

    /// Seconds of one of `times` runs of what `enqueue` enqueues.
    fn time(&self, times: usize, enqueue: impl Fn() -> Result<()>) -> Result<f64> {
        self.gpu.synchronize()?;
        let started = Instant::now();
        (0..times).try_for_each(|_| enqueue())?;
        self.gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / times as f64)
    }
}
