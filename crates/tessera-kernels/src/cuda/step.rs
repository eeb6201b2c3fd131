//! A step's inputs on their way to the device: packed into pinned memory, copied once, read by kernels at
//! offsets that depend on the numbers of tokens, sequences and rows alone. So a captured graph finds the inputs of
//! the next step of its shape where it found those of the last.

use tessera_types::{SequenceSlot, TokenId};

use super::device::Gpu;
use super::memory::DeviceBuffer;
use super::staging::StagingRing;
use super::{DevicePtr, NAME};
use crate::error::{KernelError, Result};
use crate::inputs::{StepInputs, StepLimits, TokenSource, VisionInputs};

/// Steps whose inputs may be on their way at once, and one that is being packed.
const RING: usize = 3;
/// Arrays begin at multiples of this.
const ALIGNMENT: usize = 16;
/// Words of `StepPtrs::counts`.
const COUNTS: usize = 8;

/// Where the inputs of one decoder step lie on the device. i32 unless said otherwise.
///
/// Numbers that change between replays of a captured graph (the block table's stride, lengths) are to be read from
/// `counts` and the arrays; the fields `num_*` hold for every step of the same shape.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StepPtrs {
    /// `[8]`: T, S, R, block table stride, blocks to zero, blocks to copy, rows to score, tokens that belong to a
    /// sequence (`cu_q[S]`).
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
    /// What attention made of the step (`PagedPlan`).
    pub(crate) plan: DevicePtr,
    pub(crate) num_tokens: u32,
    pub(crate) num_sequences: u32,
    pub(crate) num_rows: u32,
}

impl StepPtrs {
    /// The word of `counts` that tells how many blocks are zeroed.
    pub(super) fn num_zero_blocks(&self) -> DevicePtr {
        self.counts + 4 * size_of::<u32>() as u64
    }

    /// The word of `counts` that tells how many blocks are copied.
    pub(super) fn num_block_copies(&self) -> DevicePtr {
        self.counts + 5 * size_of::<u32>() as u64
    }
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
    /// What attention made of the segments (`VarlenPlan`).
    pub(crate) plan: DevicePtr,
    pub(crate) num_patches: u32,
    pub(crate) num_windows: u32,
    pub(crate) num_frames: u32,
    pub(crate) num_merged: u32,
}

/// The device's copy of a step's inputs, and the pinned buffers that it comes through.
#[derive(Debug)]
pub(super) struct StepArea {
    device: DeviceBuffer,
    ring: StagingRing,
}

impl StepArea {
    /// Room for steps up to `limits` whose attention plan has at most `plan_bytes`.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn new(gpu: &Gpu, limits: &StepLimits, plan_bytes: usize) -> Result<Self> {
        let bytes = area_bytes(limits) + plan_bytes;
        Ok(Self { device: gpu.alloc(bytes)?, ring: StagingRing::new(gpu, RING, bytes)? })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.device.bytes() as u64
    }

    /// Enqueues the copy of a decoder step. `plan_room` bytes are kept for `plan`, so that what follows it lies where
    /// it lay in the last step of this shape. `last_token` is what the host knows of a slot's last token.
    ///
    /// # Errors
    /// Lists beyond the planned room; what the device reports.
    pub(super) fn upload(
        &mut self,
        gpu: &Gpu,
        inputs: &StepInputs,
        (plan, plan_room): (&[u32], usize),
        last_token: &dyn Fn(SequenceSlot) -> Option<TokenId>,
    ) -> Result<StepPtrs> {
        let limit = self.device.bytes();
        let mut layout = Layout::new(self.device.ptr());
        let ptrs = step_ptrs(&mut layout, inputs, plan_room.max(size_of_val(plan)));
        check_room("block_copies", layout.at, limit)?;
        let base = self.device.ptr();
        self.ring.send(gpu, base, |bytes| {
            let mut packer = Packer { bytes, base };
            pack_step(&mut packer, &ptrs, inputs, plan);
            let sources = inputs.token_source.iter().map(|source| source_word(source, last_token));
            packer.words(ptrs.token_source, sources);
            layout.at
        })?;
        Ok(ptrs)
    }

    /// Enqueues the copy of a plan for a step that was uploaded without.
    ///
    /// # Errors
    /// As for [`StepArea::upload`].
    pub(super) fn upload_plan(&mut self, gpu: &Gpu, ptrs: &StepPtrs, plan: &[u32]) -> Result<()> {
        let base = ptrs.plan;
        check_room("kv_len", size_of_val(plan), (ptrs.block_tables - base) as usize)?;
        self.ring.send(gpu, base, |bytes| {
            Packer { bytes, base }.words(base, plan.iter().copied());
            size_of_val(plan)
        })
    }

    /// Enqueues the copy of a vision step.
    ///
    /// # Errors
    /// As for [`StepArea::upload`].
    pub(super) fn upload_vision(
        &mut self,
        gpu: &Gpu,
        inputs: &VisionInputs,
        plan: &[u32],
    ) -> Result<VisionPtrs> {
        let mut layout = Layout::new(self.device.ptr());
        let VisionInputs { row_col, cu_window, cu_full, inverse } = inputs;
        let ptrs = VisionPtrs {
            row_col: layout.words(2 * row_col.len()),
            cu_window: layout.words(cu_window.len()),
            cu_full: layout.words(cu_full.len()),
            inverse: layout.words(inverse.len()),
            plan: layout.words(plan.len()),
            num_patches: row_col.len() as u32,
            num_windows: cu_window.len() as u32 - 1,
            num_frames: cu_full.len() as u32 - 1,
            num_merged: inverse.len() as u32,
        };
        check_room("cu_window", layout.at, self.device.bytes())?;
        let base = self.device.ptr();
        self.ring.send(gpu, base, |bytes| {
            let mut packer = Packer { bytes, base };
            packer.words(ptrs.row_col, row_col.iter().flatten().copied());
            packer.words(ptrs.cu_window, cu_window.iter().copied());
            packer.words(ptrs.cu_full, cu_full.iter().copied());
            packer.words(ptrs.inverse, inverse.iter().copied());
            packer.words(ptrs.plan, plan.iter().copied());
            layout.at
        })?;
        Ok(ptrs)
    }
}

/// Bytes of the largest step without its attention plan. Every token may take a new block, and every sequence copy
/// one; every patch may be a segment of its own.
fn area_bytes(limits: &StepLimits) -> usize {
    let (tokens, sequences) = (limits.max_tokens as usize, limits.max_sequences as usize);
    let tables = sequences * limits.max_blocks_per_sequence as usize;
    // Source, position, slot, visual row, logit row, score row, zeroed block; segments and rows of patches fit too.
    let per_token = 1 + 3 + 2 + 1 + 1 + 1 + 1;
    let per_sequence = 1 + 1 + 2 + 4;
    let words = COUNTS + tokens * per_token + sequences * per_sequence + tables + 8;
    words * size_of::<u32>() + 16 * ALIGNMENT
}

fn check_room(field: &'static str, needed: usize, limit: usize) -> Result<()> {
    if needed <= limit {
        return Ok(());
    }
    let reason =
        format!("the step's inputs take {needed} bytes of the {limit} that {NAME} planned");
    Err(KernelError::Input { field, reason })
}

/// Hands out places one behind the other.
struct Layout {
    base: DevicePtr,
    at: usize,
}

impl Layout {
    fn new(base: DevicePtr) -> Self {
        Self { base, at: 0 }
    }

    fn bytes(&mut self, bytes: usize) -> DevicePtr {
        let place = self.base + self.at as u64;
        self.at = (self.at + bytes).next_multiple_of(ALIGNMENT);
        place
    }

    fn words(&mut self, count: usize) -> DevicePtr {
        self.bytes(count * size_of::<u32>())
    }
}

/// Places that depend on the shape come first; lists that are read outside of captured graphs come last.
fn step_ptrs(layout: &mut Layout, inputs: &StepInputs, plan_bytes: usize) -> StepPtrs {
    let (tokens, sequences) = (inputs.token_source.len(), inputs.kv_len.len());
    StepPtrs {
        counts: layout.words(COUNTS),
        token_source: layout.words(tokens),
        positions: layout.words(3 * tokens),
        slot_mapping: layout.words(2 * tokens),
        visual_row: layout.words(tokens),
        cu_q: layout.words(sequences + 1),
        kv_len: layout.words(sequences),
        logit_rows: layout.words(inputs.logit_rows.len()),
        plan: layout.bytes(plan_bytes),
        block_tables: layout.words(inputs.block_tables.len()),
        score_rows: layout.words(inputs.score_rows.len()),
        zero_blocks: layout.words(inputs.zero_blocks.len()),
        block_copies: layout.words(2 * inputs.block_copies.len()),
        num_tokens: tokens as u32,
        num_sequences: sequences as u32,
        num_rows: inputs.logit_rows.len() as u32,
    }
}

/// Writes arrays to the places that they will have on the device.
struct Packer<'a> {
    bytes: &'a mut [u8],
    base: DevicePtr,
}

impl Packer<'_> {
    fn words(&mut self, place: DevicePtr, values: impl Iterator<Item = u32>) {
        let at = (place - self.base) as usize;
        let (words, _) = self.bytes[at..].as_chunks_mut::<4>();
        words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_ne_bytes());
    }

    fn longs(&mut self, place: DevicePtr, values: impl Iterator<Item = i64>) {
        let at = (place - self.base) as usize;
        let (words, _) = self.bytes[at..].as_chunks_mut::<8>();
        words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_ne_bytes());
    }
}

/// Writes all but the sources of tokens.
fn pack_step(packer: &mut Packer<'_>, ptrs: &StepPtrs, inputs: &StepInputs, plan: &[u32]) {
    let counts: [u32; COUNTS] = [
        ptrs.num_tokens,
        ptrs.num_sequences,
        ptrs.num_rows,
        inputs.block_table_stride,
        inputs.zero_blocks.len() as u32,
        inputs.block_copies.len() as u32,
        inputs.score_rows.len() as u32,
        inputs.cu_q.last().copied().unwrap_or(0),
    ];
    packer.words(ptrs.counts, counts.into_iter());
    let positions = inputs.positions.iter().flatten().map(|at| at.cast_unsigned());
    packer.words(ptrs.positions, positions);
    packer.longs(ptrs.slot_mapping, inputs.slot_mapping.iter().copied());
    packer.words(ptrs.visual_row, inputs.visual_row.iter().map(|row| row.cast_unsigned()));
    packer.words(ptrs.cu_q, inputs.cu_q.iter().copied());
    packer.words(ptrs.kv_len, inputs.kv_len.iter().copied());
    packer.words(ptrs.logit_rows, inputs.logit_rows.iter().copied());
    packer.words(ptrs.plan, plan.iter().copied());
    packer.words(ptrs.block_tables, inputs.block_tables.iter().copied());
    packer.words(ptrs.score_rows, inputs.score_rows.iter().copied());
    packer.words(ptrs.zero_blocks, inputs.zero_blocks.iter().map(|block| block.0));
    let copies = inputs.block_copies.iter().flat_map(|copy| [copy.from.0, copy.to.0]);
    packer.words(ptrs.block_copies, copies);
}

fn source_word(source: &TokenSource, last_token: &dyn Fn(SequenceSlot) -> Option<TokenId>) -> u32 {
    match source {
        TokenSource::Host(token) => *token,
        TokenSource::LastSampled(slot) => last_token(*slot).unwrap_or(!slot.0),
    }
}
