//! Stands in for `on_cuda` where the CUDA backend was not built.

use tessera_kernels::{CudaFormat, ReferenceBackend};

pub fn formats() -> Vec<CudaFormat> {
    Vec::new()
}

pub fn backend(_format: CudaFormat) -> ReferenceBackend {
    ReferenceBackend::new()
}
