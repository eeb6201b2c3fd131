//! Attention inside segments, of the vision tower: one thread takes some rows and heads of one segment, packs
//! those heads' keys and values and computes them.

use std::marker::PhantomData;
use std::ops::Range;

use super::attention::{
    RowMap, Tiles, UNIT_ROWS, UnitArrays, attend, divide, packed_tile, reserve, tile_words,
    value_cols,
};
use super::compute::Compute;
use super::isa::{Isa, Task};
use super::memory::SharedOut;
use super::products::{GROUP, ROW_WORDS, TILE, TileRef};
use super::scratch::AttentionScratch;
use super::word::{CpuFormat, Pairs, Singles, Word, narrow_row, place_row};
use crate::backend::HeadShape;
use crate::error::Result;

/// Rows for which a head is packed at once: packing costs little beside so many, and threads end together.
const RUN_ROWS: usize = 2048;

/// Rows and heads of one segment that one thread computes.
#[derive(Debug, Clone)]
struct Run {
    segment: Range<usize>,
    /// Within the segment.
    rows: Range<usize>,
    heads: Range<usize>,
}

/// All heads of a short segment at once, so that its rows are read as they lie; of a long one a head at a time,
/// which its caches hold.
fn runs(segment: Range<usize>, num_heads: usize) -> impl Iterator<Item = Run> {
    let len = segment.len();
    let heads = if len <= TILE { num_heads } else { 1 };
    let rows = move |first: usize| first..len.min(first + RUN_ROWS);
    (0..num_heads).step_by(heads).flat_map(move |head| {
        let (segment, heads) = (segment.clone(), head..head + heads);
        let run =
            move |first| Run { segment: segment.clone(), rows: rows(first), heads: heads.clone() };
        (0..len).step_by(RUN_ROWS).map(run)
    })
}

/// out `[P, heads·hd]` from qkv `[P, 3, heads, hd]`: every row sees its whole segment of `cu`.
pub(super) fn varlen(
    compute: &Compute,
    format: CpuFormat,
    cu: &[u32],
    qkv: &[f32],
    heads: HeadShape,
    out: &mut [f32],
) -> Result<()> {
    let (dim, num_heads) = (heads.head_dim as usize, heads.num_heads as usize);
    let segments = cu.windows(2).map(|bounds| bounds[0] as usize..bounds[1] as usize);
    let runs: Vec<Run> = segments.flat_map(|segment| runs(segment, num_heads)).collect();
    let tiles = |run: &Run| run.heads.len() * run.segment.len().div_ceil(TILE);
    let tiles = runs.iter().map(tiles).max().unwrap_or(0);
    let heads = runs.iter().map(|run| run.heads.len()).max().unwrap_or(0);
    compute.workspace.reserve(|scratch| match format {
        CpuFormat::Bf16 => reserve::<Pairs>(&mut scratch.attention, dim, heads, tiles),
        CpuFormat::F32 => reserve::<Singles>(&mut scratch.attention, dim, heads, tiles),
    })?;
    let out = SharedOut::new(out);
    compute.pool.run(runs.len(), &|thread, part| {
        let scratch = &mut compute.workspace.of(thread).attention;
        let run = &runs[part];
        compute.path.dispatch(AttendRun { run, format, dim, num_heads, qkv, scratch, out });
    });
    Ok(())
}

struct AttendRun<'a> {
    run: &'a Run,
    format: CpuFormat,
    dim: usize,
    num_heads: usize,
    qkv: &'a [f32],
    scratch: &'a mut AttentionScratch,
    out: SharedOut<'a, f32>,
}

impl Task for AttendRun<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise; one thread has these rows of these heads.
        match self.format {
            CpuFormat::Bf16 => unsafe { self.attend::<I, Pairs>() },
            CpuFormat::F32 => unsafe { self.attend::<I, Singles>() },
        }
    }
}

/// Keys and values of all tiles, packed before.
struct PackedTiles<'a, W: Word> {
    keys: &'a [u32],
    values: &'a [u32],
    dim: usize,
    word: PhantomData<W>,
}

impl<W: Word> Tiles for PackedTiles<'_, W> {
    #[inline(always)]
    fn tile(&mut self, index: usize, _count: usize) -> TileRef {
        let (keys, values) = tile_words::<W>(self.dim);
        packed_tile::<W>(
            &self.keys[index * keys..][..keys],
            &self.values[index * values..][..values],
            self.dim,
        )
    }
}

impl AttendRun<'_> {
    /// # Safety
    /// That of [`Isa`]; no other thread writes these rows of these heads.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn attend<I: Isa, W: Word>(self) {
        let AttentionScratch { queries, probabilities, keys, values, scores, chunk, total } =
            self.scratch;
        let (Run { segment, rows, heads }, dim) = (self.run, self.dim);
        let hidden = self.num_heads * dim;
        let row = |which: usize, position: usize, head: usize| {
            let at = (segment.start + position) * 3 * hidden + which * hidden;
            &self.qkv[at + head * dim..][..dim]
        };
        let (key_words, value_words) = tile_words::<W>(dim);
        let tiles = segment.len().div_ceil(TILE);
        for position in 0..segment.len() {
            for (at, head) in heads.clone().enumerate() {
                let keys = &mut keys[at * tiles * key_words..][..tiles * key_words];
                // SAFETY: the caller's promise.
                unsafe { pack_key::<I, W>(row(1, position, head), position, queries, keys) };
            }
            for (at, head) in heads.clone().enumerate() {
                let values = &mut values[at * tiles * value_words..][..tiles * value_words];
                pack_value::<W>(row(2, position, head), position, values);
            }
        }
        for first_row in rows.clone().step_by(UNIT_ROWS) {
            let unit = first_row..rows.end.min(first_row + UNIT_ROWS);
            for (index, position) in unit.clone().enumerate() {
                for (at, head) in heads.clone().enumerate() {
                    let words = &mut queries[(at * UNIT_ROWS + index) * ROW_WORDS..][..ROW_WORDS];
                    // SAFETY: the caller's promise.
                    unsafe { narrow_row::<I, W>(row(0, position, head), words) };
                }
            }
            for (at, head) in heads.clone().enumerate() {
                let map = RowMap {
                    rows: unit.len(),
                    first_row,
                    group: 1,
                    head,
                    dim,
                    first_token: segment.start,
                    query_cols: 3 * hidden,
                    out_cols: hidden,
                    visible: segment.len(),
                    causal: false,
                };
                let (keys, values) =
                    (&keys[at * tiles * key_words..], &values[at * tiles * value_words..]);
                let mut tiles = PackedTiles { keys, values, dim, word: PhantomData::<W> };
                let queries = &queries[at * UNIT_ROWS * ROW_WORDS..][..UNIT_ROWS * ROW_WORDS];
                let mut arrays = UnitArrays { queries, probabilities, scores, chunk };
                // SAFETY: the caller's promise.
                unsafe {
                    let states = attend::<I, W>(&map, &mut tiles, &mut arrays, total);
                    let sums = total.chunks_exact(map.width());
                    for (row, (sums, state)) in sums.zip(states).take(map.rows).enumerate() {
                        divide(sums, state, self.out.slice(map.out_at(row), dim));
                    }
                }
            }
        }
    }
}

/// One key into tiles `[groups][words][16]`, by way of `words`.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn pack_key<I: Isa, W: Word>(
    key: &[f32],
    position: usize,
    words: &mut [u32],
    keys: &mut [u32],
) {
    let count = key.len().div_ceil(W::PER_WORD);
    // SAFETY: the caller's promise.
    unsafe { narrow_row::<I, W>(key, words) };
    let group = &mut keys[position / GROUP * count * GROUP..][..count * GROUP];
    let places = group.as_chunks_mut::<GROUP>().0;
    places.iter_mut().zip(words).for_each(|(to, word)| to[position % GROUP] = *word);
}

/// One value into tiles `[TILE / PER_WORD][width]`. The first of a pair makes the second 0.
#[inline(always)]
fn pack_value<W: Word>(value: &[f32], position: usize, values: &mut [u32]) {
    let width = value_cols(value.len());
    let row = &mut values[position / W::PER_WORD * width..][..width];
    place_row::<W>(value, position % W::PER_WORD, row);
}
