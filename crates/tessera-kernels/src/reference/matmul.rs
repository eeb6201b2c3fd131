//! The one matrix product of this backend, on top of candle's.
//!
//! candle (the crate `gemm`) picks another algorithm for a single row, and cuts K where the caches of
//! the machine suggest. Either would make a row's bits depend on its batch or on the machine, which
//! ENGINE §3 forbids. So rows are handed over in tiles of fixed heights, the last padded with zeros,
//! and K is cut here at fixed places: inside such a piece every output is one chain of fused
//! multiply-adds over ascending k, whatever the height of the tile.

use candle_core::{Device, Tensor};

use crate::error::{KernelError, Result};

/// Heights of a row tile, tried in this order; the last takes what is left.
const TILE_ROWS: [usize; 3] = [256, 64, 16];
/// Up to this many columns a small tile takes gemm's path for tiny products, which sums in lanes; only
/// the smallest tile is used then, so that all rows take it.
const TINY_COLS: usize = 16;
/// gemm never cuts K at or below this, whatever the caches.
const PIECE_K: usize = 512;

/// Wraps candle's error with the operation it came from.
pub(super) fn host(operation: &'static str) -> impl Fn(candle_core::Error) -> KernelError {
    move |source| KernelError::Host { operation, source: Box::new(source) }
}

/// y `[M, N]` = x `[M, K]` · rhs `[K, N]`, rhs of any strides. M follows from the lengths.
pub(super) fn matmul(
    operation: &'static str,
    x: &[f32],
    rhs: &Tensor,
    y: &mut [f32],
) -> Result<()> {
    let (k, n) = rhs.dims2().map_err(host(operation))?;
    if n == 0 || y.is_empty() {
        return Ok(());
    }
    let rows = y.len() / n;
    if x.len() != rows * k || y.len() != rows * n {
        let (expected, found) = (rows * k, x.len());
        return Err(KernelError::Shape { operation, what: "input elements", expected, found });
    }
    let mut row = 0;
    while row < rows {
        let left = rows - row;
        let smallest = TILE_ROWS[TILE_ROWS.len() - 1];
        let fits = |tile: &&usize| **tile <= left && n > TINY_COLS;
        let tile = TILE_ROWS.iter().find(fits).copied().unwrap_or(smallest);
        let used = tile.min(left);
        let (x, y) = (&x[row * k..(row + used) * k], &mut y[row * n..(row + used) * n]);
        matmul_tile(x, tile, rhs, y).map_err(host(operation))?;
        row += used;
    }
    Ok(())
}

/// One tile: x `[≤ rows, K]`, padded to `rows`.
fn matmul_tile(x: &[f32], rows: usize, rhs: &Tensor, y: &mut [f32]) -> candle_core::Result<()> {
    let k = rhs.dim(0)?;
    let mut padded = x.to_vec();
    padded.resize(rows * k, 0.0);
    let x = Tensor::from_vec(padded, (rows, k), &Device::Cpu)?;
    y.fill(0.0);
    for start in (0..k).step_by(PIECE_K) {
        let depth = PIECE_K.min(k - start);
        let piece = x.narrow(1, start, depth)?.matmul(&rhs.narrow(0, start, depth)?)?;
        let piece = piece.flatten_all()?.to_vec1::<f32>()?;
        for (sum, part) in y.iter_mut().zip(&piece) {
            *sum += part;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cheap generator; the values only need to be irregular.
    fn noise(len: usize, mut state: u64) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_at_any_place_of_any_batch() {
        for (n, k) in [(1, 7), (16, 40), (17, 520), (48, 1100), (200, 64)] {
            let weight = Tensor::from_vec(noise(n * k, 1), (n, k), &Device::Cpu).unwrap();
            let rows = 256 + 64 + 16 + 5;
            let x = noise(rows * k, 2);
            let mut batch = vec![0.0; rows * n];
            matmul("test", &x, &weight.t().unwrap(), &mut batch).unwrap();
            for row in [0, 1, 15, 100, 255, 256, 319, 320, 335, 336, 340] {
                let mut alone = vec![0.0; n];
                matmul("test", &x[row * k..(row + 1) * k], &weight.t().unwrap(), &mut alone)
                    .unwrap();
                assert_eq!(
                    bits(&alone),
                    bits(&batch[row * n..(row + 1) * n]),
                    "row {row}, n {n}, k {k}"
                );
            }
        }
    }

    #[test]
    fn the_product_is_right() {
        let (m, n, k) = (21, 33, 700);
        let (x, w) = (noise(m * k, 3), noise(n * k, 4));
        let weight = Tensor::from_vec(w.clone(), (n, k), &Device::Cpu).unwrap();
        let mut y = vec![f32::NAN; m * n];
        matmul("test", &x, &weight.t().unwrap(), &mut y).unwrap();
        for (i, value) in y.iter().enumerate() {
            let (row, col) = (i / n, i % n);
            let products = (0..k).map(|j| f64::from(x[row * k + j]) * f64::from(w[col * k + j]));
            let exact: f64 = products.sum();
            assert!(
                (f64::from(*value) - exact).abs() < 1e-4,
                "[{row}, {col}]: {value} against {exact}"
            );
        }
    }

    #[test]
    fn a_wrong_width_is_refused() {
        let weight = Tensor::from_vec(noise(6, 1), (2, 3), &Device::Cpu).unwrap();
        let error = matmul("test", &[0.0; 4], &weight.t().unwrap(), &mut [0.0; 2]).unwrap_err();
        assert!(matches!(error, KernelError::Shape { expected: 3, found: 4, .. }));
    }
}
