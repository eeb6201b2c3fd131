//! The CUDA backend as it computes in deterministic mode, on the first GPU.

use tessera_kernels::cuda::{self, CudaBackend};
use tessera_kernels::{CudaError, CudaFormat, CudaOptions};

/// Both formats where there is a driver. Anything else that is missing is a failure.
pub fn formats() -> Vec<CudaFormat> {
    match cuda::check().driver {
        Err(CudaError::DriverMissing) => Vec::new(),
        _ => vec![CudaFormat::Bf16, CudaFormat::F32],
    }
}

pub fn backend(format: CudaFormat) -> CudaBackend {
    let options = CudaOptions { ordinal: 0, format, deterministic: true };
    cuda::open(&options).unwrap()
}
