//! Attention over the paged cache, of the decoder: any mix of prefill chunks and decode rows.

use super::attention::{RowMap, Tiles, UNIT_ROWS, UnitArrays, attend, reserve};
use super::compute::Compute;
use super::isa::{Isa, Path, Task};
use super::kv::{CpuKv, HeadBlocks, TILE};
use super::memory::SharedOut;
use super::scratch::AttentionScratch;
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
        CpuFormat::Bf16 => reserve::<Pairs>(&mut scratch.attention, dim, 1),
        CpuFormat::F32 => reserve::<Singles>(&mut scratch.attention, dim, 1),
    })?;
    let stride = inputs.block_table_stride as usize;
    let out = SharedOut::new(out);
    compute.pool.run(units.len(), &|thread, part| {
        let (sequence, map) = units[part];
        let block_table = &inputs.block_tables[sequence * stride..(sequence + 1) * stride];
        let blocks = HeadBlocks { layer, head: map.head, block_table };
        let scratch = &mut compute.workspace.of(thread).attention;
        let path = compute.path;
        path.dispatch(PagedUnit { path, map, kv, blocks, qkv, scratch, out });
    });
    Ok(())
}

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
    path: Path,
    map: RowMap,
    kv: &'a CpuKv,
    blocks: HeadBlocks<'a>,
    qkv: &'a [f32],
    scratch: &'a mut AttentionScratch,
    out: SharedOut<'a, f32>,
}

impl Task for PagedUnit<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise; one thread has this unit.
        match self.kv.format() {
            CpuFormat::Bf16 => unsafe { self.attend::<I, Pairs>() },
            CpuFormat::F32 => unsafe { self.attend::<I, Singles>() },
        }
    }
}

/// Tiles collected from the blocks as they are asked for.
struct BlockTiles<'a, W: Word> {
    kv: &'a CpuKv,
    blocks: HeadBlocks<'a>,
    keys: &'a mut [u32],
    values: &'a mut [u32],
    word: std::marker::PhantomData<W>,
}

impl<W: Word> Tiles for BlockTiles<'_, W> {
    #[inline(always)]
    fn tile(&mut self, index: usize, count: usize) -> (&[u32], &[u32]) {
        self.kv.gather_tile::<W>(&self.blocks, index * TILE, count, self.keys, self.values);
        (self.keys, self.values)
    }
}

impl PagedUnit<'_> {
    /// # Safety
    /// That of [`Isa`]; no other thread writes this unit's rows.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn attend<I: Isa, W: Word>(self) {
        let AttentionScratch { queries, probabilities, keys, values, scores, chunk, total } =
            self.scratch;
        let word = std::marker::PhantomData::<W>;
        let mut tiles = BlockTiles { kv: self.kv, blocks: self.blocks, keys, values, word };
        let mut arrays = UnitArrays { queries, probabilities, scores, chunk, total };
        // SAFETY: the caller's promise.
        unsafe {
            attend::<I, W>(&self.map, self.path, self.qkv, &mut tiles, &mut arrays, &self.out);
        }
    }
}
