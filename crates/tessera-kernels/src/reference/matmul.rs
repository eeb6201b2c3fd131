//! The one matrix product of this backend, on top of candle's.
//!
//! A row's bits may depend neither on its batch nor on the machine (ENGINE §3). candle (the crate `gemm`)
//! has several algorithms: for one row, for tiny products, in blocks. With a row-major right operand each
//! of them makes every output one chain of multiply-adds over ascending k, at any number of rows; a right
//! operand that is contiguous along K would bring in sums by lanes. Blocks of K follow the caches of the
//! machine, so K is cut here, at fixed places. The test below holds the crate to this.

use candle_core::{Device, Tensor};

use crate::error::{KernelError, Result};

/// gemm never cuts K at or below this, whatever the caches.
const PIECE_K: usize = 512;

/// Wraps candle's error with the operation it came from.
pub(super) fn host(operation: &'static str) -> impl Fn(candle_core::Error) -> KernelError {
    move |source| KernelError::Host { operation, source: Box::new(source) }
}

/// y `[M, N]` = x `[M, K]` · rhs `[K, N]`, rhs contiguous. M follows from the lengths.
pub(super) fn matmul(
    operation: &'static str,
    x: &[f32],
    rhs: &Tensor,
    y: &mut [f32],
) -> Result<()> {
    let (k, n) = rhs.dims2().map_err(host(operation))?;
    assert!(rhs.is_contiguous(), "{operation}: a transposed view would be summed in another order");
    if n == 0 || y.is_empty() {
        return Ok(());
    }
    let rows = y.len() / n;
    if x.len() != rows * k || y.len() != rows * n {
        let (expected, found) = (rows * k, x.len());
        return Err(KernelError::Shape { operation, what: "input elements", expected, found });
    }
    if n == 1 {
        // A single column is contiguous along K.
        let column =
            rhs.flatten_all().and_then(|rhs| rhs.to_vec1::<f32>()).map_err(host(operation))?;
        for (y, x) in y.iter_mut().zip(x.chunks_exact(k)) {
            *y = x.iter().zip(&column).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum));
        }
        return Ok(());
    }
    let mut pieces = || -> candle_core::Result<()> {
        let x = Tensor::from_slice(x, (rows, k), &Device::Cpu)?;
        y.fill(0.0);
        for start in (0..k).step_by(PIECE_K) {
            let depth = PIECE_K.min(k - start);
            let piece = x.narrow(1, start, depth)?.matmul(&rhs.narrow(0, start, depth)?)?;
            let piece = piece.flatten_all()?.to_vec1::<f32>()?;
            y.iter_mut().zip(&piece).for_each(|(sum, part)| *sum += part);
        }
        Ok(())
    };
    pieces().map_err(host(operation))
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
        for (n, k) in
            [(1, 9), (2, 7), (4, 80), (16, 40), (17, 520), (48, 1100), (200, 64), (2100, 513)]
        {
            let weight = Tensor::from_vec(noise(n * k, 1), (k, n), &Device::Cpu).unwrap();
            let rows = 341;
            let x = noise(rows * k, 2);
            let mut batch = vec![0.0; rows * n];
            matmul("test", &x, &weight, &mut batch).unwrap();
            for row in [0, 1, 15, 100, 255, 256, 319, 320, 335, 336, 340] {
                let mut alone = vec![0.0; n];
                matmul("test", &x[row * k..(row + 1) * k], &weight, &mut alone).unwrap();
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
        let weight = Tensor::from_vec(w.clone(), (k, n), &Device::Cpu).unwrap();
        let mut y = vec![f32::NAN; m * n];
        matmul("test", &x, &weight, &mut y).unwrap();
        for (i, value) in y.iter().enumerate() {
            let (row, col) = (i / n, i % n);
            let products = (0..k).map(|j| f64::from(x[row * k + j]) * f64::from(w[j * n + col]));
            let exact: f64 = products.sum();
            assert!(
                (f64::from(*value) - exact).abs() < 1e-4,
                "[{row}, {col}]: {value} against {exact}"
            );
        }
    }

    #[test]
    fn a_wrong_width_is_refused() {
        let weight = Tensor::from_vec(noise(6, 1), (3, 2), &Device::Cpu).unwrap();
        let error = matmul("test", &[0.0; 4], &weight, &mut [0.0; 2]).unwrap_err();
        assert!(matches!(error, KernelError::Shape { expected: 3, found: 4, .. }));
    }
}
