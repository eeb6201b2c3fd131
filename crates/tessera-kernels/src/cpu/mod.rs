//! The CPU backend: own SIMD kernels over packed weights, several threads.
//!
//! It computes at once, in the calling thread and the helpers of its pool, so a ticket is the finished
//! result. Slots hold f32; values are rounded where a product reads them.
//!
//! | what | [`CpuFormat::Bf16`] | [`CpuFormat::F32`] |
//! |---|---|---|
//! | weights, GEMM inputs | BF16, to nearest even | f32 |
//! | queries, keys and values (in the cache too), probabilities | BF16 | f32 |
//! | products and sums, softmax, rotary tables, biases, epilogues | f32 | f32 |
//! | mean of squares of a norm | f64 | f64 |
//! | residual, partial sums over ranks, logits, visual rows | f32 | f32 |
//!
//! Bits depend on the format, the instruction set ([`Path`]) and the number of ranks, and never on threads,
//! batch, chunks or block ids: `gemm` and `attention` say how.
//!
//! Modules: `backend` (the operations), `gemm` (the product), `linear`, `pack` (loading), `paged`, `segments`,
//! `attention`, `softmax` and `products`, `kv`, `norm`, `rope`; under them `isa` (instruction sets), `word`
//! (formats), `pool` (threads), `memory`, `scratch` and `compute`; [`CpuLimits`] measures the machine.

mod attention;
mod backend;
mod compute;
mod gemm;
mod isa;
mod kv;
mod limits;
mod linear;
mod memory;
mod norm;
mod pack;
mod paged;
mod pool;
mod products;
mod rope;
mod scratch;
mod segments;
mod softmax;
mod word;

use tessera_types::{Hash256, NumericsId};

use self::compute::Compute;
use self::memory::Buffer;
use self::rope::AngleTable;
use crate::act::DType;
use crate::backend::{Caps, HeadShape, RopeSpec};
use crate::error::{KernelError, Result};
use crate::inputs::Readback;
use crate::reference::host::HostState;

pub use self::isa::Path;
pub use self::kv::CpuKv;
pub use self::limits::CpuLimits;
pub use self::linear::CpuLinear;
pub use self::norm::CpuNorm;
pub use self::word::CpuFormat;

/// Name in [`Caps`], logs and errors.
const NAME: &str = "cpu";

/// A finished step. Steps end in the order of submission.
#[derive(Debug)]
pub struct CpuTicket(Readback);

/// The host backend with packed weights. One per rank thread.
#[derive(Debug)]
pub struct CpuBackend {
    caps: Caps,
    format: CpuFormat,
    compute: Compute,
    host: HostState,
    /// Partial result of a row-parallel linear, which the ranks sum.
    partial: Buffer<f32>,
    decoder_angles: AngleTable<(RopeSpec, u32)>,
    vision_angles: AngleTable<HeadShape>,
}

impl CpuBackend {
    /// A backend without slots, weights or peers, on the fastest path of this machine. `threads` counts
    /// the rank thread itself; more than the cores that this rank has for itself only get in each other's way.
    ///
    /// # Errors
    /// No threads, or some that could not be started.
    pub fn new(threads: usize, format: CpuFormat) -> Result<Self> {
        Self::with_path(threads, format, Path::detect())
    }

    /// The same on a chosen path.
    ///
    /// # Errors
    /// As [`CpuBackend::new`]; instructions that this machine does not have.
    pub fn with_path(threads: usize, format: CpuFormat, path: Path) -> Result<Self> {
        if threads == 0 {
            let (operation, what) = ("cpu backend", "number of threads");
            return Err(KernelError::Shape { operation, what, expected: 1, found: 0 });
        }
        if !path.is_available() {
            let what = format!("the instructions {} on this machine", path.name());
            return Err(KernelError::Unsupported { backend: NAME, what });
        }
        let dtype = match format {
            CpuFormat::Bf16 => DType::Bf16,
            CpuFormat::F32 => DType::F32,
        };
        let caps = Caps {
            name: NAME,
            weight_dtypes: vec![dtype],
            activation_dtype: DType::F32,
            kv_dtype: dtype,
            block_sizes: Vec::new(),
            decode_buckets: Vec::new(),
            numerics_id: numerics_id(path, dtype),
        };
        Ok(Self {
            caps,
            format,
            compute: Compute::new(path, threads)?,
            host: HostState::new(NAME),
            partial: Buffer::zeroed(0)?,
            decoder_angles: AngleTable::default(),
            vision_angles: AngleTable::default(),
        })
    }

    /// The instructions in use.
    pub fn path(&self) -> Path {
        self.compute.path
    }
}

/// Hash of build, backend, instruction set, weight format and types (ENGINE §3).
fn numerics_id(path: Path, dtype: DType) -> NumericsId {
    let mut hasher = blake3::Hasher::new();
    let version = env!("CARGO_PKG_VERSION");
    // Weights are dense; activations, KV and weights share the type.
    for part in [version, NAME, std::env::consts::ARCH, path.name(), "dense", dtype.name()] {
        hasher.update(part.as_bytes());
        hasher.update(&[0]);
    }
    NumericsId(Hash256(*hasher.finalize().as_bytes()))
}
