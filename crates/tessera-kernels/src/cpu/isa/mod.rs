//! Instruction sets, chosen when a backend is made.
//!
//! A kernel is written once, over [`Isa`], as a [`Task`]. [`Path::dispatch`] runs it inside a function that
//! has the instructions switched on, into which all of it is inlined. Bits depend on the path and on
//! nothing else: each has one way to multiply and accumulate, and uses it for every shape.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::word::bf16_bits;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// `vdpbf16ps`: BF16 pairs multiplied and added in one instruction (Zen 4, Sapphire Rapids).
    Avx512Bf16,
    /// 512-bit vectors; BF16 is widened to f32 first.
    Avx512,
    /// 256-bit vectors and fused multiply-add.
    Avx2,
    /// What every target has. No fused multiply-add.
    Portable,
}

impl Path {
    /// All paths, the fastest first.
    pub const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// The fastest path of this machine.
    pub fn detect() -> Self {
        let available = Self::ALL.into_iter().find(|path| path.is_available());
        available.unwrap_or(Self::Portable)
    }

    /// Whether this machine has the instructions.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        match self {
            Self::Avx512Bf16 => avx512::is_available() && avx512::has_bf16(),
            Self::Avx512 => avx512::is_available(),
            Self::Avx2 => avx2::is_available(),
            Self::Portable => true,
        }
    }

    /// Whether this machine has the instructions.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// Short name for logs and the numerics id.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Largest number of rows of one register tile.
    pub(super) fn max_tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512::Avx512Bf16::MAX_TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::MAX_TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::MAX_TILE_ROWS,
            _ => portable::Portable::MAX_TILE_ROWS,
        }
    }

    /// f32 values in one vector.
    pub(super) fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::Avx512 => avx512::Avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::LANES,
            _ => portable::Portable::LANES,
        }
    }

    /// Runs a kernel with this path's instructions. The path was found available when the backend was made.
    #[allow(unsafe_code)]
    pub(super) fn dispatch(self, task: impl Task) {
        match self {
            // SAFETY: `is_available` of the path is checked before a backend with it exists.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { avx512::enter_bf16(task) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::enter(task) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::enter(task) },
            // SAFETY: the portable path needs no instructions beyond the target's.
            _ => unsafe { task.run::<portable::Portable>() },
        }
    }
}

/// A kernel over any instruction set. Implementations are `#[inline(always)]`.
pub(super) trait Task {
    /// # Safety
    /// The caller has the instructions of `I` switched on, so that everything inlines into it.
    #[allow(unsafe_code)]
    unsafe fn run<I: Isa>(self);
}

/// Vectors of one instruction set. A word is 32 bits of weight or activation: a BF16 pair or an f32.
///
/// # Safety of all functions
/// The machine has the instructions, and pointers are valid for [`Isa::LANES`] elements, unaligned.
#[allow(unsafe_code, clippy::missing_safety_doc)]
pub(super) trait Isa: 'static {
    const LANES: usize;
    /// Rows of a register tile of two vectors each, as many as the registers hold.
    const MAX_TILE_ROWS: usize;
    type Floats: Copy;
    type Words: Copy;

    unsafe fn zero() -> Self::Floats;
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn store(to: *mut f32, value: Self::Floats);
    unsafe fn load_words(from: *const u32) -> Self::Words;
    unsafe fn splat_word(word: u32) -> Self::Words;
    /// acc + a.low · b.low + a.high · b.high, of BF16 pairs.
    unsafe fn mac_pairs(acc: Self::Floats, a: Self::Words, b: Self::Words) -> Self::Floats;
    /// acc + a · b, of f32 words.
    unsafe fn mac_singles(acc: Self::Floats, a: Self::Words, b: Self::Words) -> Self::Floats;
    unsafe fn splat(value: f32) -> Self::Floats;
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The larger of each pair; b where one of them is NaN.
    unsafe fn max(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a · b + c, rounded once where the path has fused multiply-add.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// value with the low bits of `steps` added to its exponent.
    unsafe fn add_exponent(value: Self::Floats, steps: Self::Floats) -> Self::Floats;
    /// value where x > limit, else 0.
    unsafe fn keep_above(value: Self::Floats, x: Self::Floats, limit: Self::Floats)
    -> Self::Floats;
    /// Asks for the cache line at any address, which need not be valid.
    fn prefetch(at: *const u32);
    /// Rounds 2 · LANES values to as many BF16 pairs as [`super::word::Pairs`] does; a path may take subnormal
    /// values for 0.
    #[inline(always)]
    unsafe fn narrow_pairs(from: *const f32, to: *mut u32) {
        for pair in 0..Self::LANES {
            // SAFETY: the caller's promise: valid for 2 · LANES values and LANES words.
            unsafe {
                let [low, high] = from.add(2 * pair).cast::<[f32; 2]>().read_unaligned();
                to.add(pair).write_unaligned(bf16_bits(low) | bf16_bits(high) << 16);
            }
        }
    }
}
