//! The device boundary: the [`Backend`] trait and its implementations.
//!
//! Invariants
//! - The model speaks to a device only through [`Backend`]; no backend type is named above this crate.
//! - Operations take planned slots and data uploaded before the step: they neither allocate nor read
//!   host data, so that a step can be captured once and replayed.
//! - A row of a result depends on that row's inputs alone, bit for bit: not on its neighbours in the
//!   batch, on how a prompt was cut into chunks, on block ids, or on the number of threads.
//! - All weights come through [`SliceReader`], which reads the rank's own slices only.
//!
//! Modules: [`backend`] (the trait), [`act`] (slots and handles), [`inputs`] (a step's data),
//! [`weights`] (what to load), [`progress`] (the layer counter), [`reference`](mod@reference) (f32 on
//! the host), [`cpu`] (SIMD kernels on packed weights), [`sampling`] (drawing a token from a row of logits),
//! [`cuda`] (NVIDIA GPUs, with the feature of that name; [`cuda_check`] and [`cuda_error`] say what is missing),
//! [`timed`] (a backend that measures another), [`error`].

pub mod act;
pub mod backend;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda_absent.rs"]
pub mod cuda;
pub mod cuda_check;
pub mod cuda_error;
pub mod device;
pub mod error;
pub mod inputs;
pub mod progress;
pub mod reference;
pub mod sampling;
pub mod timed;
pub mod weights;

pub use act::{Act, ActKind, DType, SlotId, SlotSpec};
pub use backend::{
    Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, RopeSpec, Segments, StepKind,
    YarnSpec,
};
pub use cpu::{CpuBackend, CpuFormat};
pub use cuda_check::{CudaCheck, CudaLibrary, GpuInfo, KernelFile, KernelResources};
pub use cuda_error::{CudaError, CudaVersion};
pub use device::{CudaDevice, CudaFormat, CudaOptions, Device, UnknownDevice};
pub use error::{KernelError, Result, WeightError};
pub use inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits,
    TokenSource, VisionInputs,
};
pub use progress::Progress;
pub use reference::ReferenceBackend;
pub use timed::{OpTime, Timed};
pub use weights::{
    LinearPart, LinearSpec, NormSpec, PartLayout, SliceReader, TensorSlice, WeightFormat,
};
