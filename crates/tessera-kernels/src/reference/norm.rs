//! RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x²) + eps) ∘ weight, the mean in f64.

use crate::error::{KernelError, Result};
use crate::weights::{NormSpec, SliceReader, TensorSlice};

/// Weight `[hidden]` and epsilon.
#[derive(Debug)]
pub struct ReferenceNorm {
    weight: Vec<f32>,
    eps: f64,
}

impl ReferenceNorm {
    pub(super) fn load(spec: &NormSpec, src: &dyn SliceReader) -> Result<Self> {
        let mut weight = vec![0.0; spec.size];
        let shape = [spec.size];
        let slice =
            TensorSlice { tensor: &spec.tensor, shape: &shape, rows: 0..spec.size, cols: 0..1 };
        src.read_f32(&slice, &mut weight)?;
        Ok(Self { weight, eps: spec.eps })
    }

    /// Norms every row of x `[M, hidden]`.
    pub(super) fn apply(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let hidden = self.weight.len();
        if x.len() != y.len() || !x.len().is_multiple_of(hidden) {
            let (expected, found) = (hidden, x.len());
            return Err(KernelError::Shape {
                operation: "rms_norm",
                what: "elements",
                expected,
                found,
            });
        }
        for (x, y) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)) {
            let squares: f64 = x.iter().map(|value| f64::from(*value).powi(2)).sum();
            let scale = 1.0 / (squares / hidden as f64 + self.eps).sqrt();
            for ((y, x), weight) in y.iter_mut().zip(x).zip(&self.weight) {
                *y = (f64::from(*x) * scale) as f32 * weight;
            }
        }
        Ok(())
    }
}
