//! What the integration tests share: golden fixtures, and a minimal driver for one sequence.
#![allow(dead_code)] // Each test binary uses its part.

pub mod checkpoint;
pub mod fixture;
pub mod generate;
pub mod parity;
pub mod rank;
pub mod steps;

/// Largest absolute difference.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "compared values differ in number");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Root of the mean squared difference.
pub fn rms_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "compared values differ in number");
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    (squares.sum::<f64>() / a.len() as f64).sqrt() as f32
}

/// Largest minus smallest value.
pub fn range(values: &[f32]) -> f32 {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max - values.iter().copied().fold(f32::INFINITY, f32::min)
}
