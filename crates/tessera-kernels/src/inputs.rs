//! What the host hands to a backend for one step, and what it gets back.

use tessera_types::{
    BlockCopy, BlockId, SampledToken, SamplingParams, SequenceId, SequenceSlot, TokenId,
    TokenLogprobs,
};

/// Largest step a backend must be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepLimits {
    /// Tokens (rows of the flattened batch) of one decoder step; patches of one vision step.
    pub max_tokens: u32,
    /// Sequences in one step, and rows of the sequence table. 0 for a vision tower.
    pub max_sequences: u32,
    /// Blocks in one sequence's block table. 0 for a vision tower.
    pub max_blocks_per_sequence: u32,
    /// Visual rows merged in one step (decoder), or visual rows made in one step (vision tower).
    pub max_visual_rows: u32,
    /// Ids from here on have no token (padding of the vocabulary): their logits are −inf before any
    /// max, softmax or log probability. 0 for a vision tower.
    pub num_real_tokens: u32,
}

/// Bytes that planning set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryReport {
    pub activations_bytes: u64,
    pub inputs_bytes: u64,
}

/// Where the id of a token comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSource {
    Host(TokenId),
    /// The token last sampled for this row of the sequence table, still on the device.
    LastSampled(SequenceSlot),
}

/// All inputs of one decoder step. T tokens, S sequences, R logit rows.
///
/// The token axis may be rounded up: tokens from `cu_q[S]` on belong to no sequence, their
/// `slot_mapping` is −1 and what is computed for them is never read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepInputs {
    /// `[T]`
    pub token_source: Vec<TokenSource>,
    /// `[T]` of (t, h, w)
    pub positions: Vec<[i32; 3]>,
    /// `[T]` block · block_size + offset; −1 = padding, written nowhere.
    pub slot_mapping: Vec<i64>,
    /// `[T]` row in the uploaded visual rows; −1 = a text token.
    pub visual_row: Vec<i32>,
    /// `[S + 1]` prefix sums of tokens per sequence.
    pub cu_q: Vec<u32>,
    /// `[S]` tokens in the KV cache after this step's are written; 0 for a padded sequence.
    pub kv_len: Vec<u32>,
    /// `[S, B]` row-major, B = `block_table_stride`; unused entries 0.
    pub block_tables: Vec<u32>,
    pub block_table_stride: u32,
    /// `[R]` rows of the flattened batch whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// Rows of the flattened batch whose next token is in the prompt and is scored, ascending.
    pub score_rows: Vec<u32>,
    pub zero_blocks: Vec<BlockId>,
    pub block_copies: Vec<BlockCopy>,
}

/// All inputs of one vision step. P patches of one or more items, already in window order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VisionInputs {
    /// `[P]` of (row, col) in the item's own patch grid.
    pub row_col: Vec<[u32; 2]>,
    /// Prefix sums of patches per window.
    pub cu_window: Vec<u32>,
    /// Prefix sums of patches per frame group.
    pub cu_full: Vec<u32>,
    /// `[P / merge²]` merged row i of the output is row `inverse[i]` of the window order.
    pub inverse: Vec<u32>,
}

/// Rows of host values for [`crate::Backend::upload_rows`]: `[rows, cols]` row-major f32.
#[derive(Debug, Clone, Copy)]
pub struct HostRows<'a> {
    pub values: &'a [f32],
    pub cols: u32,
}

/// Row of one sampled sequence: which table slot, whose sequence, at which output index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleRow {
    pub slot: SequenceSlot,
    pub sequence: SequenceId,
    /// Number of output tokens before this one; the counter of the draw.
    pub output_index: u32,
}

/// What is wanted of one row of logits that nothing is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreRow {
    /// The token that followed.
    pub target: TokenId,
    /// Most likely tokens to tell beside it.
    pub num_top: u32,
}

/// A sequence as the sampler sees it when it takes a slot.
#[derive(Debug, Clone, Copy)]
pub struct SamplerSequence<'a> {
    pub slot: SequenceSlot,
    pub prompt: &'a [TokenId],
    /// Output that exists already.
    pub output: &'a [TokenId],
    pub params: &'a SamplingParams,
    pub eos_token_ids: &'a [TokenId],
    pub seed: u64,
}

/// What comes back from a submitted step. Tokens on every rank, log probabilities on rank 0 only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Readback {
    /// `[R]`, in the order of the sample rows; empty if the step drew nothing.
    pub tokens: Vec<SampledToken>,
    /// Of every scored row, in the order of [`StepInputs::score_rows`]; on rank 0 only.
    pub scores: Vec<TokenLogprobs>,
}
