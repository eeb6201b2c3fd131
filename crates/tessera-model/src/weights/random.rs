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

    /// Fills `out` with the slice; returns the bytes of its values in BF16.
    pub(super) fn fill<T>(
        &self,
        slice: &TensorSlice<'_>,
        out: &mut [T],
        convert: impl Fn(bf16) -> T,
    ) -> u64 {
        let (center, spread) = self.distribution(slice);
        // A uniform draw from (-1, 1) has a standard deviation of 1/√3.
        let amplitude = spread * 3f32.sqrt();
        let stream = Stream { key: tensor_key(self.seed, slice.tensor), center, amplitude };
        let (width, cols) = (slice.matrix_cols(), slice.cols.len());
        if cols == width {
            stream.fill((slice.rows.start * width) as u64, out, &convert);
        } else {
            for (row, out) in slice.rows.clone().zip(out.chunks_exact_mut(cols.max(1))) {
                stream.fill((row * width + slice.cols.start) as u64, out, &convert);
            }
        }
        (slice.len() * size_of::<bf16>()) as u64
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

/// Draws that one word of the generator gives, 16 bits each: twice what BF16 keeps.
const PER_WORD: usize = 4;
/// Words computed at a time.
const BLOCK_WORDS: usize = 64;

/// The values of one tensor.
struct Stream {
    key: u64,
    center: f32,
    amplitude: f32,
}

impl Stream {
    /// Fills `out` with the values from index `first` on.
    fn fill<T>(&self, first: u64, out: &mut [T], convert: &impl Fn(bf16) -> T) {
        let (mut at, mut rest) = (first, out);
        while !rest.is_empty() {
            let skipped = (at % PER_WORD as u64) as usize;
            let count = rest.len().min(BLOCK_WORDS * PER_WORD - skipped);
            let mut draws = [[0i16; PER_WORD]; BLOCK_WORDS];
            let words = (skipped + count).div_ceil(PER_WORD);
            for (index, draws) in draws[..words].iter_mut().enumerate() {
                let word = mixed(self.key, at / PER_WORD as u64 + index as u64);
                *draws = [word, word >> 16, word >> 32, word >> 48].map(|bits| bits as i16);
            }
            let (run, after) = rest.split_at_mut(count);
            let draws = draws.as_flattened().iter().skip(skipped);
            run.iter_mut().zip(draws).for_each(|(out, draw)| *out = convert(self.value(*draw)));
            (rest, at) = (after, at + count as u64);
        }
    }

    fn value(&self, draw: i16) -> bf16 {
        let unit = (f32::from(draw) + 0.5) * (1.0 / 32768.0);
        let bits = (self.center + self.amplitude * unit).to_bits();
        // To nearest even; a value that is finite needs no more.
        bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }
}

/// Word `index` of a stream (SplitMix64 by counter, Steele et al. 2014).
fn mixed(key: u64, index: u64) -> u64 {
    let mut x = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
