//! Weights from a seed: a function of (seed, published tensor name, index in the whole tensor), so that
//! every split and every backend sees the same model. Values are BF16, as in a published checkpoint.

use half::bf16;
use tessera_kernels::TensorSlice;

use crate::config::ModelConfig;
use crate::tensors::EMBED_TOKENS;

/// Standard deviation of logits: greedy choices are clear, temperature 1 still has a choice.
const LOGIT_SPREAD: f32 = 4.0;
const BIAS_SPREAD: f32 = 0.1;
const NORM_SPREAD: f32 = 0.1;

/// Draws weights of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomWeights {
    seed: u64,
    /// What each branch is scaled by where it joins the residual stream, so that the sum of all has unit
    /// size at any depth (GPT-2's initialisation).
    language_gain: f32,
    vision_gain: f32,
    tied: bool,
}

impl RandomWeights {
    pub(super) fn new(seed: u64, config: &ModelConfig) -> Self {
        let gain = |depth: usize| 1.0 / (2.0 * depth as f32).sqrt();
        Self {
            seed,
            language_gain: gain(config.text.num_layers),
            vision_gain: gain(config.vision.depth),
            tied: config.text.tie_word_embeddings,
        }
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// Fills `out` with the slice.
    pub(super) fn fill<T>(
        &self,
        slice: &TensorSlice<'_>,
        out: &mut [T],
        convert: impl Fn(bf16) -> T,
    ) {
        let key = tensor_key(self.seed, slice.tensor);
        let (center, spread) = self.distribution(slice);
        // A uniform draw from [-1, 1) has a standard deviation of 1/√3.
        let amplitude = spread * 3f32.sqrt();
        let width = slice.matrix_cols();
        let mut out = out.iter_mut();
        for row in slice.rows.clone() {
            for col in slice.cols.clone() {
                let value = center + amplitude * uniform(key, (row * width + col) as u64);
                if let Some(out) = out.next() {
                    *out = convert(bf16::from_f32(value));
                }
            }
        }
    }

    /// Mean and standard deviation of a tensor's values.
    fn distribution(&self, slice: &TensorSlice<'_>) -> (f32, f32) {
        let name = slice.tensor;
        if name.ends_with(".bias") {
            return (0.0, BIAS_SPREAD);
        }
        if slice.shape.len() == 1 {
            return (1.0, NORM_SPREAD);
        }
        let unit = 1.0 / (slice.matrix_cols() as f32).sqrt();
        let is_table = name.strip_suffix(".weight") == Some(EMBED_TOKENS);
        let joins_residual = ["o_proj.weight", "down_proj.weight", "attn.proj.weight"];
        let joins_residual = joins_residual.iter().any(|end| name.ends_with(end));
        let spread = match name {
            _ if is_table && !self.tied => 1.0,
            _ if is_table || name == "lm_head.weight" => LOGIT_SPREAD * unit,
            _ if joins_residual && name.starts_with("visual.") => unit * self.vision_gain,
            _ if joins_residual => unit * self.language_gain,
            _ => unit,
        };
        (0.0, spread)
    }
}

/// One stream of values per tensor.
fn tensor_key(seed: u64, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    let hash = *hasher.finalize().as_bytes();
    let first = hash.first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*first)
}

/// The value at `index` of a stream, in [-1, 1) (SplitMix64 by counter, Steele et al. 2014).
fn uniform(key: u64, index: u64) -> f32 {
    let mut x = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    (x >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}
