//! Random numbers, weights in memory, and a backend with a few planned slots.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use half::bf16;
use tessera_collective::{Communicator, threads};
use tessera_kernels::{
    Act, ActKind, Backend, CpuBackend, CpuFormat, DType, HostRows, LinearPart, LinearSpec,
    NormSpec, PartLayout, ReferenceBackend, SliceReader, SlotId, SlotSpec, StepLimits, TensorSlice,
    WeightError, WeightFormat, cpu::Path,
};
use tessera_types::Epoch;

/// A backend that the tests can make, with the error it is allowed.
pub trait TestBackend {
    type Backend: Backend;
    fn make() -> Self::Backend;
    /// Whether this machine has what the backend needs.
    fn is_available() -> bool {
        true
    }
    /// Whether it captures steps that only decode.
    const CAPTURES: bool = false;
    /// Largest difference to the f64 twin, as a share of the twin's largest value.
    const TOLERANCE: f64;
}

/// Rounding of f32 sums.
const F32_TOLERANCE: f64 = 2e-6;
/// Rounding of inputs to BF16, 2⁻⁹ of each: queries, keys and values after the rotation, probabilities.
const BF16_TOLERANCE: f64 = 1.0 / 128.0;

/// f32 on the host.
pub struct Reference;

impl TestBackend for Reference {
    type Backend = ReferenceBackend;
    fn make() -> Self::Backend {
        ReferenceBackend::new()
    }
    const TOLERANCE: f64 = F32_TOLERANCE;
}

/// The CPU backend with f32 weights, and an odd number of threads.
pub struct CpuF32;

impl TestBackend for CpuF32 {
    type Backend = CpuBackend;
    fn make() -> Self::Backend {
        CpuBackend::new(3, CpuFormat::F32).unwrap()
    }
    const TOLERANCE: f64 = F32_TOLERANCE;
}

/// The CPU backend as it serves.
pub struct CpuBf16;

impl TestBackend for CpuBf16 {
    type Backend = CpuBackend;
    fn make() -> Self::Backend {
        CpuBackend::new(2, CpuFormat::Bf16).unwrap()
    }
    const TOLERANCE: f64 = BF16_TOLERANCE;
}

/// What every machine can run.
pub struct CpuPortable;

impl TestBackend for CpuPortable {
    type Backend = CpuBackend;
    fn make() -> Self::Backend {
        CpuBackend::with_path(1, CpuFormat::Bf16, Path::Portable).unwrap()
    }
    const TOLERANCE: f64 = BF16_TOLERANCE;
}

#[cfg(feature = "cuda")]
#[path = "on_cuda.rs"]
mod on_cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod on_cuda;
pub(crate) use on_cuda::*;

/// Instantiates generic tests for every backend.
macro_rules! backend_tests {
    (@$module:ident $backend:ident: $($test:ident),*) => {
        mod $module {
            use crate::support::{$backend, TestBackend};

            $(#[test]
            fn $test() {
                if $backend::is_available() {
                    super::$test::<$backend>();
                } else {
                    eprintln!("skipped: no NVIDIA driver on this machine");
                }
            })*
        }
    };
    ($($test:ident),* $(,)?) => {
        backend_tests!(@reference Reference: $($test),*);
        backend_tests!(@cpu_f32 CpuF32: $($test),*);
        backend_tests!(@cpu_bf16 CpuBf16: $($test),*);
        backend_tests!(@cpu_portable CpuPortable: $($test),*);
        crate::support::cuda_tests!($($test),*);
    };
}
pub(crate) use backend_tests;

/// SplitMix64; irregular is all it needs to be.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In `low..high`.
    pub fn index(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + (self.next() % range.len() as u64) as usize
    }

    /// In [-1, 1), and exact in BF16, so that backends with BF16 inputs see the same values.
    pub fn value(&mut self) -> f32 {
        bf16::from_f32((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// Published tensors that live in memory.
#[derive(Default, Clone)]
pub struct MemoryWeights(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl MemoryWeights {
    pub fn add(&mut self, name: &str, shape: &[usize], noise: &mut Noise) -> Vec<f32> {
        let values = noise.values(shape.iter().product());
        self.0.insert(name.to_owned(), (shape.to_vec(), values.clone()));
        values
    }
}

impl SliceReader for MemoryWeights {
    fn read_f32(&self, slice: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError> {
        let (shape, values) = &self.0[slice.tensor];
        assert_eq!(shape, slice.shape, "{}", slice.tensor);
        assert_eq!(out.len(), slice.len(), "{}", slice.tensor);
        let width = slice.matrix_cols();
        let rows = slice.rows.clone().flat_map(|row| &values[row * width..][slice.cols.clone()]);
        out.iter_mut().zip(rows).for_each(|(out, value)| *out = *value);
        Ok(())
    }

    fn read_bf16(&self, slice: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError> {
        let mut wide = vec![0.0; out.len()];
        self.read_f32(slice, &mut wide)?;
        out.iter_mut().zip(wide).for_each(|(out, value)| *out = bf16::from_f32(value));
        Ok(())
    }
}

/// Rows `rows` and columns `cols` of a published linear, padded by a few zeros.
pub fn part(
    module: &str,
    shape: [usize; 2],
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    bias: bool,
) -> LinearPart {
    let padded_rows = rows.len();
    LinearPart { module: module.to_owned(), shape: shape.to_vec(), rows, cols, padded_rows, bias }
}

pub fn stacked(parts: Vec<LinearPart>) -> LinearSpec {
    let padded_cols = parts[0].cols.len();
    LinearSpec { parts, padded_cols, layout: PartLayout::Stacked, format: WeightFormat::Dense }
}

pub fn norm_spec(tensor: &str, size: usize) -> NormSpec {
    NormSpec { tensor: tensor.to_owned(), size, eps: 1e-6 }
}

/// View of slot `slot`, f32.
pub fn act(slot: u32, rows: usize, cols: usize) -> Act {
    Act {
        slot: SlotId(slot),
        rows: rows as u32,
        cols: cols as u32,
        dtype: DType::F32,
        kind: ActKind::Native,
    }
}

/// View of slot `slot` in the type that this backend's linears read.
pub fn native<B: Backend>(b: &B, slot: u32, rows: usize, cols: usize) -> Act {
    Act { dtype: b.caps().activation_dtype, ..act(slot, rows, cols) }
}

/// Time for a step to end.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub const LIMITS: StepLimits = StepLimits {
    max_tokens: 512,
    max_sequences: 8,
    max_blocks_per_sequence: 64,
    max_visual_rows: 128,
    num_real_tokens: 0,
};

/// A backend whose slots 0 to 5 hold 512 × 768 elements each.
pub fn planned<B: TestBackend>(limits: StepLimits) -> B::Backend {
    let mut b = B::make();
    let slot = |id| SlotSpec { slot: SlotId(id), max_rows: 512, cols: 768, dtype: DType::F32 };
    b.plan(&[0, 1, 2, 3, 4, 5].map(slot), &limits).unwrap();
    b
}

/// Uploads a whole slot.
pub fn set<B: Backend>(b: &mut B, act: Act, values: &[f32]) {
    assert_eq!(values.len(), act.len());
    b.upload_rows(act, 0, HostRows { values, cols: act.cols }).unwrap();
}

/// Compares with the f64 twin.
pub fn assert_close<B: TestBackend>(found: &[f32], twin: &[f64], what: &str) {
    assert_eq!(found.len(), twin.len(), "{what}: number of values");
    let scale = twin.iter().map(|value| value.abs()).fold(1e-3, f64::max);
    for (i, (found, twin)) in found.iter().zip(twin).enumerate() {
        let share = (f64::from(*found) - twin).abs() / scale;
        assert!(share <= B::TOLERANCE, "{what}: value {i} is {found}, expected {twin}");
    }
}

/// Runs `body` on one thread per rank and returns what each gave, by ascending rank.
pub fn on_ranks<T: Send>(world_size: u32, body: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let group = threads::group(world_size, Epoch(1)).into_iter();
        let ranks: Vec<_> = group.map(|rank| scope.spawn(|| body(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// x `[m, k]` · wᵀ, w `[n, k]`, plus bias `[n]`.
pub fn twin_linear(x: &[f64], w: &[f32], bias: Option<&[f32]>, k: usize) -> Vec<f64> {
    let n = w.len() / k;
    let mut y = Vec::new();
    for row in x.chunks_exact(k) {
        for (col, w) in w.chunks_exact(k).enumerate() {
            let sum: f64 = row.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum();
            y.push(sum + bias.map_or(0.0, |bias| f64::from(bias[col])));
        }
    }
    assert!(y.len().is_multiple_of(n));
    y
}

pub fn twin_norm(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let rows = x.chunks_exact(weight.len());
    let normed = rows.flat_map(|row| {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        row.iter().zip(weight).map(move |(x, w)| x / (mean + 1e-6).sqrt() * f64::from(*w))
    });
    normed.collect()
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}
