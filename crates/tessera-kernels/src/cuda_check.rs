//! What the CUDA backend found on this machine, for people. Known in every build, like [`crate::cuda_error`].

use std::fmt;
use std::path::PathBuf;

use crate::cuda_error::{CudaError, CudaVersion};

/// One library of NVIDIA, loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaLibrary {
    pub name: &'static str,
    pub version: CudaVersion,
    /// File it was loaded from, links followed; empty where the system does not tell.
    pub path: PathBuf,
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// From 0, in the driver's order.
    pub ordinal: u32,
    pub name: String,
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    /// Shared memory that one block may ask for.
    pub shared_bytes: u32,
    pub memory_bytes: usize,
}

/// What one kernel takes of a multiprocessor on sm_90a, as the assembler reported it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelResources {
    pub name: &'static str,
    /// Per thread.
    pub registers: u32,
    /// Per thread: written and read back because registers ran out.
    pub spill_store_bytes: u32,
    pub spill_load_bytes: u32,
    /// Per thread.
    pub stack_bytes: u32,
    /// Per block, beside what a launch asks for.
    pub shared_bytes: u32,
}

/// The kernels of one source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFile {
    pub name: &'static str,
    pub kernels: &'static [KernelResources],
    /// Machine code and PTX.
    pub image_bytes: usize,
}

/// Everything the CUDA backend needs of the machine: there, or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaCheck {
    pub driver: Result<CudaLibrary, CudaError>,
    pub cublaslt: Result<CudaLibrary, CudaError>,
    /// By ordinal; empty without a driver.
    pub gpus: Vec<Result<GpuInfo, CudaError>>,
}

impl CudaCheck {
    /// Whether at least one GPU can be used.
    pub fn is_usable(&self) -> bool {
        self.driver.is_ok() && self.cublaslt.is_ok() && self.gpus.iter().any(Result::is_ok)
    }

    /// What is missing for GPU `ordinal`, the most basic thing first.
    ///
    /// # Errors
    /// The first thing that is missing.
    pub fn require(&self, ordinal: u32) -> Result<(), CudaError> {
        self.driver.as_ref().map_err(Clone::clone)?;
        self.cublaslt.as_ref().map_err(Clone::clone)?;
        let count = u32::try_from(self.gpus.len()).unwrap_or(u32::MAX);
        match self.gpus.get(ordinal as usize) {
            Some(gpu) => gpu.as_ref().map(drop).map_err(Clone::clone),
            None => Err(CudaError::NoSuchGpu { ordinal, count }),
        }
    }
}

impl fmt::Display for CudaLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.name, self.version, self.path.display())
    }
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        write!(
            f,
            "GPU {}: {}, compute capability {major}.{minor}, {} multiprocessors, {gib:.1} GiB",
            self.ordinal, self.name, self.multiprocessors
        )
    }
}

/// One line for each thing that is there or missing.
impl fmt::Display for CudaCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn line<T: fmt::Display>(
            f: &mut fmt::Formatter<'_>,
            found: &Result<T, CudaError>,
        ) -> fmt::Result {
            match found {
                Ok(found) => writeln!(f, "found    {found}"),
                Err(error) => writeln!(f, "missing  {error}"),
            }
        }
        line(f, &self.driver)?;
        if self.cublaslt != Err(CudaError::NotBuilt) {
            line(f, &self.cublaslt)?;
        }
        self.gpus.iter().try_for_each(|gpu| line(f, gpu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: u32) -> GpuInfo {
        GpuInfo {
            ordinal,
            name: "H200".into(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_bytes: 227 << 10,
            memory_bytes: 141 << 30,
        }
    }

    #[test]
    fn the_most_basic_thing_that_is_missing_is_told() {
        let library = CudaLibrary {
            name: "NVIDIA driver",
            version: CudaVersion(13_000),
            path: "/lib/libcuda.so.1".into(),
        };
        let old =
            CudaError::ArchitectureTooOld { ordinal: 1, name: "T4".into(), major: 7, minor: 5 };
        let mut check = CudaCheck {
            driver: Ok(library.clone()),
            cublaslt: Ok(library),
            gpus: vec![Ok(gpu(0)), Err(old.clone())],
        };
        assert_eq!(check.require(0), Ok(()));
        assert_eq!(check.require(1), Err(old));
        assert_eq!(check.require(2), Err(CudaError::NoSuchGpu { ordinal: 2, count: 2 }));
        let text = check.to_string();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.contains("found    NVIDIA driver 13.0 (/lib/libcuda.so.1)"), "{text}");
        assert!(text.contains("missing  GPU 1 (T4) has compute capability 7.5"), "{text}");
        assert!(check.is_usable());

        check.driver = Err(CudaError::DriverMissing);
        check.gpus.clear();
        assert_eq!(check.require(2), Err(CudaError::DriverMissing));
        assert!(!check.is_usable());
    }
}
