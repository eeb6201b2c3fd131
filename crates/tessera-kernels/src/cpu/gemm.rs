//! The one matrix product: rows of activations times panels of weights, into f32.
//!
//! Every output is one chain of f32 accumulations over words of K in ascending order, with the same
//! instruction for one row, for a few and for many. K is cut only by storing and reloading the
//! accumulator, which keeps its bits, and never split between threads. So a row's result depends neither on its
//! neighbours nor on how the work was cut.
//!
//! Layouts, in words ([`super::word`]): weights in panels of 32 outputs `[N/32][K][32]`, one contiguous
//! stream; activations in tiles of a few rows `[M/MR][K][MR]`, as a register tile reads them (after Goto
//! and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).

use super::isa::{Isa, Path};
use super::memory::Buffer;
use super::word::Word;
use crate::error::Result;

/// Outputs in one panel.
pub(super) const PANEL: usize = 32;
/// Words of K for which a register tile stays in registers: a slice of a panel of 16 KiB, so that it and the
/// tile's rows fit the first-level cache.
const SLICE_WORDS: usize = 128;

/// Rows of a tile from which on the next slice is asked for while this one is multiplied. With fewer the
/// loads themselves come fast enough for the hardware to run ahead, and asking only slows it.
const AHEAD_ROWS: usize = 6;
/// The last tiles of rows that share the asking: memory is then busy for as long as possible.
const AHEAD_TILES: usize = 2;

/// Rows cut into tiles of nearly equal size, none larger than the path's register tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    rows: usize,
    tiles: usize,
}

impl Tiling {
    pub(super) fn new(rows: usize, path: Path) -> Self {
        Self { rows, tiles: rows.div_ceil(path.max_tile_rows()) }
    }

    pub(super) fn tiles(&self) -> usize {
        self.tiles
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows of one tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> std::ops::Range<usize> {
        let (small, larger) = (self.rows / self.tiles, self.rows % self.tiles);
        let start = tile * small + tile.min(larger);
        start..start + small + usize::from(tile < larger)
    }
}

/// Packs row `row` of a tile of `tile_rows` rows into words `[depth][tile_rows]`.
#[inline(always)]
pub(super) fn pack_row<W: Word>(values: &[f32], row: usize, tile_rows: usize, tile: &mut [u32]) {
    const CHUNK: usize = 64;
    let mut words = [0u32; CHUNK];
    for (chunk, values) in values.chunks(CHUNK * W::PER_WORD).enumerate() {
        let len = values.len().div_ceil(W::PER_WORD);
        W::pack(values, &mut words[..len]);
        let out = tile[chunk * CHUNK * tile_rows + row..].iter_mut().step_by(tile_rows);
        out.zip(&words[..len]).for_each(|(out, word)| *out = *word);
    }
}

/// Activations of one block of rows, packed.
#[derive(Debug)]
pub(super) struct PackedRows {
    words: Buffer<u32>,
}

impl PackedRows {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { words: Buffer::zeroed(0)? })
    }

    /// Room for `rows` rows of `depth` words.
    pub(super) fn reserve(&mut self, rows: usize, depth: usize) -> Result<()> {
        self.words.reserve(rows * depth)
    }

    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }
}

/// One register tile times one part of a panel.
///
/// a `[depth][ROWS]`, b `[depth][32]` from its first column on, c rows `c_stride` apart. Starts from zero
/// where `fresh`, else from what c holds.
///
/// # Safety
/// That of [`Isa`]; a, b and c hold the shapes above for two vectors of columns.
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn tile<I: Isa, W: Word, const ROWS: usize>(product: &Product, b: *const u32, c: *mut f32) {
    let Product { a, depth, c_stride, fresh, ahead, ahead_step, .. } = *product;
    // SAFETY: the caller's promise on shapes and instructions.
    unsafe {
        let mut sums = [[I::zero(); 2]; ROWS];
        if !fresh {
            for (row, sums) in sums.iter_mut().enumerate() {
                let c = c.add(row * c_stride);
                *sums = [I::load(c), I::load(c.add(I::LANES))];
            }
        }
        for k in 0..depth {
            let b0 = I::load_words(b.add(k * PANEL));
            let b1 = I::load_words(b.add(k * PANEL + I::LANES));
            I::prefetch(ahead.wrapping_add(k * ahead_step));
            I::prefetch(ahead.wrapping_add(k * ahead_step + PANEL / 2));
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = I::splat_word(*a.add(k * ROWS + row));
                *sums = [W::mac::<I>(sums[0], a, b0), W::mac::<I>(sums[1], a, b1)];
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            let c = c.add(row * c_stride);
            I::store(c, sums[0]);
            I::store(c.add(I::LANES), sums[1]);
        }
    }
}

/// Operands of [`multiply`].
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Packed rows `[depth][rows]`.
    pub(super) a: *const u32,
    /// Rows of the tile, 1 to [`Isa::MAX_TILE_ROWS`].
    pub(super) rows: usize,
    /// Panel `[depth][32]`.
    pub(super) b: *const u32,
    /// Words along K.
    pub(super) depth: usize,
    /// `[rows, 32]`, rows `c_stride` apart.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Start from zero rather than from what c holds.
    pub(super) fresh: bool,
    /// What to bring into the cache meanwhile, and by how many words to go on per word of K. Need not be valid.
    pub(super) ahead: *const u32,
    pub(super) ahead_step: usize,
}

/// c = a · b, or c += a · b, for one tile of rows and one panel.
///
/// # Safety
/// That of [`Isa`]; the pointers of `product` hold the shapes it states, and c is this thread's.
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn multiply<I: Isa, W: Word>(product: &Product) {
    for column in (0..PANEL).step_by(2 * I::LANES) {
        // SAFETY: the caller's promise; two vectors from `column` on lie inside the panel.
        unsafe {
            let (b, c) = (product.b.add(column), product.c.add(column));
            match product.rows {
                1 => tile::<I, W, 1>(product, b, c),
                2 => tile::<I, W, 2>(product, b, c),
                3 => tile::<I, W, 3>(product, b, c),
                4 => tile::<I, W, 4>(product, b, c),
                5 if I::MAX_TILE_ROWS >= 5 => tile::<I, W, 5>(product, b, c),
                6 if I::MAX_TILE_ROWS >= 6 => tile::<I, W, 6>(product, b, c),
                7 if I::MAX_TILE_ROWS >= 7 => tile::<I, W, 7>(product, b, c),
                8 if I::MAX_TILE_ROWS >= 8 => tile::<I, W, 8>(product, b, c),
                9 if I::MAX_TILE_ROWS >= 9 => tile::<I, W, 9>(product, b, c),
                10 if I::MAX_TILE_ROWS >= 10 => tile::<I, W, 10>(product, b, c),
                11 if I::MAX_TILE_ROWS >= 11 => tile::<I, W, 11>(product, b, c),
                12 if I::MAX_TILE_ROWS >= 12 => tile::<I, W, 12>(product, b, c),
                13 if I::MAX_TILE_ROWS >= 13 => tile::<I, W, 13>(product, b, c),
                14 if I::MAX_TILE_ROWS >= 14 => tile::<I, W, 14>(product, b, c),
                rows => unreachable!("a tile of {rows} rows is larger than the registers"),
            }
        }
    }
}

/// Packed rows times one panel: sums `[rows, 32]`. The panel goes through the cache in slices, each met
/// by all tiles of rows; during the last of them the next slice is on its way ([`AHEAD_ROWS`], [`AHEAD_TILES`]).
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn multiply_panel<I: Isa, W: Word>(
    rows: &[u32],
    tiling: &Tiling,
    panel: &[u32],
    sums: &mut [f32],
) {
    let (depth, askers) = (panel.len() / PANEL, tiling.tiles().min(AHEAD_TILES));
    assert!(rows.len() >= tiling.rows() * depth && sums.len() >= tiling.rows() * PANEL);
    for start in (0..depth).step_by(SLICE_WORDS) {
        let len = SLICE_WORDS.min(depth - start);
        let b = panel[start * PANEL..].as_ptr();
        for index in 0..tiling.tiles() {
            let tile = tiling.tile(index);
            let (ahead, ahead_step) = match (index + askers).checked_sub(tiling.tiles()) {
                Some(part) if tile.len() >= AHEAD_ROWS => {
                    (b.wrapping_add((askers + part) * len * PANEL / askers), PANEL / askers)
                }
                _ => (b, PANEL),
            };
            let product = Product {
                a: rows[tile.start * depth + start * tile.len()..].as_ptr(),
                rows: tile.len(),
                b,
                depth: len,
                c: sums[tile.start * PANEL..].as_mut_ptr(),
                c_stride: PANEL,
                fresh: start == 0,
                ahead,
                ahead_step,
            };
            // SAFETY: the assertion above covers a and c, the slice of the panel b.
            unsafe { multiply::<I, W>(&product) };
        }
    }
}
