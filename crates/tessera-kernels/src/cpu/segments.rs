//! Attention inside segments, of the vision tower: one thread takes a run of rows of one head of one segment,
//! packs the head's keys and values and computes them.

use super::attention::{
    RowMap, Tiles, UNIT_ROWS, UnitArrays, attend, divide, pack_queries, packed_tile, reserve,
    tile_words, value_cols,
};
use super::compute::Compute;
use super::isa::{Isa, Task};
use super::memory::SharedOut;
use super::products::{GROUP, TILE, TileRef};
use super::scratch::AttentionScratch;
use super::word::{CpuFormat, Pairs, Singles, Word, narrow_row, place_row};
use crate::backend::HeadShape;
use crate::error::Result;

/// Rows for which a head is packed at once: packing costs little beside so many, and threads end together.
const RUN_ROWS: usize = 2048;

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
    let longest = segments.clone().map(|segment| segment.len()).max().unwrap_or(0);
    compute.workspace.reserve(|scratch| {
        let tiles = longest.div_ceil(TILE);
        match format {
            CpuFormat::Bf16 => reserve::<Pairs>(&mut scratch.attention, dim, tiles),
            CpuFormat::F32 => reserve::<Singles>(&mut scratch.attention, dim, tiles),
        }
    })?;
    let runs: Vec<_> = segments
        .flat_map(|segment| {
            let runs = (0..segment.len()).step_by(RUN_ROWS);
            runs.map(move |first| (segment.clone(), first..segment.len().min(first + RUN_ROWS)))
        })
        .collect();
    let out = SharedOut::new(out);
    compute.pool.run(runs.len() * num_heads, &|thread, part| {
        let ((segment, rows), head) = (runs[part / num_heads].clone(), part % num_heads);
        let scratch = &mut compute.workspace.of(thread).attention;
        let path = compute.path;
        path.dispatch(Run { format, dim, num_heads, head, segment, rows, qkv, scratch, out });
    });
    Ok(())
}

/// Some rows of one head of one segment.
struct Run<'a> {
    format: CpuFormat,
    dim: usize,
    num_heads: usize,
    head: usize,
    segment: std::ops::Range<usize>,
    /// Within the segment.
    rows: std::ops::Range<usize>,
    qkv: &'a [f32],
    scratch: &'a mut AttentionScratch,
    out: SharedOut<'a, f32>,
}

impl Task for Run<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise; one thread has these rows of this head.
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
    word: std::marker::PhantomData<W>,
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

impl Run<'_> {
    /// # Safety
    /// That of [`Isa`]; no other thread writes these rows of this head.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn attend<I: Isa, W: Word>(self) {
        let AttentionScratch { queries, probabilities, keys, values, scores, chunk, total } =
            self.scratch;
        let hidden = self.num_heads * self.dim;
        let row = |which: usize, position: usize| {
            let at = (self.segment.start + position) * 3 * hidden + which * hidden;
            &self.qkv[at + self.head * self.dim..][..self.dim]
        };
        for position in 0..self.segment.len() {
            // SAFETY: the caller's promise.
            unsafe { pack_key::<I, W>(row(1, position), position, queries, keys) };
            pack_value::<W>(row(2, position), position, values);
        }
        let word = std::marker::PhantomData::<W>;
        let mut tiles = PackedTiles { keys, values, dim: self.dim, word };
        let mut arrays = UnitArrays { queries, probabilities, scores, chunk };
        for first_row in self.rows.clone().step_by(UNIT_ROWS) {
            let map = RowMap {
                rows: UNIT_ROWS.min(self.rows.end - first_row),
                first_row,
                group: 1,
                head: self.head,
                dim: self.dim,
                first_token: self.segment.start,
                query_cols: 3 * hidden,
                out_cols: hidden,
                visible: self.segment.len(),
                causal: false,
            };
            // SAFETY: the caller's promise.
            unsafe {
                pack_queries::<I, W>(&map, self.qkv, arrays.queries);
                let states = attend::<I, W>(&map, &mut tiles, &mut arrays, total);
                let sums = total.chunks_exact(map.width());
                for (row, (sums, state)) in sums.zip(states).take(map.rows).enumerate() {
                    divide(sums, state, self.out.slice(map.out_at(row), map.dim));
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
