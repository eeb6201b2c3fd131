//! Stands in for the CUDA backend in programs that are built without it: everything says so.

use crate::cuda_check::{CudaCheck, KernelFile};
use crate::cuda_error::CudaError;
use crate::device::{CudaFormat, CudaOptions};
use crate::error::{KernelError, Result};

/// No value of it is ever made, so any backend will do as its type.
pub type CudaBackend = crate::ReferenceBackend;

fn absent<T>() -> Result<T> {
    Err(KernelError::Cuda { operation: "open", source: CudaError::NotBuilt })
}

/// Opens a GPU.
///
/// # Errors
/// Always [`CudaError::NotBuilt`].
pub fn open(_options: &CudaOptions) -> Result<CudaBackend> {
    absent()
}

/// What this machine has for the CUDA backend.
pub fn check() -> CudaCheck {
    CudaCheck {
        driver: Err(CudaError::NotBuilt),
        cublaslt: Err(CudaError::NotBuilt),
        gpus: Vec::new(),
    }
}

/// Free and total bytes of a GPU.
///
/// # Errors
/// Always [`CudaError::NotBuilt`].
pub fn memory(_ordinal: u32) -> Result<(usize, usize)> {
    absent()
}

/// Measures the limits of a GPU; there is none of it here.
#[derive(Debug)]
pub enum GpuLimits {}

impl GpuLimits {
    /// Opens a GPU.
    ///
    /// # Errors
    /// Always [`CudaError::NotBuilt`].
    pub fn new(_format: CudaFormat, _ordinal: u32) -> Result<Self> {
        absent()
    }

    /// Bytes read and written per second.
    ///
    /// # Errors
    /// None: there is no value to call it on.
    pub fn copy_bytes_per_second(&self) -> Result<f64> {
        match *self {}
    }

    /// Multiplications and additions per second.
    ///
    /// # Errors
    /// None: there is no value to call it on.
    pub fn multiply_flops(&self) -> Result<f64> {
        match *self {}
    }
}

/// The kernels that this program carries.
pub fn kernels() -> &'static [KernelFile] {
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CudaDevice;

    #[test]
    fn everything_says_that_it_was_not_built() {
        assert_eq!(check().require(0), Err(CudaError::NotBuilt));
        let options = CudaDevice::in_order(CudaFormat::Bf16).options(0, false);
        for error in
            [open(&options).err(), memory(0).err(), GpuLimits::new(CudaFormat::F32, 0).err()]
        {
            assert!(
                matches!(error, Some(KernelError::Cuda { source: CudaError::NotBuilt, .. })),
                "{error:?}"
            );
        }
        assert!(kernels().is_empty());
    }
}
