//! Arrays of four, which the compiler turns into whatever the target has.

use super::Isa;

pub(in crate::cpu) struct Portable;

const LANES: usize = 4;

#[inline(always)]
fn zip(
    acc: [f32; LANES],
    a: [u32; LANES],
    b: [u32; LANES],
    f: impl Fn(f32, u32, u32) -> f32,
) -> [f32; LANES] {
    let mut out = acc;
    for lane in 0..LANES {
        out[lane] = f(acc[lane], a[lane], b[lane]);
    }
    out
}

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = a;
    for lane in 0..LANES {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

#[allow(unsafe_code)]
impl Isa for Portable {
    const LANES: usize = LANES;
    const MAX_TILE_ROWS: usize = 4;
    type Floats = [f32; LANES];
    type Words = [u32; LANES];

    #[inline(always)]
    unsafe fn zero() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; LANES] {
        // SAFETY: valid for LANES elements by the trait's contract.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; LANES]) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> [u32; LANES] {
        // SAFETY: as in `load`.
        unsafe { from.cast::<[u32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn splat_word(word: u32) -> [u32; LANES] {
        [word; LANES]
    }

    #[inline(always)]
    unsafe fn mac_pairs(acc: [f32; LANES], a: [u32; LANES], b: [u32; LANES]) -> [f32; LANES] {
        let low = |pair: u32| f32::from_bits(pair << 16);
        let high = |pair: u32| f32::from_bits(pair & 0xffff_0000);
        zip(acc, a, b, |acc, a, b| acc + low(a) * low(b) + high(a) * high(b))
    }

    #[inline(always)]
    unsafe fn mac_singles(acc: [f32; LANES], a: [u32; LANES], b: [u32; LANES]) -> [f32; LANES] {
        zip(acc, a, b, |acc, a, b| acc + f32::from_bits(a) * f32::from_bits(b))
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn max(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn mul_add(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        map2(map2(a, b, |a, b| a * b), c, |product, c| product + c)
    }

    #[inline(always)]
    unsafe fn add_exponent(value: [f32; LANES], steps: [f32; LANES]) -> [f32; LANES] {
        map2(value, steps, |value, steps| {
            f32::from_bits(value.to_bits().wrapping_add(steps.to_bits() << 23))
        })
    }

    #[inline(always)]
    unsafe fn keep_above(
        value: [f32; LANES],
        x: [f32; LANES],
        limit: [f32; LANES],
    ) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for lane in 0..LANES {
            out[lane] = if x[lane] > limit[lane] { value[lane] } else { 0.0 };
        }
        out
    }

    #[inline(always)]
    fn prefetch(_at: *const u32) {}
}
