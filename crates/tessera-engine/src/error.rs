//! What can go wrong: in a rank, in an executor, at start-up, for one sequence.

use tessera_kernels::KernelError;
use tessera_model::ModelError;
use tessera_scheduler::{AddError, ApplyError, ConfigError, TableError};
use tessera_types::{EmbeddingKey, Epoch, Rank, SequenceId, StepId};

use crate::executor::PlanSinkError;
use crate::grammar::GrammarError;

/// Why a rank cannot go on in its epoch, or could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    #[error("the plan contradicts the sequence table")]
    Table(#[from] TableError),
    #[error("the backend failed")]
    Kernel(#[source] Box<KernelError>),
    #[error("the model could not be loaded")]
    Model(#[source] Box<ModelError>),
    #[error("the rank has joined no epoch")]
    NoEpoch,
    #[error("step {got} arrived where {expected} was due")]
    OutOfOrder { expected: StepId, got: StepId },
    #[error("sequence {sequence} needs the embedding {key}, which is not here")]
    EmbeddingMissing { sequence: SequenceId, key: EmbeddingKey },
    #[error("the backend does not accept blocks of {block_size} tokens")]
    BlockSize { block_size: u32 },
    #[error("the thread of the rank could not be started")]
    Spawn(#[source] std::io::Error),
    #[error("the thread of the rank ended while loading")]
    LoadPanicked,
}

impl From<KernelError> for RankError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(Box::new(error))
    }
}

impl From<ModelError> for RankError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}

/// Why a step, or the change of an epoch, failed. All but [`ExecutorError::NotReady`] end the epoch.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The step has not completed by the deadline; ask again.
    #[error("step {step} has not completed yet")]
    NotReady { step: StepId },
    #[error("rank {rank} failed")]
    Rank { rank: Rank, source: RankError },
    /// The thread ended: it panicked.
    #[error("rank {rank} is gone")]
    RankGone { rank: Rank },
    /// A rank does not take commands and the epoch was aborted, or the caller may not wait.
    #[error("the queue of rank {rank} is full")]
    QueueFull { rank: Rank },
    /// After an abort, ranks did not come back in time: the process has to end.
    #[error("ranks {ranks:?} did not leave the epoch")]
    Hung { ranks: Vec<Rank> },
    #[error("{got} communicators for {expected} local ranks")]
    Communicators { expected: usize, got: usize },
    #[error("step {got} was collected where {expected:?} was due")]
    OutOfOrder { expected: Option<StepId>, got: StepId },
    #[error("the plan stream ended")]
    PlanSink(#[from] PlanSinkError),
    #[error("the model failed")]
    Fake(#[from] tessera_scheduler::FakeModelError),
}

/// An engine that cannot start, or an epoch that cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{field} must be at least 1")]
    Config { field: &'static str },
    #[error("invalid scheduler limits")]
    Scheduler(#[from] ConfigError),
    #[error("a thread of the engine could not be started")]
    Spawn(#[source] std::io::Error),
    #[error("the executor failed")]
    Executor(#[from] ExecutorError),
    #[error("the step's output does not fit the plan")]
    Output(#[from] ApplyError),
    /// The flag was set: by the leader's protocol, by a failed collective, or by the operator.
    #[error("epoch {epoch} was aborted: {reason}")]
    Aborted { epoch: Epoch, reason: String },
    #[error("epoch {running} still runs")]
    EpochRuns { running: Epoch },
    #[error("the group has no epoch")]
    NoEpoch,
    #[error("a step of the warm-up was refused")]
    WarmUp(#[source] SequenceError),
    #[error("the canary was refused or lost")]
    Canary(#[source] SequenceError),
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// Why a sequence ended without a finish reason.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SequenceError {
    #[error("the request was refused")]
    Refused(#[from] AddError),
    #[error("token {token} at index {index} is not in the vocabulary of {vocab_size}")]
    UnknownToken { token: u32, index: usize, vocab_size: u32 },
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    #[error("its embeddings take {bytes} bytes, the decoder holds at most {max_bytes}")]
    EmbeddingsTooLarge { bytes: u64, max_bytes: u64 },
    #[error("media item {item} failed: {reason}")]
    Media { item: u32, reason: String },
    #[error("the embedding of media item {item} has {got} values, expected {expected}")]
    EmbeddingShape { item: u32, expected: u64, got: u64 },
    /// The same request may be tried elsewhere, or in the next epoch.
    #[error("the group was lost in epoch {epoch}: {reason}")]
    GroupLost { epoch: Epoch, reason: String },
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// A command that did not reach the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The inbox is full; the same command may succeed in a few milliseconds.
    #[error("the engine's inbox is full")]
    Busy,
    #[error("the engine has stopped")]
    Stopped,
}

/// An error and its sources on one line, for reasons that travel as text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
