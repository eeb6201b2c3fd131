//! Which libraries of NVIDIA this machine has, asked before anything is called: cudarc panics on a library that
//! is not there, so nothing of it may run before [`driver`] or [`cublaslt`] has said yes.

use std::path::PathBuf;

use cudarc::cublaslt;
use cudarc::driver::{DriverError, result, sys};

use crate::cuda_check::CudaLibrary;
use crate::cuda_error::{CudaError, CudaVersion};

/// The oldest driver that takes our kernels: they are made by the compiler of CUDA 13.0.
const NEEDED_DRIVER: CudaVersion = CudaVersion(13_000);
/// The oldest cuBLASLt of the interface that cudarc was generated from.
const NEEDED_CUBLASLT: CudaVersion = CudaVersion(13_000);

/// Loads and initialises the driver.
///
/// # Errors
/// No driver, one that is too old, or one without a GPU.
pub(super) fn driver() -> Result<CudaLibrary, CudaError> {
    // SAFETY: only loads a library and runs its initialisers, as the program's own loader would.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::DriverMissing);
    }
    let mut version = 0;
    // SAFETY: the library is there; the call writes one integer.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) };
    check("cuDriverGetVersion", asked.result())?;
    let version = CudaVersion(version.unsigned_abs());
    if version < NEEDED_DRIVER {
        return Err(CudaError::DriverTooOld { found: version, needed: NEEDED_DRIVER });
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(CudaError::NoGpu),
        initialised => check("cuInit", initialised)?,
    }
    Ok(CudaLibrary { name: "NVIDIA driver", version, path: path_of("libcuda.so") })
}

/// Loads cuBLASLt, the library of matrix products.
///
/// # Errors
/// It is missing or too old.
pub(super) fn cublaslt() -> Result<CudaLibrary, CudaError> {
    const NAME: &str = "cuBLASLt";
    // SAFETY: only loads a library and runs its initialisers, as the program's own loader would.
    if !unsafe { cublaslt::sys::is_culib_present() } {
        return Err(CudaError::LibraryMissing { library: NAME, file: "libcublasLt.so.13" });
    }
    // SAFETY: the library is there, and the call takes and touches nothing.
    let number = unsafe { cublaslt::sys::cublasLtGetVersion() } as u64;
    let version = cublas_version(number);
    if version < NEEDED_CUBLASLT {
        return Err(CudaError::LibraryTooOld {
            library: NAME,
            found: version,
            needed: NEEDED_CUBLASLT,
        });
    }
    Ok(CudaLibrary { name: NAME, version, path: path_of("libcublasLt.so") })
}

/// cuBLAS numbers itself 10000 · major + 100 · minor + patch since version 10.
fn cublas_version(number: u64) -> CudaVersion {
    let (major, minor) = (number / 10_000, number % 10_000 / 100);
    CudaVersion(u32::try_from(major * 1000 + minor * 10).unwrap_or(u32::MAX))
}

/// Where a loaded library lies, from the list of this process's mappings.
fn path_of(file: &str) -> PathBuf {
    let mappings = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    mapped_path(&mappings, file).unwrap_or_default()
}

fn mapped_path(mappings: &str, file: &str) -> Option<PathBuf> {
    mappings.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        let name = path.rsplit('/').next()?;
        name.starts_with(file).then(|| PathBuf::from(path))
    })
}

/// Turns a status of the driver into an error that names the call.
pub(crate) fn check<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
    result.map_err(|error| {
        let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_else(|_| "unknown error".to_owned());
        CudaError::Call { call, name, code: error.0 as u32 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(CudaVersion(13_000).to_string(), "13.0");
        assert_eq!(CudaVersion(12_040).to_string(), "12.4");
        assert_eq!(cublas_version(130_100).to_string(), "13.1");
        assert_eq!(cublas_version(120_903).to_string(), "12.9");
    }

    #[test]
    fn a_library_is_found_among_the_mappings() {
        let mappings = "00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/tessera\n\
                        7f00-7f01 rw-p 00000000 00:00 0 \n\
                        7f02-7f03 r-xp 00000000 08:02 9 /usr/lib/libcuda.so.580.159.03\n";
        let path = mapped_path(mappings, "libcuda.so").unwrap();
        assert_eq!(path, PathBuf::from("/usr/lib/libcuda.so.580.159.03"));
        assert_eq!(mapped_path(mappings, "libcublasLt.so"), None);
    }
}
