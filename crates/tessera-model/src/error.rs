//! What can go wrong between a model directory and a running model. Start-up errors name the file and
//! the field or tensor.

use std::io;
use std::path::PathBuf;

use tessera_kernels::{KernelError, WeightError};

use crate::split::SplitError;

/// Result of loading or running a model.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{}: cannot be read", file.display())]
    File {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: not valid JSON", file.display())]
    Json {
        file: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{}: {field} {reason}", file.display())]
    Config { file: PathBuf, field: String, reason: String },
    #[error("{}: {field}: {what} is not supported", file.display())]
    Unsupported { file: PathBuf, field: String, what: String },
    #[error("{}: neither model.safetensors nor model.safetensors.index.json", directory.display())]
    NoCheckpoint { directory: PathBuf },
    #[error("{}: {reason}", file.display())]
    Checkpoint { file: PathBuf, reason: String },
    #[error(
        "{}: pre-sharded for tensor parallel degree {found}, but {expected} is asked for; use that degree, \
         or shard the published checkpoint again",
        directory.display()
    )]
    ShardDegree { directory: PathBuf, found: u32, expected: u32 },
    #[error("{}: exists and is not an empty directory", directory.display())]
    OutputExists { directory: PathBuf },
    #[error("{}: cannot be written", file.display())]
    Write {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Split(#[from] SplitError),
    #[error(transparent)]
    Weight(#[from] WeightError),
    #[error(transparent)]
    Kernel(KernelError),
    #[error("media item {item} of the batch: {reason}")]
    VisionItem { item: usize, reason: String },
    #[error("a vision batch of {patches} patches exceeds the planned {max_patches}")]
    VisionBatch { patches: u64, max_patches: u32 },
}

impl From<KernelError> for ModelError {
    /// A bad weight is the same error whether the model or the backend came upon it.
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Weight(error) => Self::Weight(error),
            error => Self::Kernel(error),
        }
    }
}
