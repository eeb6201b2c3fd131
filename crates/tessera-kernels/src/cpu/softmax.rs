//! Softmax of rows of scores, tile by tile, in powers of two.

use super::isa::Isa;
use super::products::TILE;
use super::word::Word;

/// Where 2^x ends to be a normal number; from here down it counts as 0.
const LOWEST: f32 = -126.0;

/// 2^x for x ≤ 0, exactly 0 from −126 down. Relative error below 3e-7.
///
/// x = n + r with |r| ≤ ½, a polynomial of degree 5 in r (minimax of the relative error, its first coefficient
/// set to 1), scaled by 2^n.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
// A coefficient of the fit is close to ln 2 and is not it.
#[allow(clippy::approx_constant)]
#[inline(always)]
unsafe fn exp2<I: Isa>(x: I::Floats) -> I::Floats {
    // Adding 1.5·2^23 leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // SAFETY: the caller's promise.
    unsafe {
        let shifted = I::add(x, I::splat(ROUND));
        let n = I::add(shifted, I::splat(-ROUND));
        let r = I::mul_add(n, I::splat(-1.0), x);
        let mut p = I::splat(1.327_647_2e-3);
        for coefficient in [9.675_541e-3, 5.550_713_3e-2, 2.402_212e-1, 6.931_47e-1, 1.0] {
            p = I::mul_add(p, r, I::splat(coefficient));
        }
        I::keep_above(I::add_exponent(p, shifted), x, I::splat(LOWEST))
    }
}

/// 2^x for one x ≤ 0.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn exp2_one<I: Isa>(x: f32) -> f32 {
    // SAFETY: the caller's promise; the array holds the widest vector.
    unsafe {
        let mut out = [0f32; 16];
        I::store(out.as_mut_ptr(), exp2::<I>(I::splat(x)));
        out[0]
    }
}

/// The lanes of a vector joined by `join`, halves with halves.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn fold<I: Isa>(lanes: I::Floats, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut out = [0f32; 16];
    // SAFETY: the caller's promise; the array holds the widest vector.
    unsafe { I::store(out.as_mut_ptr(), lanes) };
    let mut width = I::LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            out[lane] = join(out[lane], out[lane + width]);
        }
    }
    out[0]
}

/// Running maximum, in powers of two, and sum of one row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowState {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl RowState {
    pub(super) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Turns the first `visible` of a row of scores into probabilities 2^(score·scale − max), rounded into `words`;
/// the others up to `count`, and scores that are no numbers, become exactly 0. Returns what the sums of earlier
/// tiles are to be multiplied by.
/// Position i of the tile belongs to lane i mod LANES of the sum.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn probabilities<I: Isa, W: Word>(
    scores: &mut [f32],
    visible: usize,
    count: usize,
    scale: f32,
    state: &mut RowState,
    words: &mut [u32],
) -> f32 {
    let padded = count.next_multiple_of(2 * I::LANES);
    let scores = &mut scores[..TILE];
    assert!(padded <= TILE && words.len() >= TILE / W::PER_WORD);
    scores[visible..padded].fill(f32::NEG_INFINITY);
    let scores = scores.as_mut_ptr();
    // SAFETY: the caller's promise; all offsets are below `padded` values, which both arrays hold.
    unsafe {
        let mut lanes = I::splat(f32::NEG_INFINITY);
        for at in (0..padded).step_by(I::LANES) {
            lanes = I::max(lanes, I::load(scores.add(at)));
        }
        let top = fold::<I>(lanes, |a, b| if a > b { a } else { b }) * scale;
        let max = if top > state.max { top } else { state.max };
        let (scale, offset) = (I::splat(scale), I::splat(-max));
        let mut lanes = I::zero();
        for at in (0..padded).step_by(2 * I::LANES) {
            for at in [at, at + I::LANES] {
                let power = exp2::<I>(I::mul_add(I::load(scores.add(at)), scale, offset));
                lanes = I::add(lanes, power);
                I::store(scores.add(at), power);
            }
            W::narrow::<I>(scores.add(at), words[at / W::PER_WORD..].as_mut_ptr());
        }
        let shrink = if max == state.max { 1.0 } else { exp2_one::<I>(state.max - max) };
        let sum = state.sum * shrink + fold::<I>(lanes, |a, b| a + b);
        *state = RowState { max, sum };
        shrink
    }
}

/// row *= factor.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn scale_row<I: Isa>(row: &mut [f32], factor: f32) {
    for value in row.chunks_exact_mut(I::LANES) {
        // SAFETY: the caller's promise; a chunk is a vector.
        unsafe { I::store(value.as_mut_ptr(), I::mul(I::load(value.as_ptr()), I::splat(factor))) };
    }
}

/// Adds the result of a chunk of positions to that of all before it. A chunk of which nothing was seen adds
/// nothing.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn merge<I: Isa>(
    chunk: RowState,
    from: &[f32],
    total: &mut RowState,
    to: &mut [f32],
) {
    if chunk.sum == 0.0 {
        return;
    }
    if total.sum == 0.0 {
        to.copy_from_slice(from);
        *total = chunk;
        return;
    }
    let max = if chunk.max > total.max { chunk.max } else { total.max };
    // SAFETY: the caller's promise.
    let (old, new) = unsafe { (exp2_one::<I>(total.max - max), exp2_one::<I>(chunk.max - max)) };
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *to * old + from * new);
    *total = RowState { max, sum: total.sum * old + chunk.sum * new };
}
