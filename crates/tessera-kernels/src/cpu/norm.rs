//! RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x²) + eps) ∘ weight, alone or after adding the
//! product of a linear to the residual.

use super::compute::{Compute, part_of};
use super::isa::{Isa, Task};
use super::memory::SharedOut;
use crate::error::{KernelError, Result};
use crate::weights::{NormSpec, SliceReader, TensorSlice};

/// Partial sums of a row; part of the numerics: element i adds to lane i mod 16.
const LANES: usize = 16;

/// Weight `[hidden]` and epsilon.
#[derive(Debug)]
pub struct CpuNorm {
    weight: Vec<f32>,
    eps: f64,
}

impl CpuNorm {
    pub(super) fn load(spec: &NormSpec, src: &dyn SliceReader) -> Result<Self> {
        let mut weight = vec![0.0; spec.size];
        let shape = [spec.size];
        let slice =
            TensorSlice { tensor: &spec.tensor, shape: &shape, rows: 0..spec.size, cols: 0..1 };
        src.read_f32(&slice, &mut weight)?;
        Ok(Self { weight, eps: spec.eps })
    }

    /// y = rms(x)·weight for every row of x `[M, hidden]`.
    pub(super) fn apply(&self, compute: &Compute, x: &[f32], y: &mut [f32]) -> Result<()> {
        self.check(x.len(), y.len())?;
        let y = SharedOut::new(y);
        self.for_rows(compute, x.len(), &|rows| {
            compute.path.dispatch(NormRows { norm: self, x, y, rows });
        });
        Ok(())
    }

    /// residual += sum, y = rms(residual)·weight.
    pub(super) fn add_apply(
        &self,
        compute: &Compute,
        sum: &[f32],
        residual: &mut [f32],
        y: &mut [f32],
    ) -> Result<()> {
        self.check(residual.len(), y.len())?;
        let (residual, y) = (SharedOut::new(residual), SharedOut::new(y));
        self.for_rows(compute, sum.len(), &|rows| {
            compute.path.dispatch(AddNormRows { norm: self, sum, residual, y, rows });
        });
        Ok(())
    }

    fn check(&self, found: usize, outputs: usize) -> Result<()> {
        let expected = self.weight.len();
        if found == outputs && found.is_multiple_of(expected) {
            return Ok(());
        }
        Err(KernelError::Shape { operation: "rms_norm", what: "elements", expected, found })
    }

    fn for_rows(
        &self,
        compute: &Compute,
        elements: usize,
        body: &(dyn Fn(std::ops::Range<usize>) + Sync),
    ) {
        /// Elements below which a second thread costs more than it saves.
        const SMALL: usize = 1 << 14;
        let rows = elements / self.weight.len();
        let parts = if elements < SMALL { 1 } else { compute.parts(rows) };
        compute.pool.run(parts, &|_, part| body(part_of(rows, parts, part)));
    }

    #[inline(always)]
    fn norm_row(&self, x: &[f32], y: &mut [f32]) {
        let mut lanes = [0f64; LANES];
        let (groups, rest) = x.as_chunks::<LANES>();
        for group in groups {
            for (lane, x) in lanes.iter_mut().zip(group) {
                *lane += f64::from(*x) * f64::from(*x);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*x) * f64::from(*x);
        }
        let squares: f64 = lanes.iter().sum();
        let scale = 1.0 / (squares / x.len() as f64 + self.eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(&self.weight) {
            *y = (f64::from(*x) * scale) as f32 * weight;
        }
    }
}

struct NormRows<'a> {
    norm: &'a CpuNorm,
    x: &'a [f32],
    y: SharedOut<'a, f32>,
    rows: std::ops::Range<usize>,
}

impl Task for NormRows<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let hidden = self.norm.weight.len();
        for row in self.rows.clone() {
            // SAFETY: each row belongs to the one thread that has it in its part.
            let y = unsafe { self.y.slice(row * hidden, hidden) };
            self.norm.norm_row(&self.x[row * hidden..(row + 1) * hidden], y);
        }
    }
}

struct AddNormRows<'a> {
    norm: &'a CpuNorm,
    sum: &'a [f32],
    residual: SharedOut<'a, f32>,
    y: SharedOut<'a, f32>,
    rows: std::ops::Range<usize>,
}

impl Task for AddNormRows<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let hidden = self.norm.weight.len();
        for row in self.rows.clone() {
            // SAFETY: each row belongs to the one thread that has it in its part.
            let (residual, y) = unsafe {
                (self.residual.slice(row * hidden, hidden), self.y.slice(row * hidden, hidden))
            };
            let sum = &self.sum[row * hidden..(row + 1) * hidden];
            residual.iter_mut().zip(sum).for_each(|(residual, sum)| *residual += sum);
            self.norm.norm_row(residual, y);
        }
    }
}
