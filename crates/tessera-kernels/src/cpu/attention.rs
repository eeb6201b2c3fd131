//! Attention of a few query rows against all keys that they see, in one pass (after Milakov and Gimelshein,
//! "Online normalizer calculation for softmax", 2018, and FlashAttention).
//!
//! A row's bits depend on the row and on what it sees alone. Keys come in tiles aligned to absolute
//! multiples of [`TILE`], ascending; masked entries have probability exactly 0; each [`CHUNK`] of positions
//! starts anew and is merged with those before it in ascending order, so that chunks may be computed
//! anywhere. Both products are the GEMM's register tiles.

use super::gemm::{PANEL, Product, Tiling, multiply, pack_row};
use super::isa::{Isa, Path};
use super::kv::TILE;
use super::memory::SharedOut;
use super::scratch::AttentionScratch;
use super::word::Word;
use crate::error::Result;
use crate::sampling::math::exp;

/// Query rows of one unit: they share every tile of keys that is brought into the cache.
pub(super) const UNIT_ROWS: usize = 64;
/// Positions whose partial result starts from nothing.
const CHUNK: usize = 1024;
/// Partial maxima and sums of a row of scores; part of the numerics: position i goes to lane i mod 16.
const LANES: usize = 16;

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

    fn visible(&self, row: usize) -> usize {
        self.visible + if self.causal { self.token(row) } else { 0 }
    }

    /// Keys seen by the last row, which sees most.
    fn most_visible(&self) -> usize {
        self.visible(self.rows - 1)
    }
}

/// Source of tiles of keys and values as right operands (layouts: [`super::kv::CpuKv::gather_tile`]).
pub(super) trait Tiles {
    /// Tile `index`, of which the first `count` positions will be used.
    fn tile(&mut self, index: usize, count: usize) -> (&[u32], &[u32]);
}

/// Words of one tile: keys, values.
pub(super) fn tile_words<W: Word>(dim: usize) -> (usize, usize) {
    (dim.div_ceil(W::PER_WORD) * TILE, dim.div_ceil(PANEL) * TILE / W::PER_WORD * PANEL)
}

/// Room in a thread's arrays for units of heads of `dim`, and for `tiles` tiles of keys and values.
pub(super) fn reserve<W: Word>(
    scratch: &mut AttentionScratch,
    dim: usize,
    tiles: usize,
) -> Result<()> {
    let (key_words, value_words) = tile_words::<W>(dim);
    scratch.queries.reserve(UNIT_ROWS * dim.div_ceil(W::PER_WORD))?;
    scratch.probabilities.reserve(UNIT_ROWS * TILE / W::PER_WORD)?;
    scratch.keys.reserve(tiles * key_words)?;
    scratch.values.reserve(tiles * value_words)?;
    scratch.scores.reserve(UNIT_ROWS * TILE)?;
    let out = UNIT_ROWS * dim.next_multiple_of(PANEL);
    scratch.chunk.reserve(out)?;
    scratch.total.reserve(out)
}

/// Running maximum and sum of exponentials of each row.
struct Softmax {
    max: [f32; UNIT_ROWS],
    sum: [f32; UNIT_ROWS],
}

impl Softmax {
    fn new() -> Self {
        Self { max: [f32::NEG_INFINITY; UNIT_ROWS], sum: [0.0; UNIT_ROWS] }
    }
}

/// Arrays of a unit, without those that hold keys and values.
pub(super) struct UnitArrays<'a> {
    pub(super) queries: &'a mut [u32],
    pub(super) probabilities: &'a mut [u32],
    pub(super) scores: &'a mut [f32],
    pub(super) chunk: &'a mut [f32],
    pub(super) total: &'a mut [f32],
}

/// out = softmax(q·k / √dim)·v for the rows of `map`.
///
/// # Safety
/// That of [`Isa`]; the output rows of `map` are this thread's.
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn attend<I: Isa, W: Word>(
    map: &RowMap,
    path: Path,
    queries: &[f32],
    tiles: &mut impl Tiles,
    arrays: &mut UnitArrays<'_>,
    out: &SharedOut<'_, f32>,
) {
    let tiling = Tiling::new(map.rows, path);
    let (dim, width) = (map.dim, map.dim.next_multiple_of(PANEL));
    let depth = dim.div_ceil(W::PER_WORD);
    for index in 0..tiling.tiles() {
        let rows = tiling.tile(index);
        let tile = &mut arrays.queries[rows.start * depth..rows.end * depth];
        for (row, at) in rows.clone().enumerate() {
            let query = &queries[map.at(at, map.query_cols)..][..dim];
            pack_row::<W>(query, row, rows.len(), tile);
        }
    }
    let most = map.most_visible();
    let mut total = Softmax::new();
    for start in (0..most).step_by(CHUNK) {
        let mut chunk = Softmax::new();
        let end = most.min(start + CHUNK);
        for first in (start..end).step_by(TILE) {
            let count = TILE.min(end - first);
            let (keys, values) = tiles.tile(first / TILE, count);
            // SAFETY: the caller's promise.
            unsafe {
                scores::<I, W>(&tiling, depth, keys, count, arrays);
                probabilities::<W>(map, &tiling, first, count, &mut chunk, arrays, first == start);
                add_values::<I, W>(&tiling, width, values, count, arrays, first == start);
            }
        }
        merge(map.rows, width, &chunk, arrays.chunk, &mut total, arrays.total);
    }
    for row in 0..map.rows {
        // SAFETY: the caller's promise.
        let out = unsafe { out.slice(map.at(row, map.out_cols), dim) };
        let sums = &arrays.total[row * width..][..dim];
        out.iter_mut().zip(sums).for_each(|(out, value)| *out = value / total.sum[row]);
    }
}

/// scores `[rows, TILE]` = queries · keysᵀ for the panels that hold the first `count` keys.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn scores<I: Isa, W: Word>(
    tiling: &Tiling,
    depth: usize,
    keys: &[u32],
    count: usize,
    arrays: &mut UnitArrays<'_>,
) {
    assert!(arrays.scores.len() >= tiling.rows() * TILE);
    for panel in 0..count.div_ceil(PANEL) {
        let b = keys[panel * depth * PANEL..][..depth * PANEL].as_ptr();
        for index in 0..tiling.tiles() {
            let rows = tiling.tile(index);
            let product = Product {
                a: arrays.queries[rows.start * depth..rows.end * depth].as_ptr(),
                rows: rows.len(),
                b,
                depth,
                c: arrays.scores[rows.start * TILE + panel * PANEL..].as_mut_ptr(),
                c_stride: TILE,
                fresh: true,
                ahead: b,
            };
            // SAFETY: a and b are slices of the stated shapes, c lies inside by the assertion.
            unsafe { multiply::<I, W>(&product) };
        }
    }
}

/// Turns a tile of scores into packed probabilities, and scales what the chunk holds to the new maximum.
#[inline(always)]
fn probabilities<W: Word>(
    map: &RowMap,
    tiling: &Tiling,
    first: usize,
    count: usize,
    softmax: &mut Softmax,
    arrays: &mut UnitArrays<'_>,
    fresh: bool,
) {
    let (width, scale) = (map.dim.next_multiple_of(PANEL), (map.dim as f32).powf(-0.5));
    let depth = count.div_ceil(W::PER_WORD);
    for index in 0..tiling.tiles() {
        let rows = tiling.tile(index);
        let tile = &mut arrays.probabilities[rows.start * depth..rows.end * depth];
        for (row, at) in rows.clone().enumerate() {
            let visible = map.visible(at).saturating_sub(first).min(count);
            let scores = &mut arrays.scores[at * TILE..][..count];
            scores[visible..].fill(0.0);
            if visible > 0 {
                let (max, sum) = (&mut softmax.max[at], &mut softmax.sum[at]);
                let shrink = exponentials(&mut scores[..visible], scale, max, sum);
                if !fresh {
                    let sums = &mut arrays.chunk[at * width..][..width];
                    sums.iter_mut().for_each(|value| *value *= shrink);
                }
            }
            pack_row::<W>(scores, row, rows.len(), tile);
        }
    }
}

/// Scores become exp(score·scale − max) in place; returns what earlier sums are to be multiplied by.
#[inline(always)]
fn exponentials(scores: &mut [f32], scale: f32, max: &mut f32, sum: &mut f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (groups, rest) = scores.as_chunks_mut::<LANES>();
    for group in groups.iter_mut() {
        for (lane, score) in lanes.iter_mut().zip(group) {
            *score *= scale;
            *lane = larger(*lane, *score);
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score *= scale;
        *lane = larger(*lane, *score);
    }
    let new_max = lanes.into_iter().fold(*max, larger);
    let mut lanes = [0f32; LANES];
    let (groups, rest) = scores.as_chunks_mut::<LANES>();
    for group in groups.iter_mut() {
        for (lane, score) in lanes.iter_mut().zip(group) {
            *score = exp(*score - new_max);
            *lane += *score;
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score = exp(*score - new_max);
        *lane += *score;
    }
    let shrink = exp(*max - new_max);
    *max = new_max;
    *sum = *sum * shrink + lanes.iter().sum::<f32>();
    shrink
}

/// chunk `[rows, width]` += probabilities · values, from zero where `fresh`.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn add_values<I: Isa, W: Word>(
    tiling: &Tiling,
    width: usize,
    values: &[u32],
    count: usize,
    arrays: &mut UnitArrays<'_>,
    fresh: bool,
) {
    let depth = count.div_ceil(W::PER_WORD);
    assert!(arrays.chunk.len() >= tiling.rows() * width);
    for (panel, b) in
        values.chunks_exact(TILE / W::PER_WORD * PANEL).take(width / PANEL).enumerate()
    {
        for index in 0..tiling.tiles() {
            let rows = tiling.tile(index);
            let product = Product {
                a: arrays.probabilities[rows.start * depth..rows.end * depth].as_ptr(),
                rows: rows.len(),
                b: b.as_ptr(),
                depth,
                c: arrays.chunk[rows.start * width + panel * PANEL..].as_mut_ptr(),
                c_stride: width,
                fresh,
                ahead: b.as_ptr(),
            };
            // SAFETY: a and b are slices of at least the stated shapes, c lies inside by the assertion.
            unsafe { multiply::<I, W>(&product) };
        }
    }
}

/// Adds a chunk's result to that of all chunks before it. Rows that saw nothing of the chunk stay.
#[inline(always)]
fn merge(
    rows: usize,
    width: usize,
    chunk: &Softmax,
    chunk_sums: &[f32],
    total: &mut Softmax,
    total_sums: &mut [f32],
) {
    for row in 0..rows {
        let (from, to) = (&chunk_sums[row * width..][..width], &mut total_sums[row * width..]);
        if total.sum[row] == 0.0 {
            to[..width].copy_from_slice(from);
            (total.max[row], total.sum[row]) = (chunk.max[row], chunk.sum[row]);
        } else if chunk.max[row] > f32::NEG_INFINITY {
            let max = total.max[row].max(chunk.max[row]);
            let (old, new) = (exp(total.max[row] - max), exp(chunk.max[row] - max));
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *to * old + from * new);
            total.sum[row] = total.sum[row] * old + chunk.sum[row] * new;
            total.max[row] = max;
        }
    }
}
