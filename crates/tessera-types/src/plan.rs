//! What one step of the engine does, and what it produced. A plan is the only thing that travels from
//! leader to followers: sequences new-in-full once, then differences (ENGINE §1).
//!
//! Every rank keeps a sequence table fed by plans alone. A token that the table cannot know yet (it is
//! still being sampled) is taken from the slot's last sampled token on the device.

use std::sync::Arc;

use crate::ids::{BlockId, Epoch, SequenceId, SequenceSlot, StepId, TokenId};
use crate::prompt::Prompt;
use crate::sampling::SamplingParams;

/// One step. Apply in this order: release, admit, zero and copy blocks, then compute `scheduled`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepPlan {
    pub epoch: Epoch,
    pub step: StepId,
    /// Slots whose sequences ended, were aborted or preempted. No step in flight names their blocks.
    pub released: Vec<SequenceSlot>,
    pub admitted: Vec<AdmittedSequence>,
    /// Blocks newly taken from the pool, to be zeroed before they are written.
    pub zero_blocks: Vec<BlockId>,
    pub copy_blocks: Vec<BlockCopy>,
    /// Work of this step, in the order of rows in the flattened batch.
    pub scheduled: Vec<ScheduledSequence>,
    /// Digest of the sequence table after this plan was applied; a mismatch ends the epoch.
    pub table_digest: u64,
}

impl StepPlan {
    /// Tokens computed in this step, the rows T of the flattened batch.
    pub fn num_tokens(&self) -> usize {
        self.scheduled.iter().map(|s| s.num_tokens as usize).sum()
    }

    /// Sequences that draw a token in this step, the logit rows R.
    pub fn num_samples(&self) -> usize {
        self.scheduled.iter().filter(|s| s.sample).count()
    }
}

/// A sequence in full, as it takes a slot.
#[derive(Debug, Clone, PartialEq)]
pub struct AdmittedSequence {
    pub slot: SequenceSlot,
    pub sequence: SequenceId,
    pub prompt: Arc<Prompt>,
    /// Output tokens that exist already (a moved or preempted sequence): forced, never drawn again.
    pub output: Vec<TokenId>,
    pub sampling: Arc<SamplingParams>,
    /// Tokens that end the sequence unless `ignore_eos`; the sampler bars them before `min_tokens`.
    pub eos_token_ids: Arc<[TokenId]>,
    /// Effective seed of this choice.
    pub seed: u64,
    /// Leading tokens whose KV the block table already holds (a prefix hit).
    pub num_computed_tokens: u32,
    /// Blocks that hold them.
    pub block_table: Vec<BlockId>,
}

/// A copy of one whole block, for copy-on-write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
}

/// What one sequence does in this step.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduledSequence {
    pub slot: SequenceSlot,
    /// Tokens computed now, following those computed before.
    pub num_tokens: u32,
    /// Blocks appended to the slot's block table before computing.
    pub appended_blocks: Vec<BlockId>,
    /// Draw a token from the last row. Its output index is the number of outputs so far.
    pub sample: bool,
}

/// Per-step inputs that may depend on the previous step's tokens; sent after `forward` was enqueued.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LateInputs {
    /// Allowed tokens per slot (grammars). Slots without an entry are free.
    pub masks: Vec<(SequenceSlot, TokenMask)>,
}

/// One bit per vocabulary id; a clear bit bars the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit i of word i / 64 is token i.
    pub words: Arc<[u64]>,
}

impl TokenMask {
    /// Whether `token` may be drawn; ids beyond the mask may not.
    pub fn allows(&self, token: TokenId) -> bool {
        let word = self.words.get(token as usize / 64).copied().unwrap_or(0);
        word >> (token % 64) & 1 == 1
    }
}

/// Result of a step on the leader.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    pub step: StepId,
    /// One per scheduled sequence with `sample`, in plan order.
    pub tokens: Vec<SampledToken>,
    /// Of sequences with `prompt_logprobs`, in plan order.
    pub prompt_logprobs: Vec<PromptLogprobs>,
}

/// Log probabilities of prompt tokens that were computed in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogprobs {
    pub slot: SequenceSlot,
    pub sequence: SequenceId,
    /// Prompt token of the first entry, at least 1; the others follow it.
    pub first_token: u32,
    pub tokens: Vec<TokenLogprobs>,
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    pub slot: SequenceSlot,
    pub sequence: SequenceId,
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// Natural-log probabilities under the model's own distribution (before temperature, penalties and
/// filters), as OpenAI and vLLM report them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenLogprobs {
    /// Of the drawn (or prompt) token.
    pub logprob: f32,
    /// The most likely tokens, best first, ties by lower id.
    pub top: Vec<(TokenId, f32)>,
}
