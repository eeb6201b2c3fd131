//! What can be wrong: with limits, with a request, with a step's output, with a plan.

use std::ops::Range;

use tessera_types::{
    BlockId, Epoch, PromptError, SamplingError, SequenceId, SequenceSlot, StepId, TenantId,
};

/// Limits that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{field} must be at least 1")]
    Zero { field: &'static str },
    #[error(
        "max_tokens_per_step {max_tokens_per_step} is below the {num_slots} sequences that may run: some \
         would not advance in every step"
    )]
    BudgetBelowSlots { max_tokens_per_step: u32, num_slots: u32 },
    #[error("pipeline_depth must be 1 or 2, got {pipeline_depth}")]
    PipelineDepth { pipeline_depth: u32 },
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AddError {
    /// The same request may succeed later.
    #[error("the queue is full: {max_waiting} sequences are waiting")]
    QueueFull { max_waiting: u32 },
    /// As [`AddError::QueueFull`], while other tenants may still find room.
    #[error(
        "the tenant's share of the queue is full: {max_waiting_per_tenant} of its sequences wait"
    )]
    TenantQueueFull { tenant: TenantId, max_waiting_per_tenant: u32 },
    #[error("sequence {sequence} exists already")]
    Duplicate { sequence: SequenceId },
    #[error("invalid prompt")]
    Prompt(#[from] PromptError),
    #[error("invalid sampling parameters")]
    Sampling(#[from] SamplingError),
    #[error(
        "the prompt of {prompt_tokens} tokens and max_tokens {max_tokens} exceed the context of \
         {max_model_len} tokens"
    )]
    ContextExceeded { prompt_tokens: usize, max_tokens: u32, max_model_len: u32 },
    #[error("{output_tokens} output tokens exist already, more than max_tokens {max_tokens}")]
    OutputBeyondLimit { output_tokens: usize, max_tokens: u32 },
    /// No epoch has begun, or the last one ended.
    #[error("the group has no epoch")]
    NoEpoch,
    #[error("the sequence needs up to {blocks} KV blocks, the cache has {available}")]
    NeverFits { blocks: usize, available: usize },
}

/// A step's output that does not belong to the step in flight. Ends the epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("got the output of step {got}, expected that of {expected:?}")]
    UnexpectedStep { expected: Option<StepId>, got: StepId },
    #[error("step {step} has {got} tokens, expected {expected}")]
    WrongCount { step: StepId, expected: usize, got: usize },
    #[error("step {step}: token {index} belongs to slot {got}, expected {expected}")]
    WrongSlot { step: StepId, index: usize, expected: SequenceSlot, got: SequenceSlot },
    #[error(
        "step {step}: prompt logprobs for {got:?} (slot, prompt tokens), expected {expected:?}"
    )]
    WrongPromptLogprobs {
        step: StepId,
        expected: Vec<(SequenceSlot, Range<usize>)>,
        got: Vec<(SequenceSlot, Range<usize>)>,
    },
}

/// A plan that contradicts the sequence table. Ends the epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    #[error("plan of epoch {got} in epoch {expected}")]
    WrongEpoch { expected: Epoch, got: Epoch },
    #[error("plan of step {got} where {expected} is next")]
    StepGap { expected: StepId, got: StepId },
    #[error("slot {slot} is beyond the table of {num_slots}")]
    SlotOutOfRange { slot: SequenceSlot, num_slots: u32 },
    #[error("slot {slot} holds no sequence")]
    EmptySlot { slot: SequenceSlot },
    #[error("slot {slot} is taken")]
    SlotTaken { slot: SequenceSlot },
    #[error("slot {slot} is scheduled twice in one step")]
    ScheduledTwice { slot: SequenceSlot },
    #[error("block {block} is beyond the cache of {num_blocks}")]
    BlockOutOfRange { block: BlockId, num_blocks: u32 },
    #[error("slot {slot} is scheduled without tokens")]
    NoTokens { slot: SequenceSlot },
    #[error("slot {slot} would have {computed} tokens computed of {known} known")]
    BeyondKnown { slot: SequenceSlot, computed: usize, known: usize },
    #[error("slot {slot} would have {computed} tokens computed in {capacity} places")]
    BlocksTooFew { slot: SequenceSlot, computed: usize, capacity: usize },
    #[error("slot {slot} draws a token after {computed} of {known} tokens")]
    SampleBeforeEnd { slot: SequenceSlot, computed: usize, known: usize },
    #[error("step {step}: table digest {got:016x} differs from the plan's {expected:016x}")]
    DigestMismatch { step: StepId, expected: u64, got: u64 },
}
