//! The words every other crate shares: ids, hashes, token positions, sampling parameters and the
//! step plan. Plain data only: no clock, no I/O, no tensors, no policy.
//!
//! Invariants
//! - A type lives here only if two layers must agree on it bit for bit.
//! - Construction validates; code that holds a value need not check it again.
//!
//! Modules: [`ids`] (newtypes), [`hash`] (256-bit content hashes), [`prompt`] (tokens, media spans,
//! M-RoPE positions), [`sampling`] (parameters and their ranges), [`grammar`] (what output is constrained to),
//! [`plan`] (what a step does and what it produced), [`finish`] (why a sequence ended).

pub mod finish;
pub mod grammar;
pub mod hash;
pub mod ids;
pub mod plan;
pub mod prompt;
pub mod sampling;

pub use finish::FinishReason;
pub use grammar::Grammar;
pub use hash::{BlockKey, EmbeddingKey, Hash256, MediaId, ModelFingerprint, NumericsId};
pub use ids::{
    Attempt, BlockId, Epoch, InstanceId, Rank, SequenceId, SequenceSlot, StepId, TenantId, TokenId,
};
pub use plan::{
    AdmittedSequence, BlockCopy, LateInputs, PromptLogprobs, SampledToken, ScheduledSequence,
    StepOutput, StepPlan, TokenLogprobs, TokenMask,
};
pub use prompt::{GridThw, MediaKind, MediaSpan, PositionSpan, Prompt, PromptError};
pub use sampling::{SamplingError, SamplingParams};
