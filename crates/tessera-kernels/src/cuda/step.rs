//! A step's inputs on their way to the device: packed into pinned memory, copied once, read by kernels at
//! offsets that depend on the numbers of tokens, sequences and rows alone. So a captured graph finds the inputs of
//! the next step of its shape where it found those of the last.

use super::DevicePtr;

/// Where the inputs of one decoder step lie on the device. i32 unless said otherwise.
///
/// Numbers that change between replays of a captured graph (the block table's stride, lengths) are to be read from
/// `counts` and the arrays; the fields `num_*` hold for every step of the same shape.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StepPtrs {
    /// `[8]`: T, S, R, block table stride, blocks to zero, blocks to copy, rows to score, tokens that belong to a
    /// sequence (`cu_q[S]`). See `Count`.
    pub(crate) counts: DevicePtr,
    /// `[T]` a token id, or −1 − slot for the token last sampled for that slot.
    pub(crate) token_source: DevicePtr,
    /// `[T, 3]` of (t, h, w).
    pub(crate) positions: DevicePtr,
    /// `[T]` i64, −1 = padding.
    pub(crate) slot_mapping: DevicePtr,
    /// `[T]` −1 = a text token.
    pub(crate) visual_row: DevicePtr,
    /// `[S + 1]`
    pub(crate) cu_q: DevicePtr,
    /// `[S]`
    pub(crate) kv_len: DevicePtr,
    /// `[R]`
    pub(crate) logit_rows: DevicePtr,
    /// `[scores]`
    pub(crate) score_rows: DevicePtr,
    /// `[S, stride]`
    pub(crate) block_tables: DevicePtr,
    /// `[zeros]`
    pub(crate) zero_blocks: DevicePtr,
    /// `[copies, 2]` of (from, to).
    pub(crate) block_copies: DevicePtr,
    pub(crate) num_tokens: u32,
    pub(crate) num_sequences: u32,
    pub(crate) num_rows: u32,
    pub(crate) num_scores: u32,
    pub(crate) num_zero_blocks: u32,
    pub(crate) num_block_copies: u32,
}

/// Where the inputs of one vision step lie on the device. i32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct VisionPtrs {
    /// `[P, 2]`
    pub(crate) row_col: DevicePtr,
    /// `[windows + 1]`
    pub(crate) cu_window: DevicePtr,
    /// `[frames + 1]`
    pub(crate) cu_full: DevicePtr,
    /// `[M]`
    pub(crate) inverse: DevicePtr,
    pub(crate) num_patches: u32,
    pub(crate) num_windows: u32,
    pub(crate) num_frames: u32,
    pub(crate) num_merged: u32,
}
