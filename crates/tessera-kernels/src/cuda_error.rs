//! What can go wrong between this program and a GPU. Known in every build, so that settings that name a GPU are
//! answered the same way whether or not the CUDA backend was built in.

use std::fmt;

/// A CUDA version as the driver numbers it: 1000 · major + 10 · minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CudaVersion(pub u32);

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// A GPU that cannot be used, or a call to it that failed. One line each: this is what a user sees at start-up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("this program was built without CUDA; `make cuda` builds it with")]
    NotBuilt,
    #[error("no NVIDIA driver: libcuda.so.1 is not on this machine's library path")]
    DriverMissing,
    #[error("the NVIDIA driver offers CUDA {found}; {needed} is needed (driver 580 or newer)")]
    DriverTooOld { found: CudaVersion, needed: CudaVersion },
    #[error("the NVIDIA driver is there but finds no GPU")]
    NoGpu,
    #[error("there is no GPU {ordinal}: the driver lists {count}, numbered from 0")]
    NoSuchGpu { ordinal: u32, count: u32 },
    #[error(
        "GPU {ordinal} ({name}) has compute capability {major}.{minor}; 8.0 is the lowest that works"
    )]
    ArchitectureTooOld { ordinal: u32, name: String, major: u32, minor: u32 },
    #[error("{library} was not found; put the folder that holds {file} on the library path")]
    LibraryMissing { library: &'static str, file: &'static str },
    #[error("{library} {found} is too old: {needed} is needed")]
    LibraryTooOld { library: &'static str, found: CudaVersion, needed: CudaVersion },
    #[error(
        "GPU {ordinal} has no memory for {asked_bytes} bytes: {free_bytes} of {total_bytes} are free"
    )]
    OutOfMemory { ordinal: u32, asked_bytes: usize, free_bytes: usize, total_bytes: usize },
    #[error("{call} failed: {name} ({code})")]
    Call { call: &'static str, name: String, code: u32 },
}
