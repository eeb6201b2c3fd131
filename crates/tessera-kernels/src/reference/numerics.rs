//! What may change the bits of this backend.

use tessera_types::{Hash256, NumericsId};

/// Hash of build, backend, instruction set and types (ENGINE §3). Thread counts, cache sizes, batch and
/// chunking are not in it, since they change nothing (see `matmul`).
pub(super) fn numerics_id() -> NumericsId {
    let mut hasher = blake3::Hasher::new();
    for part in
        [env!("CARGO_PKG_VERSION"), super::NAME, std::env::consts::ARCH, instruction_set(), "f32"]
    {
        hasher.update(part.as_bytes());
        hasher.update(&[0]);
    }
    NumericsId(Hash256(*hasher.finalize().as_bytes()))
}

/// The path the crate `gemm` takes: it fuses multiply and add where it can.
fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("avx2")
        {
            return "fma";
        }
        "separate multiply and add"
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        "baseline"
    }
}
