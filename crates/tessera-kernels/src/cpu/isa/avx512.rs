//! AVX-512, with and without the BF16 dot product.

use std::arch::x86_64::*;

use super::{Isa, Task};

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

pub(super) fn has_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// # Safety
/// [`is_available`] and [`has_bf16`].
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn enter_bf16<T: Task>(task: T) {
    // SAFETY: this function has the instructions on.
    unsafe { task.run::<Avx512Bf16>() }
}

/// # Safety
/// [`is_available`].
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn enter<T: Task>(task: T) {
    // SAFETY: this function has the instructions on.
    unsafe { task.run::<Avx512>() }
}

pub(in crate::cpu) struct Avx512Bf16;
pub(in crate::cpu) struct Avx512;

/// What the two paths share: all but the product of pairs and how they are made.
macro_rules! isa_512 {
    ($isa:ty, $mac_pairs:item $(, $narrow_pairs:item)?) => {
        // SAFETY of each function: by the trait's contract the caller has the instructions on and the
        // pointers are valid.
        #[allow(unsafe_code, unsafe_op_in_unsafe_fn)]
        impl Isa for $isa {
            const LANES: usize = 16;
            // 28 sums, two vectors of weights and one of activations in 32 registers.
            const MAX_TILE_ROWS: usize = 14;
            type Floats = __m512;
            type Words = __m512i;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                _mm512_setzero_ps()
            }

            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                _mm512_loadu_ps(from)
            }

            #[inline(always)]
            unsafe fn store(to: *mut f32, value: __m512) {
                _mm512_storeu_ps(to, value)
            }

            #[inline(always)]
            unsafe fn load_words(from: *const u32) -> __m512i {
                _mm512_loadu_si512(from.cast())
            }

            #[inline(always)]
            unsafe fn splat_word(word: u32) -> __m512i {
                _mm512_set1_epi32(word as i32)
            }

            #[inline(always)]
            $mac_pairs

            #[inline(always)]
            unsafe fn mac_singles(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
                _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc)
            }

            #[inline(always)]
            unsafe fn splat(value: f32) -> __m512 {
                _mm512_set1_ps(value)
            }

            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                _mm512_add_ps(a, b)
            }

            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                _mm512_mul_ps(a, b)
            }

            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                _mm512_max_ps(a, b)
            }

            #[inline(always)]
            unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
                _mm512_fmadd_ps(a, b, c)
            }

            #[inline(always)]
            unsafe fn add_exponent(value: __m512, steps: __m512) -> __m512 {
                let steps = _mm512_slli_epi32::<23>(_mm512_castps_si512(steps));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), steps))
            }

            #[inline(always)]
            unsafe fn keep_above(value: __m512, x: __m512, limit: __m512) -> __m512 {
                _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, limit), value)
            }

            $($narrow_pairs)?

            #[inline(always)]
            fn prefetch(at: *const u32) {
                // SAFETY: a prefetch of any address is harmless.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
            }
        }
    };
}

isa_512!(
    Avx512Bf16,
    unsafe fn mac_pairs(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        let pairs = |words| std::mem::transmute::<__m512i, __m512bh>(words);
        _mm512_dpbf16_ps(acc, pairs(a), pairs(b))
    },
    #[inline(always)]
    unsafe fn narrow_pairs(from: *const f32, to: *mut u32) {
        let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)));
        let pairs = _mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
    }
);

isa_512!(
    Avx512,
    unsafe fn mac_pairs(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        let (a_low, b_low) = (_mm512_slli_epi32::<16>(a), _mm512_slli_epi32::<16>(b));
        let acc = _mm512_fmadd_ps(_mm512_castsi512_ps(a_low), _mm512_castsi512_ps(b_low), acc);
        let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let (a, b) = (_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc)
    }
);
