//! RMSNorm weights on the device.

use super::device::Gpu;
use super::memory::DeviceBuffer;
use super::staging::StagingRing;
use crate::act::DType;
use crate::error::Result;
use crate::weights::{NormSpec, SliceReader, TensorSlice};

/// Weight `[hidden]` in f32, and epsilon.
#[derive(Debug)]
pub struct CudaNorm {
    pub(super) weight: DeviceBuffer,
    pub(super) size: u32,
    pub(super) eps: f32,
}

impl CudaNorm {
    pub(super) fn load(
        spec: &NormSpec,
        src: &dyn SliceReader,
        gpu: &Gpu,
        staging: &mut StagingRing,
    ) -> Result<Self> {
        let mut values = vec![0.0; spec.size];
        let shape = [spec.size];
        let slice =
            TensorSlice { tensor: &spec.tensor, shape: &shape, rows: 0..spec.size, cols: 0..1 };
        src.read_f32(&slice, &mut values)?;
        let weight = gpu.alloc(spec.size * DType::F32.size_bytes())?;
        staging.send_values(gpu, weight.ptr(), &values, DType::F32)?;
        Ok(Self { weight, size: spec.size as u32, eps: spec.eps as f32 })
    }
}
