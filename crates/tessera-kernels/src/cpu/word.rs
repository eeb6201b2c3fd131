//! What 32 bits of weight or activation mean: a pair of BF16 values, or one f32.
//!
//! Panels, register tiles and packed rows are arrays of words, so that one kernel serves both formats.

use half::bf16;

use super::isa::Isa;
use crate::error::WeightError;
use crate::weights::{SliceReader, TensorSlice};

/// Format of weights, GEMM inputs, attention inputs and KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuFormat {
    /// BF16, products accumulated in f32.
    Bf16,
    /// f32 throughout; twice the memory and traffic, the precision of the reference.
    F32,
}

/// One format of words.
pub(super) trait Word: 'static {
    /// Values along K in one word.
    const PER_WORD: usize;
    type Element: Copy + Default + Send + Sync;

    fn read(
        src: &dyn SliceReader,
        slice: &TensorSlice<'_>,
        out: &mut [Self::Element],
    ) -> Result<(), WeightError>;
    /// The first words of a row of weights, as many as `out` and the row hold; a last one is filled up
    /// with 0.
    fn block(row: &[Self::Element], out: &mut [u32]);
    /// Rounds a row of activations to words; the last is filled up with 0.
    fn pack(row: &[f32], out: &mut [u32]);
    /// Spreads words into values, as many as `out` holds.
    fn unpack(words: impl Iterator<Item = u32>, out: &mut [f32]);
    /// Rounds one value into place `part` < PER_WORD of a word; place 0 clears the others.
    fn place(value: f32, part: usize, word: &mut u32);
    /// The value at place `part` of a word.
    fn pick(word: u32, part: usize) -> f32;
    /// Rounds 2 · LANES values to words, as [`Isa::narrow_pairs`] does.
    ///
    /// # Safety
    /// That of [`Isa`], for as many values and words.
    #[allow(unsafe_code)]
    unsafe fn narrow<I: Isa>(from: *const f32, to: *mut u32);
    /// # Safety
    /// That of [`Isa`].
    #[allow(unsafe_code)]
    unsafe fn mac<I: Isa>(acc: I::Floats, a: I::Words, b: I::Words) -> I::Floats;
}

/// Two BF16 values, the one of lower index in the low half.
pub(super) struct Pairs;

/// One f32.
pub(super) struct Singles;

/// Bits of `value` rounded to BF16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if value.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

/// Rounds a row of values to words, the last filled up with 0.
///
/// # Safety
/// That of [`Isa`].
#[allow(unsafe_code)]
#[inline(always)]
pub(super) unsafe fn narrow_row<I: Isa, W: Word>(values: &[f32], words: &mut [u32]) {
    let whole = values.len() / (2 * I::LANES) * (2 * I::LANES);
    assert!(words.len() >= values.len().div_ceil(W::PER_WORD));
    for at in (0..whole).step_by(2 * I::LANES) {
        // SAFETY: the assertion covers the words, the loop's bounds the values.
        unsafe { W::narrow::<I>(values[at..].as_ptr(), words[at / W::PER_WORD..].as_mut_ptr()) };
    }
    W::pack(&values[whole..], &mut words[whole / W::PER_WORD..]);
}

/// Puts a row into place `part` of as many words, as [`Word::place`] does.
#[inline(always)]
pub(super) fn place_row<W: Word>(values: &[f32], part: usize, words: &mut [u32]) {
    words.iter_mut().zip(values).for_each(|(word, value)| W::place(*value, part, word));
}

impl Word for Pairs {
    const PER_WORD: usize = 2;
    type Element = bf16;

    fn read(
        src: &dyn SliceReader,
        slice: &TensorSlice<'_>,
        out: &mut [bf16],
    ) -> Result<(), WeightError> {
        src.read_bf16(slice, out)
    }

    #[inline(always)]
    fn block(row: &[bf16], out: &mut [u32]) {
        let (pairs, rest) = row.as_chunks::<2>();
        for (word, [low, high]) in out.iter_mut().zip(pairs) {
            *word = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        }
        if let ([last], Some(word)) = (rest, out.get_mut(pairs.len())) {
            *word = u32::from(last.to_bits());
        }
    }

    #[inline(always)]
    fn pack(row: &[f32], out: &mut [u32]) {
        let (pairs, rest) = row.as_chunks::<2>();
        for (word, [low, high]) in out.iter_mut().zip(pairs) {
            *word = bf16_bits(*low) | bf16_bits(*high) << 16;
        }
        if let [last] = rest {
            out[pairs.len()] = bf16_bits(*last);
        }
    }

    #[inline(always)]
    fn unpack(words: impl Iterator<Item = u32>, out: &mut [f32]) {
        for (pair, word) in out.chunks_mut(2).zip(words) {
            pair[0] = f32::from_bits(word << 16);
            if let [_, high] = pair {
                *high = f32::from_bits(word & 0xffff_0000);
            }
        }
    }

    #[inline(always)]
    fn place(value: f32, part: usize, word: &mut u32) {
        *word = match part {
            0 => bf16_bits(value),
            _ => *word & 0xffff | bf16_bits(value) << 16,
        };
    }

    #[inline(always)]
    fn pick(word: u32, part: usize) -> f32 {
        f32::from_bits(if part == 0 { word << 16 } else { word & 0xffff_0000 })
    }

    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn narrow<I: Isa>(from: *const f32, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { I::narrow_pairs(from, to) }
    }

    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn mac<I: Isa>(acc: I::Floats, a: I::Words, b: I::Words) -> I::Floats {
        // SAFETY: the caller's promise.
        unsafe { I::mac_pairs(acc, a, b) }
    }
}

impl Word for Singles {
    const PER_WORD: usize = 1;
    type Element = f32;

    fn read(
        src: &dyn SliceReader,
        slice: &TensorSlice<'_>,
        out: &mut [f32],
    ) -> Result<(), WeightError> {
        src.read_f32(slice, out)
    }

    #[inline(always)]
    fn block(row: &[f32], out: &mut [u32]) {
        out.iter_mut().zip(row).for_each(|(word, value)| *word = value.to_bits());
    }

    #[inline(always)]
    fn pack(row: &[f32], out: &mut [u32]) {
        out.iter_mut().zip(row).for_each(|(word, value)| *word = value.to_bits());
    }

    #[inline(always)]
    fn unpack(words: impl Iterator<Item = u32>, out: &mut [f32]) {
        out.iter_mut().zip(words).for_each(|(value, word)| *value = f32::from_bits(word));
    }

    #[inline(always)]
    fn place(value: f32, _part: usize, word: &mut u32) {
        *word = value.to_bits();
    }

    #[inline(always)]
    fn pick(word: u32, _part: usize) -> f32 {
        f32::from_bits(word)
    }

    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn narrow<I: Isa>(from: *const f32, to: *mut u32) {
        // SAFETY: the caller's promise: 2 · LANES values and words, which have the same bits.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u32>(), to, 2 * I::LANES) }
    }

    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn mac<I: Isa>(acc: I::Floats, a: I::Words, b: I::Words) -> I::Floats {
        // SAFETY: the caller's promise.
        unsafe { I::mac_singles(acc, a, b) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let mut bits = 0u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let (ours, theirs) = (bf16_bits(value), u32::from(bf16::from_f32(value).to_bits()));
            assert_eq!(ours, theirs, "{value} ({bits:08x})");
        }
        for value in [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::NAN] {
            assert_eq!(bf16_bits(value), u32::from(bf16::from_f32(value).to_bits()));
        }
    }

    #[test]
    fn words_hold_what_was_packed_at_any_length() {
        for len in 1..9usize {
            let row: Vec<f32> = (0..len).map(|i| i as f32 - 2.5).collect();
            let mut words = vec![u32::MAX; len.div_ceil(2)];
            Pairs::pack(&row, &mut words);
            let elements: Vec<bf16> = row.iter().map(|value| bf16::from_f32(*value)).collect();
            let mut expected = vec![u32::MAX; len.div_ceil(2)];
            Pairs::block(&elements, &mut expected);
            assert_eq!(words, expected);
            let mut back = vec![f32::NAN; len];
            Pairs::unpack(words.into_iter(), &mut back);
            assert_eq!(back, row);
        }
    }
}
