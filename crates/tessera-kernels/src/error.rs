//! What can go wrong in a backend.

use std::path::PathBuf;

use tessera_types::SequenceSlot;

use crate::act::{Act, SlotId};
use crate::cuda_error::CudaError;

/// Result of a backend operation.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// A weight that cannot be had. Every variant names file and tensor, since this is what a user sees at
/// start-up.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    #[error("{}: tensor {tensor} is missing", file.display())]
    Missing { file: PathBuf, tensor: String },
    #[error("{}: tensor {tensor} has shape {found:?}, expected {expected:?}", file.display())]
    Shape { file: PathBuf, tensor: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("{}: tensor {tensor} has type {found}, expected one of {expected}", file.display())]
    DType { file: PathBuf, tensor: String, found: String, expected: &'static str },
    #[error("{}: rows {rows:?} and columns {cols:?} of tensor {tensor} are not in this file", file.display())]
    NotHeld {
        file: PathBuf,
        tensor: String,
        rows: std::ops::Range<usize>,
        cols: std::ops::Range<usize>,
    },
    #[error("{}: tensor {tensor} could not be read", file.display())]
    Read {
        file: PathBuf,
        tensor: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: tensor {tensor} holds a value that is not finite at row {row}", file.display())]
    NotFinite { file: PathBuf, tensor: String, row: usize },
}

/// An operation that failed. After any error the step's results are void.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(transparent)]
    Weight(#[from] WeightError),
    #[error("{operation}: the communicator failed")]
    Communicator {
        operation: &'static str,
        #[source]
        source: tessera_collective::CollectiveError,
    },
    #[error("the {backend} backend does not support {what}")]
    Unsupported { backend: &'static str, what: String },
    #[error("activation slot {} was not planned", .0.0)]
    UnknownSlot(SlotId),
    #[error("activation slots {} and {} of one operation overlap", .input.0, .output.0)]
    SlotOverlap { input: SlotId, output: SlotId },
    #[error("activation {act:?} exceeds its slot of {capacity} elements")]
    SlotTooSmall { act: Act, capacity: usize },
    #[error("{operation}: {what} is {found}, expected {expected}")]
    Shape { operation: &'static str, what: &'static str, expected: usize, found: usize },
    #[error("step input {field}: {reason}")]
    Input { field: &'static str, reason: String },
    #[error("sequence slot {slot} holds no sequence")]
    VacantSlot { slot: SequenceSlot },
    #[error("no token can be drawn for sequence slot {slot}")]
    Draw {
        slot: SequenceSlot,
        #[source]
        source: crate::sampling::DrawError,
    },
    #[error("rank 0 could draw no token for sequence slot {slot}")]
    DrawElsewhere { slot: SequenceSlot },
    #[error("{operation}: the host tensor library failed")]
    Host {
        operation: &'static str,
        #[source]
        source: Box<candle_core::Error>,
    },
    #[error("no memory for an array of {bytes} bytes")]
    OutOfMemory {
        bytes: usize,
        #[source]
        source: std::io::Error,
    },
    #[error("{threads} compute threads could not be started")]
    Threads {
        threads: usize,
        #[source]
        source: std::io::Error,
    },
    #[error("{operation}")]
    Cuda {
        operation: &'static str,
        #[source]
        source: CudaError,
    },
    #[error("the step did not complete before its deadline")]
    DeadlineExceeded,
}
