//! The two halves of a step, whoever computes them.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use tessera_collective::{AbortHandle, Communicator};
use tessera_types::{EmbeddingKey, Epoch, LateInputs, StepId, StepOutput, StepPlan};

use crate::error::ExecutorError;

/// Result of an executor.
pub type Result<T, E = ExecutorError> = std::result::Result<T, E>;

/// Computes the steps of one engine: local ranks with or without followers, or a model made of hashes.
///
/// Calls come in the order of the turn: `forward(n)`, then `collect(n − 1)` if depth is 2, then
/// `sample(n)`. An embedding is installed before the first plan that reads it and dropped after the last
/// was forwarded. An error other than [`ExecutorError::NotReady`] ends the epoch; the engine then aborts
/// and calls [`Executor::end_epoch`].
pub trait Executor: Send {
    /// Joins an epoch: installs communicators, allocates KV. Weights and embeddings stay as they are.
    fn begin_epoch(&mut self, start: EpochStart) -> Result<()>;

    /// Leaves the epoch, after its abort: drops steps, communicators and KV. Bounded in time.
    ///
    /// # Errors
    /// [`ExecutorError::Hung`]: a rank did not come back; nothing can be computed any more.
    fn end_epoch(&mut self) -> Result<()>;

    /// Enqueues the first half of a step; tokens may come from device slots.
    fn forward(&mut self, plan: &Arc<StepPlan>) -> Result<()>;

    /// Enqueues the second half: masks and edits that may depend on the previous step's tokens.
    fn sample(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<()>;

    /// Waits for a step to complete.
    ///
    /// # Errors
    /// [`ExecutorError::NotReady`] at the deadline: the step goes on and can be collected again.
    fn collect(&mut self, step: StepId, deadline: Instant) -> Result<StepOutput>;

    /// Gives rank 0 an embedding `[rows, hidden]`, row-major f32.
    fn install_embedding(&mut self, key: EmbeddingKey, rows: Arc<[f32]>) -> Result<()>;

    /// Takes it away.
    fn drop_embedding(&mut self, key: EmbeddingKey) -> Result<()>;
}

/// What an epoch begins with.
pub struct EpochStart {
    pub epoch: Epoch,
    /// KV blocks of every rank: the minimum over ranks, agreed in the epoch.
    pub num_blocks: u32,
    /// Ends the epoch from any thread. The communicators were made with it.
    pub abort: AbortHandle,
    /// One per local rank, by ascending rank.
    pub communicators: Vec<Communicator>,
    /// Where plans go for followers in other processes. `None`: all ranks are local.
    pub plans: Option<Box<dyn PlanSink>>,
}

impl fmt::Debug for EpochStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EpochStart")
            .field("epoch", &self.epoch)
            .field("num_blocks", &self.num_blocks)
            .field("communicators", &self.communicators)
            .field("has_followers", &self.plans.is_some())
            .finish_non_exhaustive()
    }
}

/// The leader's end of the plan streams of one epoch, one for all followers. Calls must not wait: a
/// follower lags by two steps at most, so a full queue means a broken stream.
pub trait PlanSink: Send {
    fn plan(&mut self, plan: &Arc<StepPlan>) -> Result<(), PlanSinkError>;
    fn late(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<(), PlanSinkError>;
}

/// A plan that could not be sent. The stream is never reopened in its epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanSinkError {
    #[error("a follower does not take plans: its queue is full")]
    Full,
    #[error("a follower left: {reason}")]
    Closed { reason: String },
}
