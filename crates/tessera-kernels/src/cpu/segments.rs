//! Attention inside segments, of the vision tower: one thread takes one head of one segment, packs its
//! keys and values once and computes all its rows.

use super::attention::{RowMap, Tiles, UNIT_ROWS, UnitArrays, attend, reserve, tile_words};
use super::compute::Compute;
use super::gemm::{PANEL, pack_row};
use super::isa::{Isa, Path, Task};
use super::kv::{TILE, value_row};
use super::memory::SharedOut;
use super::scratch::AttentionScratch;
use super::word::{CpuFormat, Pairs, Singles, Word};
use crate::backend::HeadShape;
use crate::error::Result;

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
    let segment = |index: usize| cu[index] as usize..cu[index + 1] as usize;
    let segments = cu.len().saturating_sub(1);
    let longest = (0..segments).map(|index| segment(index).len()).max().unwrap_or(0);
    compute.workspace.reserve(|scratch| {
        let tiles = longest.div_ceil(TILE);
        match format {
            CpuFormat::Bf16 => reserve::<Pairs>(&mut scratch.attention, dim, tiles),
            CpuFormat::F32 => reserve::<Singles>(&mut scratch.attention, dim, tiles),
        }
    })?;
    let out = SharedOut::new(out);
    compute.pool.run(segments * num_heads, &|thread, part| {
        let (segment, head) = (segment(part / num_heads), part % num_heads);
        let scratch = &mut compute.workspace.of(thread).attention;
        let path = compute.path;
        path.dispatch(Segment { path, format, dim, num_heads, head, segment, qkv, scratch, out });
    });
    Ok(())
}

/// One head of one segment.
struct Segment<'a> {
    path: Path,
    format: CpuFormat,
    dim: usize,
    num_heads: usize,
    head: usize,
    segment: std::ops::Range<usize>,
    qkv: &'a [f32],
    scratch: &'a mut AttentionScratch,
    out: SharedOut<'a, f32>,
}

impl Task for Segment<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise; one thread has this head of this segment.
        match self.format {
            CpuFormat::Bf16 => unsafe { self.attend::<I, Pairs>() },
            CpuFormat::F32 => unsafe { self.attend::<I, Singles>() },
        }
    }
}

/// Keys and values of all tiles, packed before.
struct PackedTiles<'a> {
    keys: &'a [u32],
    values: &'a [u32],
    words: (usize, usize),
}

impl Tiles for PackedTiles<'_> {
    #[inline(always)]
    fn tile(&mut self, index: usize, _count: usize) -> (&[u32], &[u32]) {
        let (keys, values) = self.words;
        (&self.keys[index * keys..][..keys], &self.values[index * values..][..values])
    }
}

impl Segment<'_> {
    /// # Safety
    /// That of [`Isa`]; no other thread writes this head of this segment.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn attend<I: Isa, W: Word>(self) {
        let words = tile_words::<W>(self.dim);
        let len = self.segment.len();
        let AttentionScratch { queries, probabilities, keys, values, scores, chunk, total } =
            self.scratch;
        let hidden = self.num_heads * self.dim;
        let row = |which: usize, position: usize| {
            let at = (self.segment.start + position) * 3 * hidden + which * hidden;
            &self.qkv[at + self.head * self.dim..][..self.dim]
        };
        for first in (0..len).step_by(TILE) {
            let (tile, count) = (first / TILE, TILE.min(len - first));
            let keys = &mut keys[tile * words.0..][..words.0];
            pack_keys::<W>(|at| row(1, first + at), count, self.dim, keys);
            let values = &mut values[tile * words.1..][..words.1];
            pack_values::<W>(|at| row(2, first + at), count, self.dim, values);
        }
        let mut tiles = PackedTiles { keys, values, words };
        let mut arrays = UnitArrays { queries, probabilities, scores, chunk, total };
        for first_row in (0..len).step_by(UNIT_ROWS) {
            let map = RowMap {
                rows: UNIT_ROWS.min(len - first_row),
                first_row,
                group: 1,
                head: self.head,
                dim: self.dim,
                first_token: self.segment.start,
                query_cols: 3 * hidden,
                out_cols: hidden,
                visible: len,
                causal: false,
            };
            // SAFETY: the caller's promise.
            unsafe {
                attend::<I, W>(&map, self.path, self.qkv, &mut tiles, &mut arrays, &self.out);
            }
        }
    }
}

/// A tile of keys `[TILE/32][words][32]` from its first `count` rows.
#[inline(always)]
fn pack_keys<'a, W: Word>(
    row: impl Fn(usize) -> &'a [f32],
    count: usize,
    dim: usize,
    tile: &mut [u32],
) {
    let panel_words = dim.div_ceil(W::PER_WORD) * PANEL;
    for at in 0..count {
        let panel = &mut tile[at / PANEL * panel_words..][..panel_words];
        pack_row::<W>(row(at), at % PANEL, PANEL, panel);
    }
}

/// A tile of values `[panels of dim][TILE/PER_WORD][32]` from its first `count` rows.
#[inline(always)]
fn pack_values<'a, W: Word>(
    row: impl Fn(usize) -> &'a [f32],
    count: usize,
    dim: usize,
    tile: &mut [u32],
) {
    /// Columns at a time: what the two rows of a pair are packed into.
    const COLUMNS: usize = PANEL;
    let panel_words = TILE / W::PER_WORD * PANEL;
    for (pair, at) in (0..count).step_by(W::PER_WORD).enumerate() {
        for (panel, start) in (0..dim).step_by(COLUMNS).enumerate() {
            let len = COLUMNS.min(dim - start);
            let words = len.div_ceil(W::PER_WORD);
            let (mut first, mut second) = ([0u32; COLUMNS], [0u32; COLUMNS]);
            W::pack(&row(at)[start..start + len], &mut first[..words]);
            let has_second = W::PER_WORD == 2 && at + 1 < count;
            if has_second {
                W::pack(&row(at + 1)[start..start + len], &mut second[..words]);
            }
            let second = has_second.then_some(&second[..words]);
            value_row::<W>(&first[..words], second, pair, &mut tile[panel * panel_words..]);
        }
    }
}
