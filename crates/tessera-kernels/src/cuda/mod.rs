//! The CUDA backend: own kernels, products by cuBLASLt, one stream per rank.
//!
//! Foundation: `library` (what the machine has), `device` (one GPU as one rank uses it), `memory`, `event`, `graph_capture`,
//! `module` (the kernels and how one is launched).
//!
//! The backend: `rank` (its state, steps as a whole), `backend` (the operations), `slots`, `step` and `uploaded` (a
//! step's inputs), `staging`, `scratch`, `linear` and `norm` (weights), `gemm` (products), `kv`, `graph` (captured
//! steps), `collective`, `drawing` (on the device by `sampler`, else by `host_sampler`), `layer_counter`; `limits`
//! measures a GPU; the launches of own kernels: `elements`, `attention`.
//!
//! | what | [`CudaFormat::Bf16`](crate::CudaFormat) | [`CudaFormat::F32`](crate::CudaFormat) |
//! |---|---|---|
//! | weights, activations, keys and values, probabilities | BF16 | f32 |
//! | products and sums, softmax, norms, rotary tables | f32 | f32 |
//! | residual, partial sums over ranks, logits, visual rows | f32 | f32 |
#![allow(unsafe_code)]

mod attention;
mod backend;
mod collective;
mod device;
mod drawing;
mod elements;
mod event;
mod gemm;
mod graph;
mod graph_capture;
mod host_sampler;
mod kv;
mod layer_counter;
mod library;
mod limits;
mod linear;
mod memory;
mod module;
mod norm;
mod rank;
mod sampler;
mod scratch;
mod slots;
mod staging;
mod step;
mod uploaded;

use self::device::DevicePtr;

pub use self::device::{check_machine as check, memory};
pub use self::kv::CudaKv;
pub use self::limits::GpuLimits;
pub use self::linear::CudaLinear;
pub use self::module::kernels;
pub use self::norm::CudaNorm;
pub use self::rank::{CudaBackend, CudaTicket};
pub use crate::device::CudaOptions;

/// Opens a GPU for one rank.
///
/// # Errors
/// No driver or library, or too old a one; no such GPU; too little memory.
pub fn open(options: &CudaOptions) -> crate::error::Result<CudaBackend> {
    CudaBackend::with_options(options)
}

/// Name in [`Caps`](crate::Caps), logs and errors.
const NAME: &str = "cuda";
