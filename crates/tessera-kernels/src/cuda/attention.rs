//! Attention on the device: which rows are computed together, and the launches.
//!
//! The host lists a step's work ([`PagedPlan`], [`VarlenPlan`]; layouts in `cuda/attention_plan.cuh`), the list travels with the step's
//! inputs, and the kernels read it from the device. So a captured graph does the work of the step that it is replayed
//! for. How work is cut never shows in the bits: see `cuda/attention_mma.cuh`.
//!
//! The group (query heads per KV head) is known when attention is first called, from the width of qkv. Until
//! then no paged plan can be built: the backend builds and uploads it there, and with the inputs from then on.

use super::device::{DevicePtr, Gpu};
use super::module::Launch;
use crate::act::DType;
use crate::backend::{HeadShape, Segments};
use crate::error::{KernelError, Result};
use crate::inputs::{StepInputs, StepLimits};

/// Positions whose partial result starts from nothing.
const CHUNK_KEYS: u32 = 1024;
const TILE_KEYS: u32 = 64;
/// Rows of the two shapes of tiles, and the most rows of a sequence that go to the small one.
const SMALL_ROWS: u32 = 16;
const LARGE_ROWS: u32 = 128;
const FEW_ROWS: u32 = 64;
/// Places for partial results of 16 rows of one KV head, over all KV heads: 34 MB.
const PARTIALS: u32 = 4096;
/// Most query heads per KV head.
const MAX_GROUP: u32 = 64;
const MAX_GENERIC_DIM: u32 = 256;
const _: () = assert!(MAX_GROUP <= FEW_ROWS, "a decoded token takes small tiles");
/// Head size of the paged tensor core kernels, and of the vision tower's.
const PAGED_DIM: u32 = 128;
const VARLEN_DIM: u32 = 80;
/// Blocks of the tensor core kernels that one multiprocessor of a H200 holds.
const RESIDENT: u32 = 2;
/// Bytes that a block of the large kernel puts aside between chunks: 68 f32 of 128 threads, twice.
const TOTAL_BYTES: usize = 128 * 2 * 68 * 4;
const THREADS: u32 = 128;
const MERGE_THREADS: u32 = 256;

/// Words of a plan: its header, one item of work, one item to merge.
const HEADER_WORDS: usize = 16;
const ITEM_WORDS: usize = 8;
const WHOLE: u32 = u32::MAX;

/// Bytes of shared memory of a tile shape: query rows, stages of 64 keys and values, and what warps that share
/// rows pass on (probabilities in bf16, four maxima per row).
const fn shared_bytes(dim: u32, rows: u32, stages: u32, crosses: bool) -> u32 {
    let row = 2 * (dim + 8);
    let crossing = if crosses { rows * (2 * (TILE_KEYS + 8) + 4 * 4) } else { 0 };
    rows * row + stages * 2 * TILE_KEYS * row + crossing
}

const SMALL_SHARED: u32 = shared_bytes(PAGED_DIM, SMALL_ROWS, 3, true);
const LARGE_SHARED: u32 = shared_bytes(PAGED_DIM, LARGE_ROWS, 2, false);
const SHORT_SHARED: u32 = shared_bytes(VARLEN_DIM, TILE_KEYS, 1, false);
const LONG_SHARED: u32 = shared_bytes(VARLEN_DIM, LARGE_ROWS, 2, false);

/// Shared memory of the generic kernels: 16 rows of queries and 32 of keys, f32, keys one apart.
fn generic_shared(dim: u32) -> u32 {
    4 * (16 * dim + 32 * (dim + 1))
}

/// Shapes of attention over the cache, the same for all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PagedShape {
    /// Query heads per KV head.
    pub(super) group: u32,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    /// Tokens per KV block.
    pub(super) block_size: u32,
    /// Of qkv, the cache and the result.
    pub(super) dtype: DType,
}

impl PagedShape {
    /// # Errors
    /// `qkv_cols` is no whole number of groups; heads or groups larger than the kernels take.
    pub(super) fn new(
        qkv_cols: u32,
        kv_heads: u32,
        head_dim: u32,
        block_size: u32,
        dtype: DType,
    ) -> Result<Self> {
        let heads = qkv_cols / head_dim;
        if heads * head_dim != qkv_cols || heads <= 2 * kv_heads || !heads.is_multiple_of(kv_heads)
        {
            let (operation, what) = ("attention_paged", "qkv width");
            let (expected, found) = (3 * (kv_heads * head_dim) as usize, qkv_cols as usize);
            return Err(KernelError::Shape { operation, what, expected, found });
        }
        let group = heads / kv_heads - 2;
        check_generic(head_dim)?;
        if group > MAX_GROUP {
            return Err(unsupported(format!("{group} query heads per KV head")));
        }
        Ok(Self { group, kv_heads, head_dim, block_size, dtype })
    }

    /// Whether the tensor core kernels take it; the generic ones take the rest.
    fn is_tiled(&self, gpu: &Gpu) -> bool {
        self.dtype == DType::Bf16
            && self.head_dim == PAGED_DIM
            && self.block_size.is_multiple_of(16)
            && gpu.info().shared_bytes >= SMALL_SHARED.max(LARGE_SHARED)
    }
}

fn check_generic(head_dim: u32) -> Result<()> {
    if head_dim <= MAX_GENERIC_DIM {
        return Ok(());
    }
    Err(unsupported(format!("heads of {head_dim}")))
}

fn unsupported(what: String) -> KernelError {
    KernelError::Unsupported { backend: "cuda", what }
}

/// Query rows of one sequence that are computed together.
#[derive(Debug, Clone, Copy)]
struct RowTile {
    sequence: u32,
    first_row: u32,
    /// Rows that exist, at most [`SMALL_ROWS`] or [`LARGE_ROWS`].
    num_rows: u32,
    /// Positions that the last row sees.
    visible: u32,
    is_large: bool,
}

impl RowTile {
    fn num_chunks(&self) -> u32 {
        self.visible.div_ceil(CHUNK_KEYS)
    }
}

/// One item of the list, before it is written.
#[derive(Debug, Clone, Copy)]
struct Item {
    tile: RowTile,
    chunks: (u32, u32),
    slot: u32,
}

impl Item {
    /// Tiles of keys.
    fn cost(&self) -> u32 {
        let end = self.tile.visible.min(self.chunks.1 * CHUNK_KEYS);
        (end - self.chunks.0 * CHUNK_KEYS).div_ceil(TILE_KEYS)
    }
}

/// The work list of one decoder step. Kept from step to step, so that building one allocates nothing in the end.
#[derive(Debug, Default)]
pub(super) struct PagedPlan {
    words: Vec<u32>,
    tiles: Vec<RowTile>,
    items: Vec<Item>,
    num_small: u32,
    num_large: u32,
    num_merges: u32,
}

impl PagedPlan {
    /// Most bytes of [`Self::words`]. 0 for a vision tower.
    pub(super) fn max_bytes(limits: &StepLimits) -> usize {
        if limits.max_sequences == 0 {
            return 0;
        }
        let sequences = limits.max_sequences as usize;
        let small = sequences * (FEW_ROWS / SMALL_ROWS) as usize;
        let large = sequences + limits.max_tokens.div_ceil(LARGE_ROWS / MAX_GROUP) as usize;
        let merges = PARTIALS as usize / 2;
        4 * (HEADER_WORDS + (small + large + PARTIALS as usize + merges) * ITEM_WORDS)
    }

    /// Lists the work of a step. Longest first, so that the blocks end together.
    pub(super) fn build(&mut self, gpu: &Gpu, inputs: &StepInputs, shape: &PagedShape) {
        let partials = if shape.is_tiled(gpu) { PARTIALS / shape.kv_heads } else { 0 };
        self.list(inputs, shape, partials, resident(gpu));
    }

    /// As [`Self::build`], with places for `partials` partial results of each KV head on a GPU that runs `resident`
    /// blocks at once.
    fn list(&mut self, inputs: &StepInputs, shape: &PagedShape, partials: u32, resident: u32) {
        self.tiles.clear();
        self.items.clear();
        self.words.clear();
        self.cut_rows(inputs, shape.group);
        let large = self.tiles.iter().filter(|tile| tile.is_large).count() as u32;
        // Large tiles keep all multiprocessors at work by themselves, unless they are few.
        let splits_large = large * shape.kv_heads <= resident / 2;
        self.cut_positions(partials, splits_large);
        self.write(inputs);
    }

    /// What to copy to the device, from the plan's start on.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    fn cut_rows(&mut self, inputs: &StepInputs, group: u32) {
        for (sequence, kv_len) in inputs.kv_len.iter().enumerate() {
            let tokens = inputs.cu_q[sequence + 1] - inputs.cu_q[sequence];
            let rows = tokens * group;
            let is_large = rows > FEW_ROWS;
            let height = if is_large { LARGE_ROWS } else { SMALL_ROWS };
            for first_row in (0..rows).step_by(height as usize) {
                let num_rows = height.min(rows - first_row);
                let visible = kv_len - tokens + 1 + (first_row + num_rows - 1) / group;
                let sequence = sequence as u32;
                self.tiles.push(RowTile { sequence, first_row, num_rows, visible, is_large });
            }
        }
        let order =
            |tile: &RowTile| (std::cmp::Reverse(tile.visible), tile.sequence, tile.first_row);
        self.tiles.sort_unstable_by_key(order);
    }

    /// Cuts tiles at chunks of positions while there are places for the partial results.
    fn cut_positions(&mut self, partials: u32, splits_large: bool) {
        let mut next = 0;
        for tile in &self.tiles {
            let (chunks, step) = (tile.num_chunks(), slots_per_chunk(tile));
            let splits = chunks > 1 && (splits_large || !tile.is_large);
            if !splits || chunks * step > partials - next {
                self.items.push(Item { tile: *tile, chunks: (0, chunks), slot: WHOLE });
                continue;
            }
            for chunk in 0..chunks {
                let slot = next + chunk * step;
                self.items.push(Item { tile: *tile, chunks: (chunk, chunk + 1), slot });
            }
            next += chunks * step;
        }
        // Large tiles after small ones, each by cost.
        self.items.sort_unstable_by_key(|item| {
            let tile = &item.tile;
            let cost = std::cmp::Reverse(item.cost());
            (tile.is_large, cost, tile.sequence, tile.first_row, item.chunks)
        });
    }

    fn write(&mut self, inputs: &StepInputs) {
        self.num_large = self.items.iter().filter(|item| item.tile.is_large).count() as u32;
        self.num_small = self.items.len() as u32 - self.num_large;
        self.num_merges = 0;
        self.words.resize(HEADER_WORDS, 0);
        for item in &self.items {
            let sequence = item.tile.sequence as usize;
            let first_token = inputs.cu_q[sequence];
            let tokens = inputs.cu_q[sequence + 1] - first_token;
            let rows = [item.tile.sequence, first_token, tokens, inputs.kv_len[sequence]];
            self.words.extend(rows);
            self.words.extend([item.tile.first_row, item.chunks.0, item.chunks.1, item.slot]);
        }
        for item in &self.items {
            if item.slot == WHOLE || item.chunks.0 > 0 {
                continue;
            }
            let (tile, step) = (&item.tile, slots_per_chunk(&item.tile));
            for (at, first) in (0..tile.num_rows).step_by(SMALL_ROWS as usize).enumerate() {
                let rows = SMALL_ROWS.min(tile.num_rows - first);
                let first_token = inputs.cu_q[tile.sequence as usize];
                self.words.extend([first_token, tile.first_row + first, rows, tile.num_chunks()]);
                self.words.extend([item.slot + at as u32, step, 0, 0]);
                self.num_merges += 1;
            }
        }
        let sections = [(self.num_small, 0), (self.num_large, self.num_small)];
        let merges = (self.num_merges, self.items.len() as u32);
        let header = sections.into_iter().chain([merges]).flat_map(|(count, first)| [count, first]);
        self.words.iter_mut().zip(header).for_each(|(word, value)| *word = value);
        self.words[6] = inputs.block_table_stride;
    }
}

/// Places of 16 rows that one chunk of a tile takes.
fn slots_per_chunk(tile: &RowTile) -> u32 {
    if tile.is_large { LARGE_ROWS / SMALL_ROWS } else { 1 }
}

/// Blocks that run at once.
fn resident(gpu: &Gpu) -> u32 {
    gpu.info().multiprocessors * RESIDENT
}

/// Bytes of device memory that [`attention_paged`] works in. 0 for a vision tower.
pub(super) fn workspace_bytes(gpu: &Gpu, limits: &StepLimits) -> usize {
    if limits.max_sequences == 0 {
        return 0;
    }
    PARTIAL_BYTES + STATE_BYTES + resident(gpu) as usize * TOTAL_BYTES
}

/// Of all places: sums, and maximum and sum of probabilities per row.
const PARTIAL_BYTES: usize = (PARTIALS * SMALL_ROWS * PAGED_DIM * 4) as usize;
const STATE_BYTES: usize = (PARTIALS * SMALL_ROWS * 8) as usize;

/// Device addresses of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct PagedPtrs {
    /// `[T, (hq + 2·hkv)·head_dim]`
    pub(super) qkv: DevicePtr,
    /// One layer's keys and values, `[blocks, hkv, block_size, head_dim]` each.
    pub(super) k_cache: DevicePtr,
    pub(super) v_cache: DevicePtr,
    /// `[S, stride]` u32
    pub(super) block_tables: DevicePtr,
    /// [`PagedPlan::words`]
    pub(super) plan: DevicePtr,
    /// [`workspace_bytes`]
    pub(super) workspace: DevicePtr,
    /// `[T, hq·head_dim]`; rows that belong to no sequence are left as they are.
    pub(super) out: DevicePtr,
}

/// Causal attention over the cache. While a graph is captured (`is_captured`) the launches are those of any step with as many
/// rows per sequence, since the plan will be another one at each replay.
///
/// # Errors
/// Those of a launch.
pub(super) fn attention_paged(
    gpu: &Gpu,
    shape: &PagedShape,
    ptrs: &PagedPtrs,
    plan: &PagedPlan,
    is_captured: bool,
) -> Result<()> {
    let blocks = |items: u32, most: u32| {
        if is_captured { most } else { most.min(items.saturating_mul(shape.kv_heads)) }
    };
    let resident = resident(gpu);
    if !shape.is_tiled(gpu) {
        let name = match shape.dtype {
            DType::F32 => "attention_paged_generic_f32",
            DType::Bf16 => "attention_paged_generic_bf16",
        };
        let items = plan.num_small + plan.num_large * (LARGE_ROWS / SMALL_ROWS);
        return with_inputs(gpu, name, ptrs)
            .grid([blocks(items, 4 * resident), 1, 1])
            .block([THREADS, 1, 1])
            .shared(generic_shared(shape.head_dim))
            .ptr(ptrs.out)
            .u32(shape.group)
            .u32(shape.kv_heads)
            .u32(shape.block_size)
            .u32(shape.head_dim)
            .f32(exponent_scale(shape.head_dim))
            .go();
    }
    let partials = ptrs.workspace;
    let states = partials + PARTIAL_BYTES as u64;
    let totals = states + STATE_BYTES as u64;
    let sections = [
        ("attention_paged_small_bf16", plan.num_small, SMALL_SHARED, true),
        ("attention_paged_large_bf16", plan.num_large, LARGE_SHARED, false),
    ];
    for (name, items, shared, takes_decode) in sections {
        // A captured step only decodes, and one token's rows are few.
        let blocks = if is_captured && !takes_decode { 0 } else { blocks(items, resident) };
        with_inputs(gpu, name, ptrs)
            .grid([blocks, 1, 1])
            .block([THREADS, 1, 1])
            .shared(shared)
            .ptr(partials)
            .ptr(states)
            .ptr(totals)
            .ptr(ptrs.out)
            .u32(shape.group)
            .u32(shape.kv_heads)
            .u32(shape.block_size)
            .f32(exponent_scale(shape.head_dim))
            .go()?;
    }
    gpu.launch("attention_merge_bf16")
        .grid([blocks(plan.num_merges, resident), 1, 1])
        .block([MERGE_THREADS, 1, 1])
        .ptr(ptrs.plan)
        .ptr(partials)
        .ptr(states)
        .ptr(ptrs.out)
        .u32(shape.group)
        .u32(shape.kv_heads)
        .go()
}

/// A launch with the arguments that all paged kernels begin with.
fn with_inputs<'a>(gpu: &'a Gpu, name: &'static str, ptrs: &PagedPtrs) -> Launch<'a> {
    gpu.launch(name)
        .ptr(ptrs.qkv)
        .ptr(ptrs.k_cache)
        .ptr(ptrs.v_cache)
        .ptr(ptrs.block_tables)
        .ptr(ptrs.plan)
}

/// log2 e / √head_dim: softmax in powers of two.
fn exponent_scale(head_dim: u32) -> f32 {
    (std::f64::consts::LOG2_E / f64::from(head_dim).sqrt()) as f32
}

/// A part of [`VarlenPlan::words`]: items of four words (first patch of the segment, its patches, first row, 0).
#[derive(Debug, Clone, Copy, Default)]
struct Section {
    first: u32,
    count: u32,
}

/// The work lists of one vision step: 64 rows each of segments of at most 64 patches, 128 rows each of longer ones.
#[derive(Debug, Default)]
pub(super) struct VarlenPlan {
    words: Vec<u32>,
    /// Short and long segments of windows, then of full attention.
    sections: [[Section; 2]; 2],
}

const VARLEN_WORDS: usize = 4;

impl VarlenPlan {
    /// Most bytes of [`Self::words`], with `max_tokens` patches.
    pub(super) fn max_bytes(limits: &StepLimits) -> usize {
        let patches = limits.max_tokens as usize;
        4 * VARLEN_WORDS * 2 * (patches + patches.div_ceil(TILE_KEYS as usize))
    }

    /// Lists the work of a step from its prefix sums of patches.
    pub(super) fn build(&mut self, cu_window: &[u32], cu_full: &[u32]) {
        self.words.clear();
        for (cu, sections) in [cu_window, cu_full].into_iter().zip(&mut self.sections) {
            let segments = || cu.windows(2).map(|bounds| (bounds[0], bounds[1] - bounds[0]));
            for (is_long, section) in [false, true].into_iter().zip(sections) {
                section.first = (self.words.len() / VARLEN_WORDS) as u32;
                for (start, len) in segments().filter(|(_, len)| (*len > TILE_KEYS) == is_long) {
                    for first_row in (0..len).step_by(LARGE_ROWS as usize) {
                        self.words.extend([start, len, first_row, 0]);
                    }
                }
                section.count = (self.words.len() / VARLEN_WORDS) as u32 - section.first;
            }
        }
    }

    /// What to copy to the device, from the plan's start on.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }
}

/// Device addresses of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct VarlenPtrs {
    /// `[P, 3, heads, head_dim]`
    pub(super) qkv: DevicePtr,
    /// [`VarlenPlan::words`]
    pub(super) plan: DevicePtr,
    /// `[P, heads·head_dim]`
    pub(super) out: DevicePtr,
}

/// Full attention inside each segment of the step's windows, or of its frames.
///
/// # Errors
/// Heads larger than the kernels take; those of a launch.
pub(super) fn attention_varlen(
    gpu: &Gpu,
    dtype: DType,
    heads: HeadShape,
    ptrs: &VarlenPtrs,
    plan: &VarlenPlan,
    segments: Segments,
) -> Result<()> {
    check_generic(heads.head_dim)?;
    let is_tiled = dtype == DType::Bf16
        && heads.head_dim == VARLEN_DIM
        && gpu.info().shared_bytes >= SHORT_SHARED.max(LONG_SHARED);
    let (generic, generic_bytes) = match dtype {
        DType::F32 => ("attention_varlen_generic_f32", generic_shared(heads.head_dim)),
        DType::Bf16 => ("attention_varlen_generic_bf16", generic_shared(heads.head_dim)),
    };
    let tiled = [
        ("attention_varlen_short_bf16", SHORT_SHARED, TILE_KEYS),
        ("attention_varlen_long_bf16", LONG_SHARED, LARGE_ROWS),
    ];
    let sections = match segments {
        Segments::Window => plan.sections[0],
        Segments::Full => plan.sections[1],
    };
    for (section, (name, shared, rows)) in sections.into_iter().zip(tiled) {
        let items = ptrs.plan + u64::from(section.first) * (4 * VARLEN_WORDS) as u64;
        let (name, shared, parts) = match is_tiled {
            true => (name, shared, 1),
            false => (generic, generic_bytes, rows / SMALL_ROWS),
        };
        gpu.launch(name)
            .grid([section.count, heads.num_heads, parts])
            .block([THREADS, 1, 1])
            .shared(shared)
            .ptr(ptrs.qkv)
            .ptr(items)
            .ptr(ptrs.out)
            .u32(heads.num_heads)
            .u32(heads.head_dim)
            .f32(exponent_scale(heads.head_dim))
            .go()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const RESIDENT_BLOCKS: u32 = 264;

    fn step(sequences: &[(u32, u32)]) -> StepInputs {
        let mut inputs = StepInputs { cu_q: vec![0], ..StepInputs::default() };
        for (tokens, kv_len) in sequences {
            inputs.cu_q.push(inputs.cu_q[inputs.cu_q.len() - 1] + tokens);
            inputs.kv_len.push(*kv_len);
        }
        inputs
    }

    fn shape(group: u32, kv_heads: u32) -> PagedShape {
        PagedShape { group, kv_heads, head_dim: 128, block_size: 16, dtype: DType::Bf16 }
    }

    /// Checks that every row has each chunk of what it sees in one item, and each place one owner.
    fn check(sequences: &[(u32, u32)], group: u32, kv_heads: u32) {
        let (inputs, mut plan) = (step(sequences), PagedPlan::default());
        plan.list(&inputs, &shape(group, kv_heads), PARTIALS / kv_heads, RESIDENT_BLOCKS);
        let limits = StepLimits {
            max_tokens: inputs.cu_q[sequences.len()],
            max_sequences: sequences.len() as u32,
            ..StepLimits::default()
        };
        assert!(4 * plan.words().len() <= PagedPlan::max_bytes(&limits), "{sequences:?}");
        let (mut done, mut places) = (HashSet::new(), HashSet::new());
        let mut parts = 0;
        for item in &plan.items {
            let RowTile { sequence, first_row, num_rows, visible, .. } = item.tile;
            for chunk in item.chunks.0..item.chunks.1 {
                assert!(chunk * CHUNK_KEYS < visible);
                for row in first_row..first_row + num_rows {
                    assert!(done.insert((sequence, row, chunk)), "{sequences:?}");
                }
            }
            if item.slot != WHOLE {
                parts += num_rows.div_ceil(SMALL_ROWS);
                for place in item.slot..item.slot + slots_per_chunk(&item.tile) {
                    assert!(place < PARTIALS / kv_heads && places.insert(place), "{sequences:?}");
                }
            }
        }
        for (sequence, (tokens, kv_len)) in sequences.iter().enumerate() {
            for row in 0..tokens * group {
                let visible = kv_len - tokens + 1 + row / group;
                for chunk in 0..visible.div_ceil(CHUNK_KEYS) {
                    assert!(done.contains(&(sequence as u32, row, chunk)), "{sequences:?}");
                }
            }
        }
        let merges = &plan.words()[HEADER_WORDS + plan.items.len() * ITEM_WORDS..];
        assert_eq!(merges.chunks_exact(ITEM_WORDS).map(|item| item[3]).sum::<u32>(), parts);
    }

    #[test]
    fn every_row_sees_each_chunk_once() {
        check(&[(1, 1)], 8, 1);
        check(&[(1, 5000), (0, 0), (3, 1025), (16, 1024), (1, 1024)], 5, 2);
        check(&[(2048, 2048), (1, 33_000), (100, 20_000)], 7, 4);
        check(&[(20, 40_000)], 64, 8);
    }

    #[test]
    fn long_steps_stay_within_their_places() {
        check(&[(1, 32_000); 300], 8, 1);
        check(&[(7, 9000); 64], 64, 8);
        check(&[(64, 100_000); 3], 5, 1);
    }
}
