//! Attention of a few query rows against all keys that they see, in one pass (after Milakov and Gimelshein,
//! "Online normalizer calculation for softmax", 2018, and FlashAttention).
//!
//! A row's bits depend on the row and on what it sees alone. Keys come in tiles aligned to absolute
//! multiples of [`TILE`], ascending; masked entries have probability exactly 0; each [`CHUNK`] of positions
//! starts anew and is merged with those before it in ascending order, so that chunks may be computed
//! anywhere.

use super::isa::Isa;
use super::products::{
    GROUP, MAX_HEAD_WORDS, ROW_WORDS, SCORE_COLS, TILE, TileRef, add_values, register_tile, scores,
};
use super::scratch::AttentionScratch;
use super::softmax::{RowState, merge, probabilities, scale_row};
use super::word::{Word, narrow_row};
use crate::error::{KernelError, Result};

/// Query rows of one unit: they share every tile of keys that is brought into the cache.
pub(super) const UNIT_ROWS: usize = 64;
/// Positions whose partial result starts from nothing.
pub(super) const CHUNK: usize = 1024;

/// Which rows a unit computes, and where they lie. Row r of a sequence is (token r / group, query head
/// r mod group of the KV head).
#[derive(Debug, Clone, Copy)]
pub(super) struct RowMap {
    pub(super) rows: usize,
    /// The unit's first row in its sequence.
    pub(super) first_row: usize,
    pub(super) group: usize,
    pub(super) head: usize,
    pub(super) dim: usize,
    /// The sequence's first token in the batch.
    pub(super) first_token: usize,
    pub(super) query_cols: usize,
    pub(super) out_cols: usize,
    /// Keys that the sequence's first token sees; later ones see one more each where `causal`.
    pub(super) visible: usize,
    pub(super) causal: bool,
}

impl RowMap {
    fn token(&self, row: usize) -> usize {
        (self.first_row + row) / self.group
    }

    fn at(&self, row: usize, cols: usize) -> usize {
        let head = self.head * self.group + (self.first_row + row) % self.group;
        (self.first_token + self.token(row)) * cols + head * self.dim
    }

    /// Where the output of `row` begins.
    pub(super) fn out_at(&self, row: usize) -> usize {
        self.at(row, self.out_cols)
    }

    fn visible(&self, row: usize) -> usize {
        self.visible + if self.causal { self.token(row) } else { 0 }
    }

    /// Chunks of positions that the last row, which sees most, sees something of.
    pub(super) fn num_chunks(&self) -> usize {
        self.visible(self.rows - 1).div_ceil(CHUNK)
    }

    /// Columns of sums.
    pub(super) fn width(&self) -> usize {
        value_cols(self.dim)
    }
}

/// Columns of values and sums of heads of `dim`: whole vectors of every path.
pub(super) fn value_cols(dim: usize) -> usize {
    dim.next_multiple_of(GROUP)
}

/// Source of tiles of keys and values.
pub(super) trait Tiles {
    /// Tile `index`, of which the first `count` positions will be used. What it points to stays as it is
    /// until the next call.
    fn tile(&mut self, index: usize, count: usize) -> TileRef;
}

/// Words of one tile: keys, values.
pub(super) fn tile_words<W: Word>(dim: usize) -> (usize, usize) {
    (dim.div_ceil(W::PER_WORD) * TILE, TILE / W::PER_WORD * value_cols(dim))
}

/// A tile of which keys `[GROUPS][words][16]` and values `[TILE / PER_WORD][width]` lie in one piece each.
pub(super) fn packed_tile<W: Word>(keys: &[u32], values: &[u32], dim: usize) -> TileRef {
    let (key_words, value_words) = (dim.div_ceil(W::PER_WORD) * GROUP, value_cols(dim));
    let group_words = GROUP / W::PER_WORD * value_words;
    TileRef {
        keys: std::array::from_fn(|group| keys[group * key_words..].as_ptr()),
        key_stride: GROUP,
        values: std::array::from_fn(|group| values[group * group_words..].as_ptr()),
        value_stride: value_words,
    }
}

/// Room in a thread's arrays for units of `heads` heads of `dim` at once, and for `tiles` tiles of keys and
/// values.
///
/// # Errors
/// No memory; heads too large for a row.
pub(super) fn reserve<W: Word>(
    scratch: &mut AttentionScratch,
    dim: usize,
    heads: usize,
    tiles: usize,
) -> Result<()> {
    /// Rows of the largest register tile.
    const STEP: usize = 8;
    check_dim::<W>(dim)?;
    let (key_words, value_words) = tile_words::<W>(dim);
    scratch.queries.reserve(heads * UNIT_ROWS * ROW_WORDS)?;
    scratch.probabilities.reserve(STEP * ROW_WORDS)?;
    scratch.keys.reserve(tiles * key_words)?;
    scratch.values.reserve(tiles * value_words)?;
    scratch.scores.reserve(STEP * SCORE_COLS)?;
    scratch.chunk.reserve(UNIT_ROWS * value_cols(dim))?;
    scratch.total.reserve(UNIT_ROWS * value_cols(dim))
}

/// Checks that a head fits the rows of the products.
pub(super) fn check_dim<W: Word>(dim: usize) -> Result<()> {
    if dim.div_ceil(W::PER_WORD) <= MAX_HEAD_WORDS {
        return Ok(());
    }
    let what = format!("heads of {dim}");
    Err(KernelError::Unsupported { backend: super::NAME, what })
}

/// Arrays of a unit, without those that hold keys and values.
pub(super) struct UnitArrays<'a> {
    pub(super) queries: &'a [u32],
    pub(super) probabilities: &'a mut [u32],
    pub(super) scores: &'a mut [f32],
    /// Sums `[rows, width]` of the current chunk.
    pub(super) chunk: &'a mut [f32],
}

/// Rounds the queries of a unit.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn pack_queries<I: Isa, W: Word>(
    map: &RowMap,
    queries: &[f32],
    words: &mut [u32],
) {
    for (row, words) in words.chunks_exact_mut(ROW_WORDS).take(map.rows).enumerate() {
        let query = &queries[map.at(row, map.query_cols)..][..map.dim];
        // SAFETY: the caller's promise.
        unsafe { narrow_row::<I, W>(query, words) };
    }
}

/// One chunk of positions: sums of probabilities · values into `arrays.chunk`, their states into `states`.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn attend_chunk<I: Isa, W: Word>(
    map: &RowMap,
    chunk: usize,
    tiles: &mut impl Tiles,
    arrays: &mut UnitArrays<'_>,
    states: &mut [RowState; UNIT_ROWS],
) {
    let (depth, width) = (map.dim.div_ceil(W::PER_WORD), map.width());
    let scale = std::f32::consts::LOG2_E * (map.dim as f32).powf(-0.5);
    let (start, step) = (chunk * CHUNK, register_tile::<I>().0);
    let end = map.visible(map.rows - 1).min(start + CHUNK);
    let enough = map.rows.next_multiple_of(step);
    assert!(arrays.queries.len() >= enough * ROW_WORDS && arrays.chunk.len() >= enough * width);
    assert!(arrays.probabilities.len() >= step * ROW_WORDS);
    assert!(arrays.scores.len() >= step * SCORE_COLS);
    states.fill(RowState::EMPTY);
    for first in (start..end).step_by(TILE) {
        let count = TILE.min(end - first);
        let tile = tiles.tile(first / TILE, count);
        for first_row in (0..map.rows).step_by(step) {
            let rows = step.min(map.rows - first_row);
            let queries = arrays.queries[first_row * ROW_WORDS..].as_ptr();
            // SAFETY: the caller's promise; the assertions cover all rows up to a power of two.
            unsafe {
                scores::<I, W>(queries, rows, depth, &tile, count, arrays.scores.as_mut_ptr());
            }
            for row in 0..rows {
                let at = first_row + row;
                let visible = map.visible(at).saturating_sub(first).min(count);
                let scores = &mut arrays.scores[row * SCORE_COLS..][..TILE];
                let words = &mut arrays.probabilities[row * ROW_WORDS..][..TILE];
                let sums = &mut arrays.chunk[at * width..][..width];
                // SAFETY: the caller's promise.
                unsafe {
                    let state = &mut states[at];
                    let shrink = probabilities::<I, W>(scores, visible, count, scale, state, words);
                    if shrink != 1.0 && first > start {
                        scale_row::<I>(sums, shrink);
                    }
                }
            }
            let (weights, fresh) = (arrays.probabilities.as_ptr(), first == start);
            let sums = arrays.chunk[first_row * width..].as_mut_ptr();
            // SAFETY: as for the scores.
            unsafe { add_values::<I, W>(weights, rows, &tile, count, sums, width, fresh) };
        }
    }
}

/// All chunks of a unit: sums `[rows, width]` into `total`, and their states.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn attend<I: Isa, W: Word>(
    map: &RowMap,
    tiles: &mut impl Tiles,
    arrays: &mut UnitArrays<'_>,
    total: &mut [f32],
) -> [RowState; UNIT_ROWS] {
    let mut totals = [RowState::EMPTY; UNIT_ROWS];
    let (width, mut states) = (map.width(), totals);
    total[..map.rows * width].fill(0.0);
    for chunk in 0..map.num_chunks() {
        // SAFETY: the caller's promise.
        unsafe { attend_chunk::<I, W>(map, chunk, tiles, arrays, &mut states) };
        let sums = arrays.chunk.chunks_exact(width).zip(total.chunks_exact_mut(width));
        for ((row, (from, to)), total) in sums.enumerate().take(map.rows).zip(&mut totals) {
            // SAFETY: the caller's promise.
            unsafe { merge::<I>(states[row], from, total, to) };
        }
    }
    totals
}

/// out = sums / sum. A row that saw numbers only gives numbers; −0 becomes 0, since whether a sum is −0 may
/// depend on how many masked positions were added to it.
#[inline(always)]
pub(super) fn divide(sums: &[f32], state: RowState, out: &mut [f32]) {
    out.iter_mut().zip(sums).for_each(|(out, value)| *out = value / state.sum + 0.0);
}
