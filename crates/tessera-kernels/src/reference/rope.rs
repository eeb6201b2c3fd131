//! Rotary position embeddings: M-RoPE of the decoder and the two axes of the vision tower.
//!
//! Both rotate the pair (i, i + head_dim / 2) by one angle. Angles are position · frequency in f32, as
//! in the reference implementation; sine and cosine stay f32.

use crate::backend::{HeadShape, RopeSpec, YarnSpec};

/// Base of the vision tower's frequencies (reference: `Qwen2_5_VisionRotaryEmbedding`).
const VISION_THETA: f64 = 10_000.0;

/// θ^(−2k / dim) for k in 0..count.
fn inverse_frequencies(theta: f64, dim: u32, count: u32) -> impl Iterator<Item = f64> {
    (0..count).map(move |k| theta.powf(-2.0 * f64::from(k) / f64::from(dim)))
}

impl YarnSpec {
    /// The share of frequency `k` that is interpolated, in [0, 1]: 0 up to the frequency that turns
    /// `beta_fast` times over the original context, 1 from the one that turns `beta_slow` times. Both
    /// limits are rounded outwards, as in the reference implementation (`_compute_yarn_parameters`).
    fn interpolated(&self, k: u32, theta: f64, dim: u32) -> f64 {
        let dim = f64::from(dim);
        let turning = |turns: f64| {
            let ratio = self.original_context / (turns * 2.0 * std::f64::consts::PI);
            dim * ratio.ln() / (2.0 * theta.ln())
        };
        let low = turning(self.beta_fast).floor().max(0.0);
        let high = turning(self.beta_slow).ceil().min(dim - 1.0);
        let span = if low == high { 0.001 } else { high - low };
        ((f64::from(k) - low) / span).clamp(0.0, 1.0)
    }

    fn stretched(&self, frequency: f64, interpolated: f64) -> f64 {
        frequency / self.factor * interpolated + frequency * (1.0 - interpolated)
    }
}

/// Angles of the decoder: frequencies are cut into three runs that follow T, H and W.
pub(crate) struct DecoderRope {
    frequencies: Vec<f32>,
    /// Which of (t, h, w) each frequency follows.
    axes: Vec<usize>,
    /// Cosine and sine are multiplied by it.
    scale: f32,
}

impl DecoderRope {
    pub(crate) fn new(spec: &RopeSpec, head_dim: u32) -> Self {
        let RopeSpec { theta, sections, yarn } = spec;
        let frequencies = inverse_frequencies(*theta, head_dim, head_dim / 2).zip(0..);
        let frequencies = frequencies.map(|(frequency, k)| match yarn {
            None => frequency as f32,
            Some(yarn) => yarn.stretched(frequency, yarn.interpolated(k, *theta, head_dim)) as f32,
        });
        let runs = sections.iter().enumerate();
        Self {
            frequencies: frequencies.collect(),
            axes: runs.flat_map(|(axis, count)| vec![axis; *count as usize]).collect(),
            scale: yarn.map_or(1.0, |yarn| yarn.attention_factor as f32),
        }
    }

    /// Turn per position of each pair.
    pub(crate) fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// What cosine and sine are multiplied by.
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    /// Cosine and sine `[head_dim / 2]` at one position.
    pub(crate) fn angles(&self, position: [i32; 3]) -> Vec<(f32, f32)> {
        let frequencies = self.frequencies().iter().zip(&self.axes);
        let angles = frequencies.map(|(frequency, axis)| position[*axis] as f32 * frequency);
        angles
            .map(|angle| {
                let (cos, sin) = cos_sin(angle);
                (cos * self.scale(), sin * self.scale())
            })
            .collect()
    }
}

/// Angles of the vision tower: the first half of the frequencies follows the row, the second the column.
pub(crate) struct VisionRope {
    frequencies: Vec<f32>,
}

impl VisionRope {
    pub(crate) fn new(heads: HeadShape) -> Self {
        let dim = heads.head_dim / 2;
        let frequencies = inverse_frequencies(VISION_THETA, dim, dim / 2);
        Self { frequencies: frequencies.map(|frequency| frequency as f32).collect() }
    }

    /// Turn per row of the first half of the pairs, per column of the second.
    pub(crate) fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// Cosine and sine `[head_dim / 2]` of the patch at (row, col).
    pub(crate) fn angles(&self, row_col: [u32; 2]) -> Vec<(f32, f32)> {
        let along = |at: u32| self.frequencies().iter().map(move |f| cos_sin(at as f32 * f));
        along(row_col[0]).chain(along(row_col[1])).collect()
    }
}

fn cos_sin(angle: f32) -> (f32, f32) {
    let (sin, cos) = f64::from(angle).sin_cos();
    (cos as f32, sin as f32)
}

/// Rotates one head `[head_dim]` in place.
pub(crate) fn rotate(head: &mut [f32], angles: &[(f32, f32)]) {
    let (first, second) = head.split_at_mut(angles.len());
    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables of `transformers`, made by `tests/golden/yarn.py`.
    const TABLES: &str = include_str!("../../../../tests/fixtures/yarn.json");

    #[test]
    fn yarn_frequencies_and_scale_are_those_of_the_reference_implementation() {
        let tables: Vec<serde_json::Value> = serde_json::from_str(TABLES).unwrap();
        assert!(tables.len() >= 6);
        for table in tables {
            let number = |name: &str| table[name].as_f64();
            let (factor, head_dim) =
                (number("factor").unwrap(), number("head_dim").unwrap() as u32);
            let yarn = YarnSpec {
                factor,
                original_context: number("original_max_position_embeddings").unwrap(),
                attention_factor: number("attention_factor").unwrap_or(0.1 * factor.ln() + 1.0),
                beta_fast: number("beta_fast").unwrap_or(32.0),
                beta_slow: number("beta_slow").unwrap_or(1.0),
            };
            let sections = [head_dim / 2, 0, 0];
            let theta = number("theta").unwrap();
            let rope = DecoderRope::new(&RopeSpec { theta, sections, yarn: Some(yarn) }, head_dim);
            let golden = table["inverse_frequencies"].as_array().unwrap();
            assert_eq!(rope.frequencies.len(), golden.len());
            for (k, (ours, golden)) in rope.frequencies.iter().zip(golden).enumerate() {
                let golden = golden.as_f64().unwrap();
                // The reference computes powers and blends in f32.
                let error = (f64::from(*ours) - golden).abs() / golden;
                assert!(error < 2e-6, "frequency {k} of {table}: {error}");
            }
            let (cos, sin) = rope.angles([0; 3])[0];
            assert!((f64::from(cos) - number("scale").unwrap()).abs() < 1e-6 && sin == 0.0);
        }
    }
}
