//! Attention over the paged cache, of the decoder: any mix of prefill chunks and decode rows.

use super::attention::{
    RowMap, Tiles, UNIT_ROWS, UnitArrays, attend, attend_chunk, divide, pack_queries, reserve,
};
use super::compute::Compute;
use super::isa::{Isa, Task};
use super::kv::{CpuKv, HeadBlocks};
use super::memory::SharedOut;
use super::products::{TILE, TileRef};
use super::scratch::AttentionScratch;
use super::softmax::{RowState, merge};
use super::word::{CpuFormat, Pairs, Singles, Word};
use crate::error::{KernelError, Result};
use crate::inputs::StepInputs;

/// out `[T, hq·hd]` from qkv `[T, (hq + 2·hkv)·hd]` and the cache, which holds this step's keys already.
pub(super) fn paged(
    compute: &Compute,
    inputs: &StepInputs,
    qkv: &[f32],
    qkv_cols: usize,
    kv: &CpuKv,
    layer: u32,
    out: &mut [f32],
) -> Result<()> {
    let (dim, layer) = (kv.spec().head_dim as usize, kv.layer_index(layer)?);
    // Tokens that pad the batch belong to no sequence.
    out.fill(0.0);
    let units = units(inputs, qkv_cols, kv)?;
    compute.workspace.reserve(|scratch| match kv.format() {
        CpuFormat::Bf16 => reserve::<Pairs>(&mut scratch.attention, dim, 1, 1),
        CpuFormat::F32 => reserve::<Singles>(&mut scratch.attention, dim, 1, 1),
    })?;
    let out = SharedOut::new(out);
    let run = |thread: usize, unit: usize, result: UnitResult<'_>| {
        let (sequence, map) = units[unit];
        let stride = inputs.block_table_stride as usize;
        let block_table = &inputs.block_tables[sequence * stride..(sequence + 1) * stride];
        let blocks = HeadBlocks { layer, head: map.head, block_table };
        let scratch = &mut compute.workspace.of(thread).attention;
        compute.path.dispatch(PagedUnit { map, kv, blocks, qkv, scratch, result });
    };
    let chunks = units.iter().map(|(_, map)| map.num_chunks()).sum::<usize>();
    if units.len() >= compute.pool.threads() * FEW_UNITS || chunks == units.len() {
        compute.pool.run(units.len(), &|thread, unit| run(thread, unit, UnitResult::Whole(out)));
        return Ok(());
    }
    // Too few units to keep all threads at work: each chunk becomes a part of its own.
    let mut parts = Vec::with_capacity(chunks);
    let mut len = 0;
    for (unit, (_, map)) in units.iter().enumerate() {
        for chunk in 0..map.num_chunks() {
            parts.push((unit, chunk, len));
            len += map.rows * (map.width() + STATE);
        }
    }
    let mut partials = compute.workspace.partials();
    partials.reserve(len)?;
    let partials = &mut partials[..len];
    let shared = SharedOut::new(partials);
    compute.pool.run(parts.len(), &|thread, part| {
        let (unit, chunk, at) = parts[part];
        run(thread, unit, UnitResult::Chunk { chunk, partials: shared, at });
    });
    let mut rest = &*partials;
    for (_, map) in &units {
        let (partials, after) = rest.split_at(map.num_chunks() * map.rows * (map.width() + STATE));
        rest = after;
        compute.path.dispatch(MergeChunks { map, partials, out });
    }
    Ok(())
}

/// Fewer units than this per thread are cut into chunks.
const FEW_UNITS: usize = 4;
/// Values behind the sums of a row of a partial result: its maximum and its sum.
const STATE: usize = 2;

/// Checks that the local heads of qkv fit the cache.
pub(super) fn check_heads(operation: &'static str, qkv_cols: usize, kv: &CpuKv) -> Result<()> {
    let (dim, kv_heads) = (kv.spec().head_dim as usize, kv.spec().num_kv_heads as usize);
    let heads = qkv_cols / dim;
    let whole = heads * dim == qkv_cols
        && heads > 2 * kv_heads
        && (heads - 2 * kv_heads).is_multiple_of(kv_heads);
    if whole {
        return Ok(());
    }
    let (what, expected) = ("qkv width", 3 * kv_heads * dim);
    Err(KernelError::Shape { operation, what, expected, found: qkv_cols })
}

/// The work of a step: (sequence, rows of one KV head). The last rows of a prompt see most keys and come
/// first, so that threads end together.
fn units(inputs: &StepInputs, qkv_cols: usize, kv: &CpuKv) -> Result<Vec<(usize, RowMap)>> {
    let (dim, kv_heads) = (kv.spec().head_dim as usize, kv.spec().num_kv_heads as usize);
    let query_cols = qkv_cols - 2 * kv_heads * dim;
    let group = query_cols / dim / kv_heads;
    let stride = inputs.block_table_stride as usize;
    let mut units = Vec::new();
    for (sequence, kv_len) in inputs.kv_len.iter().enumerate() {
        let (kv_len, start) = (*kv_len as usize, inputs.cu_q[sequence] as usize);
        let tokens = inputs.cu_q[sequence + 1] as usize - start;
        if tokens == 0 {
            continue;
        }
        let block_table = &inputs.block_tables[sequence * stride..(sequence + 1) * stride];
        kv.check_blocks(block_table, kv_len)?;
        for head in 0..kv_heads {
            let rows = tokens * group;
            units.extend((0..rows).step_by(UNIT_ROWS).map(|first_row| {
                let map = RowMap {
                    rows: UNIT_ROWS.min(rows - first_row),
                    first_row,
                    group,
                    head,
                    dim,
                    first_token: start,
                    query_cols: qkv_cols,
                    out_cols: query_cols,
                    visible: kv_len - tokens + 1,
                    causal: true,
                };
                (sequence, map)
            }));
        }
    }
    units.reverse();
    Ok(units)
}

/// A few rows of one KV head of one sequence.
struct PagedUnit<'a> {
    map: RowMap,
    kv: &'a CpuKv,
    blocks: HeadBlocks<'a>,
    qkv: &'a [f32],
    scratch: &'a mut AttentionScratch,
    result: UnitResult<'a>,
}

/// What to compute of a unit.
enum UnitResult<'a> {
    /// All chunks; rows of the output.
    Whole(SharedOut<'a, f32>),
    /// One chunk; per row its sums and its state, from `at` on.
    Chunk { chunk: usize, partials: SharedOut<'a, f32>, at: usize },
}

impl Task for PagedUnit<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise; one thread has this unit, or this chunk of it.
        match self.kv.format() {
            CpuFormat::Bf16 => unsafe { self.attend::<I, Pairs>() },
            CpuFormat::F32 => unsafe { self.attend::<I, Singles>() },
        }
    }
}

/// Tiles as they lie in the blocks, or collected as they are asked for.
struct BlockTiles<'a, W: Word> {
    kv: &'a CpuKv,
    blocks: HeadBlocks<'a>,
    keys: &'a mut [u32],
    values: &'a mut [u32],
    word: std::marker::PhantomData<W>,
}

impl<W: Word> Tiles for BlockTiles<'_, W> {
    #[inline(always)]
    fn tile(&mut self, index: usize, count: usize) -> TileRef {
        let first = index * TILE;
        if self.kv.has_whole_groups() {
            return self.kv.tile::<W>(&self.blocks, first, count);
        }
        self.kv.gather_tile::<W>(&self.blocks, first, count, self.keys, self.values)
    }
}

impl PagedUnit<'_> {
    /// # Safety
    /// That of [`Isa`]; no other thread writes this unit's rows, or this chunk's.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn attend<I: Isa, W: Word>(self) {
        let (map, width) = (&self.map, self.map.width());
        let AttentionScratch { queries, probabilities, keys, values, scores, chunk, total } =
            self.scratch;
        let word = std::marker::PhantomData::<W>;
        let mut tiles = BlockTiles { kv: self.kv, blocks: self.blocks, keys, values, word };
        // SAFETY: the caller's promise.
        unsafe { pack_queries::<I, W>(map, self.qkv, queries) };
        let mut arrays = UnitArrays { queries, probabilities, scores, chunk };
        // SAFETY: the caller's promise.
        unsafe {
            match self.result {
                UnitResult::Whole(out) => {
                    let states = attend::<I, W>(map, &mut tiles, &mut arrays, total);
                    let rows = total.chunks_exact(width).zip(states).take(map.rows);
                    for (row, (sums, state)) in rows.enumerate() {
                        divide(sums, state, out.slice(map.out_at(row), map.dim));
                    }
                }
                UnitResult::Chunk { chunk, partials, at } => {
                    let mut states = [RowState::EMPTY; UNIT_ROWS];
                    attend_chunk::<I, W>(map, chunk, &mut tiles, &mut arrays, &mut states);
                    let partials = partials.slice(at, map.rows * (width + STATE));
                    let rows = partials.chunks_exact_mut(width + STATE);
                    let sums = arrays.chunk.chunks_exact(width).zip(states);
                    for (row, (sums, state)) in rows.zip(sums) {
                        row[..width].copy_from_slice(sums);
                        row[width..].copy_from_slice(&[state.max, state.sum]);
                    }
                }
            }
        }
    }
}

/// Joins the chunks of a unit, ascending, and writes its rows.
struct MergeChunks<'a> {
    map: &'a RowMap,
    /// `[chunks, rows, width + STATE]`
    partials: &'a [f32],
    out: SharedOut<'a, f32>,
}

impl Task for MergeChunks<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let (map, width) = (self.map, self.map.width());
        let mut sums = vec![0.0; width];
        for row in 0..map.rows {
            sums.fill(0.0);
            let mut total = RowState::EMPTY;
            for chunk in self.partials.chunks_exact(map.rows * (width + STATE)) {
                let from = &chunk[row * (width + STATE)..][..width + STATE];
                let state = RowState { max: from[width], sum: from[width + 1] };
                // SAFETY: the caller's promise.
                unsafe { merge::<I>(state, &from[..width], &mut total, &mut sums) };
            }
            // SAFETY: this is the one thread that writes the output now.
            let out = unsafe { self.out.slice(map.out_at(row), map.dim) };
            divide(&sums, total, out);
        }
    }
}
