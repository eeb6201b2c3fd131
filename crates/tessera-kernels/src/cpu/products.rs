//! The two products of attention, for a few rows and one tile of positions, in registers.
//!
//! As in the GEMM every output is one chain of accumulations in ascending order, whatever the number of rows
//! that are computed together, so a row's bits do not depend on its neighbours.

use super::isa::Isa;
use super::word::Word;

/// Positions of one tile of keys and values, aligned to absolute multiples.
pub(super) const TILE: usize = 128;
/// Positions that lie together: a tile is made of groups, each at a place of its own.
pub(super) const GROUP: usize = 16;
/// Groups of a tile.
pub(super) const GROUPS: usize = TILE / GROUP;
/// Most words of a head's query, key or value.
pub(super) const MAX_HEAD_WORDS: usize = 256;
/// Words from one left row to the next, of queries and of probabilities. Not a power of two, or rows would
/// meet in the same places of the cache.
pub(super) const ROW_WORDS: usize = MAX_HEAD_WORDS + 4;
/// Scores from one row to the next.
pub(super) const SCORE_COLS: usize = TILE + 16;

/// Rows that are computed together at most, and vectors of columns: what the registers hold.
pub(super) const fn register_tile<I: Isa>() -> (usize, usize) {
    if I::LANES == 16 { (8, 3) } else { (4, 2) }
}

/// Where the keys and values of a tile lie. Pointers of groups beyond the positions in use are not read.
#[derive(Clone, Copy)]
pub(super) struct TileRef {
    /// `[words][16]`, words `key_stride` apart.
    pub(super) keys: [*const u32; GROUPS],
    pub(super) key_stride: usize,
    /// `[16 / PER_WORD][width]`, rows `value_stride` apart; a word holds the values of successive positions.
    pub(super) values: [*const u32; GROUPS],
    pub(super) value_stride: usize,
}

/// scores `[rows, count]`, rows [`SCORE_COLS`] apart = queries · keysᵀ. Scores up to the next whole vector are
/// written too, and rows up to the next power of two.
///
/// # Safety
/// That of [`Isa`]; queries hold `rows` so rounded, [`ROW_WORDS`] apart, of `depth` words; `tile` holds
/// `count` ≤ [`TILE`] positions; scores hold as many rows.
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn scores<I: Isa, W: Word>(
    queries: *const u32,
    rows: usize,
    depth: usize,
    tile: &TileRef,
    count: usize,
    scores: *mut f32,
) {
    let (vectors, most) = (count.div_ceil(I::LANES), register_tile::<I>().1);
    for first in (0..vectors).step_by(most) {
        // SAFETY: the caller's promise; vectors that lie in one group lie in a row.
        unsafe {
            let key = |vector: usize| {
                let position = (first + vector).min(vectors - 1) * I::LANES;
                tile.keys[position / GROUP].add(position % GROUP)
            };
            let (keys, scores) = ([key(0), key(1), key(2)], scores.add(first * I::LANES));
            let block = Scores { queries, depth, keys, stride: tile.key_stride, scores };
            match most.min(vectors - first) {
                1 => block.of_rows::<I, W, 1>(rows),
                2 => block.of_rows::<I, W, 2>(rows),
                _ => block.of_rows::<I, W, 3>(rows),
            }
        }
    }
}

struct Scores {
    queries: *const u32,
    depth: usize,
    keys: [*const u32; 3],
    stride: usize,
    scores: *mut f32,
}

#[allow(unsafe_code)]
impl Scores {
    /// # Safety
    /// As for [`scores`].
    #[inline(always)]
    unsafe fn of_rows<I: Isa, W: Word, const VECTORS: usize>(&self, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => self.block::<I, W, 1, VECTORS>(),
                2 => self.block::<I, W, 2, VECTORS>(),
                3..=4 => self.block::<I, W, 4, VECTORS>(),
                _ if register_tile::<I>().0 > 4 => self.block::<I, W, 8, VECTORS>(),
                _ => unreachable!("no path has more rows in its registers"),
            }
        }
    }

    /// # Safety
    /// As for [`scores`].
    #[inline(always)]
    unsafe fn block<I: Isa, W: Word, const ROWS: usize, const VECTORS: usize>(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[I::zero(); VECTORS]; ROWS];
            for k in 0..self.depth {
                let mut keys = [I::splat_word(0); VECTORS];
                for (vector, keys) in keys.iter_mut().enumerate() {
                    *keys = I::load_words(self.keys[vector].add(k * self.stride));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let query = I::splat_word(*self.queries.add(row * ROW_WORDS + k));
                    for (sum, keys) in sums.iter_mut().zip(keys) {
                        *sum = W::mac::<I>(*sum, query, keys);
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                for (vector, sum) in sums.into_iter().enumerate() {
                    I::store(self.scores.add(row * SCORE_COLS + vector * I::LANES), sum);
                }
            }
        }
    }
}

/// sums `[rows, width]` += probabilities · values, from zero where `fresh`. Rows up to the next power of two
/// are written.
///
/// # Safety
/// That of [`Isa`]; probabilities hold `rows` so rounded, [`ROW_WORDS`] apart, of at least `count` values;
/// `tile` holds `count` positions of `width` columns, a multiple of 16; sums hold as many rows.
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn add_values<I: Isa, W: Word>(
    probabilities: *const u32,
    rows: usize,
    tile: &TileRef,
    count: usize,
    sums: *mut f32,
    width: usize,
    fresh: bool,
) {
    let (vectors, most) = (width / I::LANES, register_tile::<I>().1);
    let depth = count.div_ceil(W::PER_WORD);
    for first in (0..vectors).step_by(most) {
        let column = first * I::LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let sums = sums.add(column);
            let block = Values { probabilities, depth, tile, column, sums, width, fresh };
            match most.min(vectors - first) {
                1 => block.of_rows::<I, W, 1>(rows),
                2 => block.of_rows::<I, W, 2>(rows),
                _ => block.of_rows::<I, W, 3>(rows),
            }
        }
    }
}

struct Values<'a> {
    probabilities: *const u32,
    depth: usize,
    tile: &'a TileRef,
    column: usize,
    sums: *mut f32,
    width: usize,
    fresh: bool,
}

#[allow(unsafe_code)]
impl Values<'_> {
    /// # Safety
    /// As for [`add_values`].
    #[inline(always)]
    unsafe fn of_rows<I: Isa, W: Word, const VECTORS: usize>(&self, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => self.block::<I, W, 1, VECTORS>(),
                2 => self.block::<I, W, 2, VECTORS>(),
                3..=4 => self.block::<I, W, 4, VECTORS>(),
                _ if register_tile::<I>().0 > 4 => self.block::<I, W, 8, VECTORS>(),
                _ => unreachable!("no path has more rows in its registers"),
            }
        }
    }

    /// # Safety
    /// As for [`add_values`].
    #[inline(always)]
    unsafe fn block<I: Isa, W: Word, const ROWS: usize, const VECTORS: usize>(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[I::zero(); VECTORS]; ROWS];
            if !self.fresh {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        *sum = I::load(self.sums.add(row * self.width + vector * I::LANES));
                    }
                }
            }
            let group_depth = GROUP / W::PER_WORD;
            for (group, start) in (0..self.depth).step_by(group_depth).enumerate() {
                let values = self.tile.values[group].add(self.column);
                let probabilities = self.probabilities.add(start);
                for k in 0..group_depth.min(self.depth - start) {
                    let mut columns = [I::splat_word(0); VECTORS];
                    for (vector, columns) in columns.iter_mut().enumerate() {
                        let row = values.add(k * self.tile.value_stride);
                        *columns = I::load_words(row.add(vector * I::LANES));
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let weight = I::splat_word(*probabilities.add(row * ROW_WORDS + k));
                        for (sum, columns) in sums.iter_mut().zip(columns) {
                            *sum = W::mac::<I>(*sum, weight, columns);
                        }
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                for (vector, sum) in sums.into_iter().enumerate() {
                    I::store(self.sums.add(row * self.width + vector * I::LANES), sum);
                }
            }
        }
    }
}
