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
}

/// A name that is no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown device {name:?}; there are reference, cpu (BF16 weights) and cpu-f32")]
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
    const ALL: [(&'static str, Self); 3] = [
        ("reference", Self::Reference),
        ("cpu", Self::Cpu(CpuFormat::Bf16)),
        ("cpu-f32", Self::Cpu(CpuFormat::F32)),
    ];
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = Self::ALL.iter().find(|(_, device)| device == self);
        f.write_str(entry.expect("every device is listed").0)
    }
}

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        let entry = Self::ALL.iter().find(|(known, _)| *known == name);
        entry.map(|(_, device)| *device).ok_or_else(|| UnknownDevice { name: name.to_owned() })
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
        assert!("cuda".parse::<Device>().is_err_and(|error| error.to_string().contains("cuda")));
    }
}
