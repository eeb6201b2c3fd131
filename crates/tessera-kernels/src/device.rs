//! Which backend computes, as settings and flags name it.

use std::fmt;
use std::str::FromStr;

use crate::cpu::CpuFormat;

/// A backend and the format of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// f32 on the host, slow and obviously right: [`crate::ReferenceBackend`].
    Reference,
    /// SIMD kernels on the host: [`crate::CpuBackend`].
    Cpu(CpuFormat),
    /// NVIDIA GPUs: [`crate::cuda`]. Known in every build; whether it was built in shows when it is opened.
    Cuda(CudaDevice),
}

/// In which numbers the CUDA backend keeps weights, activations and KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CudaFormat {
    Bf16,
    /// For comparison with the reference: exact, slow, twice the memory.
    F32,
}

/// How one rank computes on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaOptions {
    /// Number of the GPU, in the driver's order.
    pub ordinal: u32,
    pub format: CudaFormat,
    /// Rows have the same bits in every batch, at some cost in speed.
    pub deterministic: bool,
}

/// Most GPUs that a name lists: more than one machine has.
const MAX_GPUS: usize = 16;

/// GPUs of this machine, one for each rank of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CudaDevice {
    pub format: CudaFormat,
    /// The first `num_listed` count, the others are 0.
    listed: [u8; MAX_GPUS],
    num_listed: u8,
}

impl CudaDevice {
    /// Rank by rank: the first on GPU 0, the second on GPU 1 and so on.
    pub const fn in_order(format: CudaFormat) -> Self {
        Self { format, listed: [0; MAX_GPUS], num_listed: 0 }
    }

    /// GPUs that the name lists; empty if they are taken in order. A GPU may be listed twice.
    pub fn listed(&self) -> &[u8] {
        &self.listed[..usize::from(self.num_listed)]
    }

    /// GPU of the process's rank `index`, from 0. Ranks beyond the list begin it again.
    pub fn ordinal(&self, index: usize) -> u32 {
        match self.listed() {
            [] => u32::try_from(index).unwrap_or(u32::MAX),
            listed => listed[index % listed.len()].into(),
        }
    }

    /// The GPUs of `num_ranks` ranks from `first` on, listed: what one of several processes takes.
    pub fn part(&self, first: usize, num_ranks: usize) -> Self {
        let mut part = Self::in_order(self.format);
        for index in first..first + num_ranks.min(MAX_GPUS) {
            part.listed[usize::from(part.num_listed)] =
                u8::try_from(self.ordinal(index)).unwrap_or(u8::MAX);
            part.num_listed += 1;
        }
        part
    }

    /// How the process's rank `index` computes.
    pub fn options(&self, index: usize, deterministic: bool) -> CudaOptions {
        CudaOptions { ordinal: self.ordinal(index), format: self.format, deterministic }
    }

    /// Reads what follows the backend's name: nothing, or a colon and numbers.
    fn parse(format: CudaFormat, list: &str) -> Option<Self> {
        let mut device = Self::in_order(format);
        if list.is_empty() {
            return Some(device);
        }
        for ordinal in list.strip_prefix(':')?.split(',') {
            *device.listed.get_mut(usize::from(device.num_listed))? = ordinal.parse().ok()?;
            device.num_listed += 1;
        }
        Some(device)
    }
}

/// A name that is no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown device {name:?}; there are reference, cpu (BF16 weights), cpu-f32, cuda (BF16), cuda-f32, and cuda:0,1 to \
     choose GPUs"
)]
pub struct UnknownDevice {
    pub name: String,
}

impl Default for Device {
    /// SIMD kernels with BF16 weights: what everyone without a GPU runs.
    fn default() -> Self {
        Self::Cpu(CpuFormat::Bf16)
    }
}

impl Device {
    const ALL: [(&'static str, Self); 5] = [
        ("reference", Self::Reference),
        ("cpu", Self::Cpu(CpuFormat::Bf16)),
        ("cpu-f32", Self::Cpu(CpuFormat::F32)),
        ("cuda", Self::Cuda(CudaDevice::in_order(CudaFormat::Bf16))),
        ("cuda-f32", Self::Cuda(CudaDevice::in_order(CudaFormat::F32))),
    ];

    /// The same backend, with the GPUs it takes in order.
    fn without_list(self) -> Self {
        match self {
            Self::Cuda(device) => Self::Cuda(CudaDevice::in_order(device.format)),
            Self::Reference | Self::Cpu(_) => self,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = self.without_list();
        let entry = Self::ALL.iter().find(|(_, device)| *device == backend);
        f.write_str(entry.expect("every device is listed").0)?;
        let Self::Cuda(device) = self else { return Ok(()) };
        for (index, ordinal) in device.listed().iter().enumerate() {
            write!(f, "{}{ordinal}", if index == 0 { ':' } else { ',' })?;
        }
        Ok(())
    }
}

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        let (backend, list) = name.split_at(name.find(':').unwrap_or(name.len()));
        let entry = Self::ALL.iter().find(|(known, _)| *known == backend);
        let device = entry.and_then(|(_, device)| match device {
            Self::Cuda(device) => CudaDevice::parse(device.format, list).map(Self::Cuda),
            Self::Reference | Self::Cpu(_) => list.is_empty().then_some(*device),
        });
        device.ok_or_else(|| UnknownDevice { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_parsing_and_others_are_refused() {
        for (name, device) in Device::ALL {
            assert_eq!(name.parse(), Ok(device));
            assert_eq!(device.to_string(), name);
        }
        for name in ["gpu", "cpu:0", "cuda:", "cuda:0,", "cuda:x", "cuda:-1", "cuda:256", "cuda 0"]
        {
            assert!(
                name.parse::<Device>().is_err_and(|error| error.to_string().contains(name)),
                "{name}"
            );
        }
        assert!(format!("cuda:{}", ["0"; 17].join(",")).parse::<Device>().is_err());
    }

    #[test]
    fn gpus_are_those_listed_or_in_order() {
        let device = |name: &str| match name.parse() {
            Ok(Device::Cuda(device)) => device,
            other => panic!("{other:?}"),
        };
        assert_eq!(Device::Cuda(device("cuda-f32:3,0")).to_string(), "cuda-f32:3,0");
        assert_eq!(device("cuda-f32:3,0").format, CudaFormat::F32);
        assert_eq!([0, 1, 2].map(|rank| device("cuda:3,0").ordinal(rank)), [3, 0, 3]);
        assert_eq!([0, 1, 2].map(|rank| device("cuda").ordinal(rank)), [0, 1, 2]);
        assert_eq!(device("cuda").part(2, 2), device("cuda:2,3"));
        assert_eq!(device("cuda:5").part(2, 2), device("cuda:5,5"));
    }
}
