//! Weights too large to be read at once, and readers that fail on the way.

use half::bf16;
use tessera_kernels::{
    Backend, Epilogue, KernelError, LinearSpec, SliceReader, TensorSlice, WeightError,
};

use crate::support::*;

backend_tests!(a_large_linear_is_loaded_whole, a_reader_that_fails_on_the_way_ends_the_loading,);

const SHAPE: [usize; 2] = [9000, 1200];
const ROWS: std::ops::Range<usize> = 100..8950;
const PADDED_COLS: usize = 1216;

fn spec() -> LinearSpec {
    let part = part("l", SHAPE, ROWS, 0..SHAPE[1], false);
    LinearSpec { padded_cols: PADDED_COLS, ..stacked(vec![part]) }
}

fn a_large_linear_is_loaded_whole<B: TestBackend>() {
    let mut weights = MemoryWeights::default();
    let w = weights.add("l.weight", &SHAPE, &mut Noise::new(70));
    let mut b = planned::<B>(LIMITS);
    let linear = b.load_linear(&spec(), &weights).unwrap();
    let (x, y) = (native(&b, 0, 1, PADDED_COLS), act(1, 1, ROWS.len()));
    for col in [0, 1, 777, 1199] {
        let mut one = vec![0.0; PADDED_COLS];
        one[col] = 1.0;
        set(&mut b, x, &one);
        b.linear(x, &linear, Epilogue::F32Out, y).unwrap();
        let column: Vec<f32> = ROWS.map(|row| w[row * SHAPE[1] + col]).collect();
        assert!(b.download(y).unwrap() == column, "column {col}");
    }
    // Columns of padding meet zeros.
    set(&mut b, x, &[vec![0.0; SHAPE[1]], vec![1.0; PADDED_COLS - SHAPE[1]]].concat());
    b.linear(x, &linear, Epilogue::F32Out, y).unwrap();
    assert!(b.download(y).unwrap().iter().all(|value| *value == 0.0));
}

/// Fails on the rows from 5,000 on.
struct Broken;

impl Broken {
    fn read<T>(
        slice: &TensorSlice<'_>,
        out: &mut [T],
        zero: impl Fn() -> T,
    ) -> Result<(), WeightError> {
        if slice.rows.end > 5000 {
            let (file, tensor) = ("broken".into(), slice.tensor.to_owned());
            return Err(WeightError::Missing { file, tensor });
        }
        out.iter_mut().for_each(|out| *out = zero());
        Ok(())
    }
}

impl SliceReader for Broken {
    fn read_f32(&self, slice: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError> {
        Self::read(slice, out, || 0.0)
    }

    fn read_bf16(&self, slice: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError> {
        Self::read(slice, out, || bf16::ZERO)
    }
}

fn a_reader_that_fails_on_the_way_ends_the_loading<B: TestBackend>() {
    let mut b = planned::<B>(LIMITS);
    let error = b.load_linear(&spec(), &Broken).err();
    assert!(matches!(error, Some(KernelError::Weight(WeightError::Missing { .. }))), "{error:?}");
    let mut weights = MemoryWeights::default();
    weights.add("l.weight", &SHAPE, &mut Noise::new(71));
    b.load_linear(&spec(), &weights).unwrap();
}
