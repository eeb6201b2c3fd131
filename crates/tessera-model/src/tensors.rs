//! Published tensor names and shapes (specification §2), in the style without `language_model`.

use crate::config::{ModelConfig, TextConfig, VisionConfig};

/// A tensor that a checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

pub const EMBED_TOKENS: &str = "model.embed_tokens";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const LM_HEAD: &str = "lm_head";
pub const PATCH_EMBED: &str = "visual.patch_embed.proj";
pub const MERGER_NORM: &str = "visual.merger.ln_q.weight";
pub const MERGER_IN: &str = "visual.merger.mlp.0";
pub const MERGER_OUT: &str = "visual.merger.mlp.2";

/// Prefix of the names of decoder layer `index`.
pub fn layer(index: usize) -> String {
    format!("model.layers.{index}")
}

/// Prefix of the names of vision block `index`.
pub fn block(index: usize) -> String {
    format!("visual.blocks.{index}")
}

/// The name in the one style used inside, for either published style.
pub fn canonical(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return format!("model.{rest}");
    }
    match name.strip_prefix("model.visual.") {
        Some(rest) => format!("visual.{rest}"),
        None => name.to_owned(),
    }
}

/// Collects names with their shapes.
#[derive(Default)]
struct List(Vec<TensorSpec>);

impl List {
    fn add(&mut self, name: String, shape: &[usize]) {
        self.0.push(TensorSpec { name, shape: shape.to_vec() });
    }

    fn linear(&mut self, module: &str, out: usize, cols: usize, bias: bool) {
        self.add(format!("{module}.weight"), &[out, cols]);
        if bias {
            self.add(format!("{module}.bias"), &[out]);
        }
    }
}

/// All tensors of the language model.
pub fn language(config: &TextConfig) -> Vec<TensorSpec> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let mut list = List::default();
    list.linear(EMBED_TOKENS, config.vocab_size, hidden, false);
    for index in 0..config.num_layers {
        let layer = layer(index);
        list.add(format!("{layer}.input_layernorm.weight"), &[hidden]);
        list.linear(&format!("{layer}.self_attn.q_proj"), query, hidden, true);
        list.linear(&format!("{layer}.self_attn.k_proj"), kv, hidden, true);
        list.linear(&format!("{layer}.self_attn.v_proj"), kv, hidden, true);
        list.linear(&format!("{layer}.self_attn.o_proj"), hidden, query, false);
        list.add(format!("{layer}.post_attention_layernorm.weight"), &[hidden]);
        list.linear(&format!("{layer}.mlp.gate_proj"), inner, hidden, false);
        list.linear(&format!("{layer}.mlp.up_proj"), inner, hidden, false);
        list.linear(&format!("{layer}.mlp.down_proj"), hidden, inner, false);
    }
    list.add(FINAL_NORM.to_owned(), &[hidden]);
    if !config.tie_word_embeddings {
        list.linear(LM_HEAD, config.vocab_size, hidden, false);
    }
    list.0
}

/// All tensors of the vision tower.
pub fn vision(config: &VisionConfig) -> Vec<TensorSpec> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let mut list = List::default();
    list.add(format!("{PATCH_EMBED}.weight"), &patch_embed_shape(config));
    for index in 0..config.depth {
        let block = block(index);
        list.add(format!("{block}.norm1.weight"), &[hidden]);
        list.add(format!("{block}.norm2.weight"), &[hidden]);
        list.linear(&format!("{block}.attn.qkv"), 3 * hidden, hidden, true);
        list.linear(&format!("{block}.attn.proj"), hidden, hidden, true);
        list.linear(&format!("{block}.mlp.gate_proj"), inner, hidden, true);
        list.linear(&format!("{block}.mlp.up_proj"), inner, hidden, true);
        list.linear(&format!("{block}.mlp.down_proj"), hidden, inner, true);
    }
    let merged = hidden * config.merge_unit();
    list.add(MERGER_NORM.to_owned(), &[hidden]);
    list.linear(MERGER_IN, merged, merged, true);
    list.linear(MERGER_OUT, config.out_hidden_size, merged, true);
    list.0
}

/// Both parts.
pub fn all(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = language(&config.text);
    list.extend(vision(&config.vision));
    list
}

/// `[hidden, channels, frames, patch, patch]`, flattened into the input by whoever loads it.
pub fn patch_embed_shape(config: &VisionConfig) -> [usize; 5] {
    let side = config.patch_size;
    [config.hidden_size, config.in_channels, config.temporal_patch_size, side, side]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(layers: usize, tied: bool) -> usize {
        let text = TextConfig {
            hidden_size: 2048,
            num_layers: layers,
            num_heads: 16,
            num_kv_heads: 2,
            head_dim: 128,
            intermediate_size: 11008,
            vocab_size: 151936,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            mrope_section: [16, 24, 24],
            yarn: None,
            max_position_embeddings: 128000,
            tie_word_embeddings: tied,
        };
        let vision = VisionConfig {
            depth: 32,
            hidden_size: 1280,
            num_heads: 16,
            intermediate_size: 3420,
            out_hidden_size: 2048,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            full_attention_blocks: vec![7, 15, 23, 31],
            tokens_per_second: 2.0,
        };
        language(&text).len() + self::vision(&vision).len()
    }

    #[test]
    fn the_lists_are_as_long_as_the_published_checkpoints() {
        assert_eq!(count(36, true), 824, "3B");
        assert_eq!(count(28, false), 729, "7B");
        assert_eq!(count(80, false), 1353, "72B");
    }

    #[test]
    fn both_naming_styles_mean_the_same_tensor() {
        for (published, name) in [
            (
                "model.language_model.layers.3.mlp.up_proj.weight",
                "model.layers.3.mlp.up_proj.weight",
            ),
            ("model.language_model.norm.weight", FINAL_NORM),
            ("model.visual.merger.ln_q.weight", MERGER_NORM),
            ("visual.merger.ln_q.weight", MERGER_NORM),
            ("model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(canonical(published), name);
        }
    }
}
