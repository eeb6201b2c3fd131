//! Linears: loading, the product, and what follows it.

use candle_core::{Device, Tensor};

use super::matmul::{host, matmul};
use crate::backend::Epilogue;
use crate::error::{KernelError, Result};
use crate::sampling::math::exp;
use crate::weights::{LinearSpec, PartLayout, SliceReader, TensorSlice, WeightFormat};

/// A linear in f32, padding included.
#[derive(Debug)]
pub struct ReferenceLinear {
    /// `[K, N]`: the published weight transposed, which spares gemm from packing it on every call.
    transposed: Tensor,
    bias: Option<Vec<f32>>,
    layout: PartLayout,
    /// Published rows that the first part holds, without padding: the ids of a vocabulary shard.
    first_rows: std::ops::Range<usize>,
}

impl ReferenceLinear {
    /// Reads this rank's slices.
    ///
    /// # Errors
    /// What the reader reports.
    pub(super) fn load(spec: &LinearSpec, src: &dyn SliceReader) -> Result<Self> {
        match spec.format {
            WeightFormat::Dense => {}
        }
        let (n, k) = (spec.out_features(), spec.in_features());
        let mut weight = vec![0.0f32; n * k];
        let mut bias = spec.parts.iter().any(|part| part.bias).then(|| vec![0.0f32; n]);
        let mut row = 0;
        for part in &spec.parts {
            let (rows, cols) = (part.rows.clone(), part.cols.clone());
            let tensor = part.weight_name();
            let slice =
                TensorSlice { tensor: &tensor, shape: &part.shape, rows: rows.clone(), cols };
            read_padded(&slice, src, &mut weight[row * k..(row + part.padded_rows) * k], k)?;
            if let Some(bias) = bias.as_mut().filter(|_| part.bias) {
                let tensor = part.bias_name();
                let shape = [part.shape[0]];
                let slice =
                    TensorSlice { tensor: &tensor, shape: &shape, rows: rows.clone(), cols: 0..1 };
                src.read_f32(&slice, &mut bias[row..row + rows.len()])?;
            }
            row += part.padded_rows;
        }
        let weight = Tensor::from_vec(weight, (n, k), &Device::Cpu);
        let transposed = weight.and_then(|weight| weight.t()?.contiguous());
        let transposed = transposed.map_err(host("load_linear"))?;
        let first_rows = spec.parts.first().map_or(0..0, |part| part.rows.clone());
        Ok(Self { transposed, bias, layout: spec.layout, first_rows })
    }

    /// y `[M, N]` = x · Wᵀ + bias, then the epilogue.
    pub(super) fn apply(
        &self,
        operation: &'static str,
        x: &[f32],
        epilogue: Epilogue,
        y: &mut [f32],
    ) -> Result<()> {
        matmul(operation, x, &self.transposed, y)?;
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        if epilogue == Epilogue::GeluErf {
            y.iter_mut().for_each(|value| *value = gelu(*value));
        }
        Ok(())
    }

    /// y `[M, I]` = silu(gate) ∘ up, the two halves of this linear's outputs `[M, 2·I]`.
    pub(super) fn apply_swiglu(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let outputs = self.out_features()?;
        if self.layout != PartLayout::GateUp || !outputs.is_multiple_of(2) {
            let what = "linear_swiglu of a linear that is not gate and up".to_owned();
            return Err(KernelError::Unsupported { backend: super::NAME, what });
        }
        let inner = outputs / 2;
        let mut both = vec![0.0; y.len() * 2];
        self.apply("linear_swiglu", x, Epilogue::None, &mut both)?;
        for (row, both) in y.chunks_exact_mut(inner).zip(both.chunks_exact(outputs)) {
            let (gate, up) = both.split_at(inner);
            for ((value, gate), up) in row.iter_mut().zip(gate).zip(up) {
                *value = gate / (1.0 + exp(-gate)) * up;
            }
        }
        Ok(())
    }

    /// Copies the row of `id` into `out`; false where another rank holds it.
    pub(super) fn embedding_row(&self, id: u32, out: &mut [f32]) -> Result<bool> {
        let id = id as usize;
        if !self.first_rows.contains(&id) {
            return Ok(false);
        }
        let column = self.transposed.narrow(1, id - self.first_rows.start, 1);
        let row = column.and_then(|column| column.flatten_all()?.to_vec1::<f32>());
        out.copy_from_slice(&row.map_err(host("embed_merge"))?);
        Ok(true)
    }

    pub(super) fn out_features(&self) -> Result<usize> {
        self.transposed.dim(1).map_err(host("out_features"))
    }
}

/// Reads `slice` into the top left corner of `out` `[.., width]`, which is zero elsewhere.
fn read_padded(
    slice: &TensorSlice<'_>,
    src: &dyn SliceReader,
    out: &mut [f32],
    width: usize,
) -> Result<()> {
    if slice.is_empty() {
        return Ok(());
    }
    let cols = slice.cols.len();
    if cols == width {
        return Ok(src.read_f32(slice, &mut out[..slice.len()])?);
    }
    let mut dense = vec![0.0; slice.len()];
    src.read_f32(slice, &mut dense)?;
    for (row, dense) in out.chunks_exact_mut(width).zip(dense.chunks_exact(cols)) {
        row[..cols].copy_from_slice(dense);
    }
    Ok(())
}

/// x · Φ(x), with the error function itself rather than its tanh approximation.
pub(crate) fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    let phi = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
    (x * phi) as f32
}
