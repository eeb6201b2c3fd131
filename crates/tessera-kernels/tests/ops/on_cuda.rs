//! The CUDA backend on the first GPU.

use tessera_kernels::cuda::{self, CudaBackend, CudaOptions};
use tessera_kernels::{CudaError, CudaFormat};

use super::{BF16_TOLERANCE, F32_TOLERANCE, TestBackend};

fn make(format: CudaFormat) -> CudaBackend {
    let deterministic = true;
    CudaBackend::with_options(&CudaOptions { ordinal: 0, format, deterministic }).unwrap()
}

/// Anything but a driver that is not there is a failure.
fn has_driver() -> bool {
    !matches!(cuda::check().driver, Err(CudaError::DriverMissing))
}

pub struct CudaF32;

impl TestBackend for CudaF32 {
    type Backend = CudaBackend;
    fn make() -> CudaBackend {
        make(CudaFormat::F32)
    }
    fn is_available() -> bool {
        has_driver()
    }
    const CAPTURES: bool = true;
    const TOLERANCE: f64 = F32_TOLERANCE;
}

pub struct CudaBf16;

impl TestBackend for CudaBf16 {
    type Backend = CudaBackend;
    fn make() -> CudaBackend {
        make(CudaFormat::Bf16)
    }
    fn is_available() -> bool {
        has_driver()
    }
    const CAPTURES: bool = true;
    const TOLERANCE: f64 = BF16_TOLERANCE;
}

/// Instantiates generic tests for it.
macro_rules! cuda_tests {
    ($($test:ident),*) => {
        crate::support::backend_tests!(@cuda_f32 CudaF32: $($test),*);
        crate::support::backend_tests!(@cuda_bf16 CudaBf16: $($test),*);
    };
}
pub(crate) use cuda_tests;
