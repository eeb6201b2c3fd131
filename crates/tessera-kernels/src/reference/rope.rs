//! Rotary position embeddings: M-RoPE of the decoder and the two axes of the vision tower.
//!
//! Both rotate the pair (i, i + head_dim / 2) by one angle. Angles are position · frequency in f32, as
//! in the reference implementation; sine and cosine stay f32.

use crate::backend::{HeadShape, RopeSpec};

/// Base of the vision tower's frequencies (reference: `Qwen2_5_VisionRotaryEmbedding`).
const VISION_THETA: f64 = 10_000.0;

/// θ^(−2k / dim) for k in 0..count.
fn inverse_frequencies(theta: f64, dim: u32, count: u32) -> Vec<f32> {
    (0..count).map(|k| theta.powf(-2.0 * f64::from(k) / f64::from(dim)) as f32).collect()
}

/// Angles of the decoder: frequencies are cut into three runs that follow T, H and W.
pub(crate) struct DecoderRope {
    frequencies: Vec<f32>,
    /// Which of (t, h, w) each frequency follows.
    axes: Vec<usize>,
}

impl DecoderRope {
    pub(crate) fn new(spec: &RopeSpec, head_dim: u32) -> Self {
        let frequencies = inverse_frequencies(spec.theta, head_dim, head_dim / 2);
        let runs = spec.sections.iter().enumerate();
        let axes = runs.flat_map(|(axis, count)| vec![axis; *count as usize]).collect();
        Self { frequencies, axes }
    }

    /// Cosine and sine `[head_dim / 2]` at one position.
    pub(crate) fn angles(&self, position: [i32; 3]) -> Vec<(f32, f32)> {
        let frequencies = self.frequencies.iter().zip(&self.axes);
        frequencies.map(|(frequency, axis)| cos_sin(position[*axis] as f32 * frequency)).collect()
    }
}

/// Angles of the vision tower: the first half of the frequencies follows the row, the second the column.
pub(crate) struct VisionRope {
    frequencies: Vec<f32>,
}

impl VisionRope {
    pub(crate) fn new(heads: HeadShape) -> Self {
        let dim = heads.head_dim / 2;
        Self { frequencies: inverse_frequencies(VISION_THETA, dim, dim / 2) }
    }

    /// Cosine and sine `[head_dim / 2]` of the patch at (row, col).
    pub(crate) fn angles(&self, row_col: [u32; 2]) -> Vec<(f32, f32)> {
        let along = |at: u32| self.frequencies.iter().map(move |f| cos_sin(at as f32 * f));
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
