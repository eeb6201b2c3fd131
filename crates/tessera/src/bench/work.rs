//! What a step has to read and to multiply, counted from the model's shape.
//!
//! Counted: the products of all linears (two operations per weight and row), scores and weighted sums of attention
//! (four per query head, dimension and pair of positions), weights read once per step, keys and values read once
//! per sequence. Left out, as they are small: norms, rotations, softmax, sampling, activations, and the
//! embedding rows that a step looks up.

use tessera_kernels::DType;
use tessera_model::{TextConfig, VisionConfig, window_order};
use tessera_types::GridThw;

use super::limits::Limits;

/// Operations and bytes that no implementation can avoid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    pub flops: f64,
    pub bytes: f64,
}

impl Work {
    /// The least time it takes: neither data comes faster than it is read, nor products than they are made.
    pub fn seconds(&self, limits: &Limits) -> f64 {
        self.reading_seconds(limits).max(self.flops / limits.flops)
    }

    /// Which of the two it is.
    pub fn bound(&self, limits: &Limits) -> &'static str {
        let is_reading = self.reading_seconds(limits) >= self.flops / limits.flops;
        if is_reading { "memory" } else { "compute" }
    }

    fn reading_seconds(&self, limits: &Limits) -> f64 {
        self.bytes / limits.read_bytes_per_second
    }
}

/// One step in which `batch` sequences with `context` tokens each, the new one included, draw a token.
pub fn decode_step(text: &TextConfig, dtype: DType, batch: usize, context: f64) -> Work {
    let (batch, weights) = (batch as f64, layer_weights(text) + head_weights(text));
    let kv_token = (2 * text.num_layers * text.num_kv_heads * text.head_dim) as f64;
    Work {
        flops: 2.0 * batch * weights + batch * attention_flops(text, context),
        bytes: dtype.size_bytes() as f64 * (weights + batch * context * kv_token),
    }
}

/// A prompt of `tokens`, of which the last draws a token.
pub fn prefill(text: &TextConfig, dtype: DType, tokens: usize) -> Work {
    let tokens = tokens as f64;
    let pairs = tokens * (tokens + 1.0) / 2.0;
    let matrices = 2.0 * tokens * layer_weights(text) + 2.0 * head_weights(text);
    Work {
        flops: matrices + attention_flops(text, pairs),
        bytes: dtype.size_bytes() as f64 * (layer_weights(text) + head_weights(text)),
    }
}

/// The vision tower over one item.
pub fn vision(config: &VisionConfig, dtype: DType, grid: GridThw) -> Work {
    let patches = grid.num_patches() as f64;
    let hidden = config.hidden_size;
    let merged = hidden * config.merge_unit();
    let block = 4 * hidden * hidden + 3 * hidden * config.intermediate_size;
    let per_patch = (config.patch_len() * hidden + config.depth * block) as f64;
    let per_merged = (merged * merged + merged * config.out_hidden_size) as f64;
    let matrices = 2.0 * patches * (per_patch + per_merged / config.merge_unit() as f64);
    let order = window_order(&[grid], config).inputs;
    let num_full = config.full_attention_blocks.len() as f64;
    let num_windowed = config.depth as f64 - num_full;
    let pairs =
        num_full * pairs_within(&order.cu_full) + num_windowed * pairs_within(&order.cu_window);
    Work {
        flops: matrices + 4.0 * hidden as f64 * pairs,
        bytes: dtype.size_bytes() as f64 * (per_patch + per_merged),
    }
}

/// Weights of the linears of all layers.
fn layer_weights(text: &TextConfig) -> f64 {
    let (query, kv) = (text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim);
    let attention = text.hidden_size * (2 * query + 2 * kv);
    let mlp = 3 * text.hidden_size * text.intermediate_size;
    (text.num_layers * (attention + mlp)) as f64
}

fn head_weights(text: &TextConfig) -> f64 {
    (text.vocab_size * text.hidden_size) as f64
}

/// Over all layers, for that many pairs of a query and a key.
fn attention_flops(text: &TextConfig, pairs: f64) -> f64 {
    4.0 * (text.num_layers * text.num_heads * text.head_dim) as f64 * pairs
}

/// Pairs of positions inside the segments between prefix sums.
pub fn pairs_within(cu: &[u32]) -> f64 {
    cu.windows(2).map(|ends| f64::from(ends[1] - ends[0]).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::shape::Shape;

    fn shape(name: &str) -> Shape {
        Shape::load(name, None).expect("a known name")
    }

    #[test]
    fn a_decode_step_reads_the_weights_once() {
        let text = shape("3b").config.text;
        let one = decode_step(&text, DType::Bf16, 1, 0.0);
        // 3.09 billion parameters, of which biases and norms are not counted.
        assert!((one.bytes / 2.0 / 3.085e9 - 1.0).abs() < 0.001, "{one:?}");
        assert_eq!(one.flops, one.bytes, "two operations per weight of two bytes");
        let many = decode_step(&text, DType::Bf16, 8, 256.0);
        // 36 layers, keys and values of 2 heads of 128, two bytes each.
        assert_eq!(many.bytes - one.bytes, 8.0 * 256.0 * 36_864.0);
    }

    #[test]
    fn prefill_is_as_much_work_as_its_tokens_one_by_one_but_for_the_head() {
        let text = shape("tiny").config.text;
        let each =
            (1..=9).map(|context| decode_step(&text, DType::F32, 1, f64::from(context)).flops);
        let heads = 8.0 * 2.0 * head_weights(&text);
        let whole = prefill(&text, DType::F32, 9).flops;
        assert!((each.sum::<f64>() - heads - whole).abs() < 1e-6 * whole);
    }

    #[test]
    fn vision_counts_windows_and_whole_frames() {
        let config = shape("3b").config.vision;
        // One window of 8 × 8 patches: both kinds of block attend to the same pairs.
        let window = vision(&config, DType::Bf16, GridThw { t: 1, h: 8, w: 8 });
        let pairs = 32.0 * 64.0 * 64.0 * 4.0 * 1280.0;
        let two = vision(&config, DType::Bf16, GridThw { t: 2, h: 8, w: 8 });
        assert!(
            (two.flops / window.flops - 2.0).abs() < 1e-9,
            "frames do not attend to each other"
        );
        let four = vision(&config, DType::Bf16, GridThw { t: 1, h: 16, w: 16 });
        let extra = four.flops - 4.0 * window.flops;
        // Four of 32 blocks see all 256 patches instead of their own 64.
        assert!(
            (extra - 4.0 * 4.0 * 1280.0 * (256.0f64.powi(2) - 4.0 * 64.0f64.powi(2))).abs() < 1.0
        );
        assert!(pairs < window.flops);
    }
}
