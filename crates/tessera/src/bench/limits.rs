//! What the machine can do, measured beside every figure.

use std::time::Duration;

use serde::{Serialize, Serializer};
use tessera_kernels::cpu::{CpuLimits, Path};
use tessera_kernels::cuda::GpuLimits;
use tessera_kernels::{CpuFormat, CudaFormat, DType, Device};

use super::error::BenchError;
use super::stats::Spread;
use super::work::Work;

/// Bytes that are read to measure bandwidth: several times any cache.
const READ_BYTES: usize = 256 << 20;
/// Reads of which the median counts.
const READS: usize = 3;
/// Time for which arithmetic is measured.
const MULTIPLY_TIME: Duration = Duration::from_millis(40);

/// Both limits at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Limits {
    pub read_bytes_per_second: f64,
    pub flops: f64,
}

/// Measures the limits with the threads, instructions and number format of the backend under test.
#[derive(Debug)]
pub struct LimitMeter(Machine);

/// What is measured.
#[derive(Debug)]
enum Machine {
    Cpu(CpuLimits),
    /// The first GPU of the device.
    Gpu(GpuLimits),
}

impl LimitMeter {
    /// # Errors
    /// No memory, no threads.
    pub fn new(device: Device, threads: usize) -> Result<Self, BenchError> {
        let on_cpu = |format| CpuLimits::new(threads, format, Path::detect(), READ_BYTES);
        Ok(Self(match device {
            Device::Reference => Machine::Cpu(on_cpu(CpuFormat::F32)?),
            Device::Cpu(format) => Machine::Cpu(on_cpu(format)?),
            Device::Cuda(gpu) => Machine::Gpu(GpuLimits::new(gpu.format, gpu.ordinal(0))?),
        }))
    }

    /// Measures both limits now. The engine must be idle.
    ///
    /// # Errors
    /// A GPU failed.
    pub fn measure(&self) -> Result<Limits, BenchError> {
        Ok(match &self.0 {
            Machine::Cpu(cpu) => {
                let reads = (0..READS).map(|_| cpu.read_bytes_per_second());
                Limits {
                    read_bytes_per_second: Spread::of(reads).median,
                    flops: cpu.multiply_flops(MULTIPLY_TIME),
                }
            }
            Machine::Gpu(gpu) => Limits {
                read_bytes_per_second: gpu.copy_bytes_per_second()?,
                flops: gpu.multiply_flops()?,
            },
        })
    }

    /// Runs `body` between two measurements and returns their mean with its result.
    ///
    /// # Errors
    /// Those of `body`; a GPU failed.
    pub fn around<T>(
        &self,
        body: impl FnOnce() -> Result<T, BenchError>,
    ) -> Result<(Limits, T), BenchError> {
        let before = self.measure()?;
        let result = body()?;
        let after = self.measure()?;
        let limits = Limits {
            read_bytes_per_second: (before.read_bytes_per_second + after.read_bytes_per_second)
                / 2.0,
            flops: (before.flops + after.flops) / 2.0,
        };
        Ok((limits, result))
    }
}

/// For reports.
pub fn device_as_text<S: Serializer>(device: &Device, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(device)
}

/// Type of weights and KV.
pub fn dtype_of(device: Device) -> DType {
    let is_bf16 = match device {
        Device::Reference => false,
        Device::Cpu(format) => format == CpuFormat::Bf16,
        Device::Cuda(gpu) => gpu.format == CudaFormat::Bf16,
    };
    if is_bf16 { DType::Bf16 } else { DType::F32 }
}

/// One measurement and the limits around it.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    pub seconds: f64,
    pub limits: Limits,
}

/// Several pairs of the same work.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Paired {
    pub num_pairs: usize,
    pub ms: Spread,
    pub limit_ms: Spread,
    /// Of the limit's speed; 1 is the machine's limit.
    pub share: Spread,
    /// What the limit is made of: `memory` or `compute`.
    pub bound: &'static str,
    pub read_gb_per_second: f64,
    pub peak_gflops: f64,
    pub flops: f64,
    pub bytes: f64,
}

impl Paired {
    /// Shares are taken pair by pair.
    pub fn of(work: Work, pairs: &[Pair]) -> Self {
        let spread = |value: &dyn Fn(&Pair) -> f64| Spread::of(pairs.iter().map(value));
        let limits = Limits {
            read_bytes_per_second: spread(&|pair| pair.limits.read_bytes_per_second).median,
            flops: spread(&|pair| pair.limits.flops).median,
        };
        Self {
            num_pairs: pairs.len(),
            ms: spread(&|pair| pair.seconds * 1e3),
            limit_ms: spread(&|pair| work.seconds(&pair.limits) * 1e3),
            share: spread(&|pair| work.seconds(&pair.limits) / pair.seconds),
            bound: work.bound(&limits),
            read_gb_per_second: limits.read_bytes_per_second / 1e9,
            peak_gflops: limits.flops / 1e9,
            flops: work.flops,
            bytes: work.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_nearer_limit_and_taken_pair_by_pair() {
        let work = Work { flops: 100.0, bytes: 10.0 };
        let limits = |read_bytes_per_second, flops| Limits { read_bytes_per_second, flops };
        let pairs = [
            // Reading takes 1 s, multiplying 0.1 s.
            Pair { seconds: 2.0, limits: limits(10.0, 1000.0) },
            Pair { seconds: 4.0, limits: limits(5.0, 1000.0) },
            // Here multiplying takes 4 s.
            Pair { seconds: 8.0, limits: limits(10.0, 25.0) },
        ];
        let paired = Paired::of(work, &pairs);
        assert_eq!(paired.share, Spread { median: 0.5, p10: 0.5, p90: 0.5 });
        assert_eq!((paired.ms.median, paired.limit_ms.median), (4000.0, 2000.0));
        assert_eq!(paired.bound, "memory");
    }
}
