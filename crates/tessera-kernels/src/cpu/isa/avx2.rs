//! AVX2 with FMA.

use std::arch::x86_64::*;

use super::{Isa, Task};

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// # Safety
/// [`is_available`].
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn enter<T: Task>(task: T) {
    // SAFETY: this function has the instructions on.
    unsafe { task.run::<Avx2>() }
}

pub(in crate::cpu) struct Avx2;

// SAFETY of each function: by the trait's contract the caller has the instructions on and the pointers
// are valid.
#[allow(unsafe_code, unsafe_op_in_unsafe_fn)]
impl Isa for Avx2 {
    const LANES: usize = 8;
    // Eight sums, four vectors of widened weights, two of activations in 16 registers.
    const MAX_TILE_ROWS: usize = 4;
    type Floats = __m256;
    type Words = __m256i;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        _mm256_setzero_ps()
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        _mm256_loadu_ps(from)
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m256) {
        _mm256_storeu_ps(to, value)
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> __m256i {
        _mm256_loadu_si256(from.cast())
    }

    #[inline(always)]
    unsafe fn splat_word(word: u32) -> __m256i {
        _mm256_set1_epi32(word as i32)
    }

    #[inline(always)]
    unsafe fn mac_pairs(acc: __m256, a: __m256i, b: __m256i) -> __m256 {
        let (a_low, b_low) = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
        let acc = _mm256_fmadd_ps(_mm256_castsi256_ps(a_low), _mm256_castsi256_ps(b_low), acc);
        let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        let (a, b) = (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
        _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), acc)
    }

    #[inline(always)]
    unsafe fn mac_singles(acc: __m256, a: __m256i, b: __m256i) -> __m256 {
        _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), acc)
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        _mm256_set1_ps(value)
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        _mm256_max_ps(a, b)
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    unsafe fn add_exponent(value: __m256, steps: __m256) -> __m256 {
        let steps = _mm256_slli_epi32::<23>(_mm256_castps_si256(steps));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), steps))
    }

    #[inline(always)]
    unsafe fn keep_above(value: __m256, x: __m256, limit: __m256) -> __m256 {
        _mm256_and_ps(value, _mm256_cmp_ps::<_CMP_GT_OQ>(x, limit))
    }

    #[inline(always)]
    fn prefetch(at: *const u32) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}
