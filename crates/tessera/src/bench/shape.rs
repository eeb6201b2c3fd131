//! Model shapes: those of the published checkpoints by name, any other by its `config.json`.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tessera_model::{ModelConfig, TextConfig, TpSplit, VisionConfig};
use tessera_types::Rank;

use crate::bench::error::BenchError;
use crate::error::{Error, Result};

/// A model to measure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shape {
    /// As it was asked for.
    pub name: String,
    /// Layers of the language model as published, where fewer or more are run.
    pub published_layers: Option<usize>,
    #[serde(flatten)]
    pub config: ModelConfig,
    /// Directory of the config file, if there is one.
    #[serde(skip)]
    pub directory: Option<PathBuf>,
}

impl Shape {
    /// `3b`, `7b`, `72b`, `tiny`, or the path of a `config.json` or of its directory. A known name followed by
    /// `/N` is what one rank of a group of N holds, as a model of its own without sums over ranks. `layers` runs
    /// that many layers of the language model instead of its own.
    ///
    /// # Errors
    /// An unknown name, a degree that the shape does not allow, a broken config by field.
    pub fn load(name: &str, layers: Option<usize>) -> Result<Self> {
        let (mut config, directory) = match known(name) {
            Some(config) => (config, None),
            None => match name.rsplit_once('/').and_then(|(name, tp)| Some((known(name)?, tp))) {
                Some((whole, tp)) => (share(whole, tp)?, None),
                None => {
                    let (config, directory) = from_file(Path::new(name))?;
                    (config, Some(directory))
                }
            },
        };
        let published_layers = layers.map(|_| config.text.num_layers);
        if let Some(layers) = layers {
            if layers == 0 {
                let reason = "must be at least 1".to_owned();
                return Err(Error::Flag { flag: "--layers", reason });
            }
            config.text.num_layers = layers;
        }
        Ok(Self { name: name.to_owned(), published_layers, config, directory })
    }

    /// Name, and what of it was run.
    pub fn describe(&self) -> String {
        let layers = self.config.text.num_layers;
        match self.published_layers.filter(|&published| published != layers) {
            Some(published) => format!("{}, {layers} of {published} layers", self.name),
            None => format!("{}, all {layers} layers", self.name),
        }
    }
}

/// The shapes that have names.
fn known(name: &str) -> Option<ModelConfig> {
    Some(match name {
        "3b" => published(2048, 36, [16, 2], 11008, 151_936, 3420),
        "7b" => published(3584, 28, [28, 4], 18944, 152_064, 3420),
        "72b" => published(8192, 80, [64, 8], 29568, 152_064, 3456),
        "tiny" => tiny(),
        _ => return None,
    })
}

/// What the first rank of a group of `tp` holds, padding included. The tower is nobody's share.
fn share(mut config: ModelConfig, tp: &str) -> Result<ModelConfig> {
    let wrong = |reason: String| Error::Flag { flag: "--shape", reason };
    let degree = tp.parse().map_err(|_| wrong(format!("{tp:?} is no tensor-parallel degree")))?;
    let split = TpSplit::new(&config.text, Rank(0), degree).map_err(|e| wrong(e.to_string()))?;
    config.text.num_heads = split.query_heads.padded;
    config.text.num_kv_heads = split.kv_heads.len();
    config.text.intermediate_size = split.mlp.padded;
    config.text.vocab_size = split.vocab.padded;
    Ok(config)
}

fn from_file(path: &Path) -> Result<(ModelConfig, PathBuf)> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let text = std::fs::read_to_string(&file)
        .map_err(|source| Error::ReadFile { path: file.clone(), source })?;
    let config = ModelConfig::from_json(&file, &text).map_err(BenchError::from)?;
    let directory = file.parent().map_or_else(PathBuf::new, Path::to_owned);
    Ok((config, directory))
}

/// What the published checkpoints differ in; the rest is the same for all three.
fn published(
    hidden_size: usize,
    num_layers: usize,
    [num_heads, num_kv_heads]: [usize; 2],
    intermediate_size: usize,
    vocab_size: usize,
    vision_intermediate_size: usize,
) -> ModelConfig {
    ModelConfig {
        text: TextConfig {
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads,
            intermediate_size,
            vocab_size,
            // Only the smallest shares its embedding table with the head.
            tie_word_embeddings: hidden_size == 2048,
            max_position_embeddings: 128_000,
            head_dim: 128,
            rope_theta: 1e6,
            mrope_section: [16, 24, 24],
            ..tiny().text
        },
        vision: VisionConfig {
            depth: 32,
            hidden_size: 1280,
            num_heads: 16,
            intermediate_size: vision_intermediate_size,
            out_hidden_size: hidden_size,
            full_attention_blocks: vec![7, 15, 23, 31],
            ..tiny().vision
        },
        image_token_id: 151_655,
        video_token_id: 151_656,
        vision_start_token_id: 151_652,
        vision_end_token_id: 151_653,
    }
}

/// The shape of the checkpoint that tests use; see `tests/fixtures/tiny`.
fn tiny() -> ModelConfig {
    ModelConfig {
        text: TextConfig {
            hidden_size: 256,
            num_layers: 4,
            num_heads: 8,
            num_kv_heads: 2,
            head_dim: 32,
            intermediate_size: 344,
            vocab_size: 2176,
            rms_norm_eps: 1e-6,
            rope_theta: 100.0,
            mrope_section: [4, 6, 6],
            yarn: None,
            max_position_embeddings: 4096,
            tie_word_embeddings: false,
        },
        vision: VisionConfig {
            depth: 4,
            hidden_size: 64,
            num_heads: 4,
            intermediate_size: 84,
            out_hidden_size: 256,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            full_attention_blocks: vec![1, 3],
            tokens_per_second: 2.0,
        },
        image_token_id: 2060,
        video_token_id: 2061,
        vision_start_token_id: 2057,
        vision_end_token_id: 2058,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters of the language model: matrices, biases and norms.
    fn parameters(text: &TextConfig) -> usize {
        let (h, i, d) = (text.hidden_size, text.intermediate_size, text.head_dim);
        let (q, kv) = (text.num_heads * d, text.num_kv_heads * d);
        let layer = h * q + 2 * h * kv + q * h + 3 * h * i + q + 2 * kv + 2 * h;
        let tables = if text.tie_word_embeddings { 1 } else { 2 };
        text.num_layers * layer + tables * text.vocab_size * h + h
    }

    #[test]
    fn published_shapes_have_their_published_sizes() {
        // Of Qwen2.5 3B, 7B and 72B, whose language models these are.
        for (name, billions) in [("3b", 3.09), ("7b", 7.62), ("72b", 72.7)] {
            let shape = Shape::load(name, None).expect("a known name");
            let found = parameters(&shape.config.text) as f64 / 1e9;
            assert!((found - billions).abs() < 0.01 * billions, "{name}: {found}");
            assert_eq!(
                shape.config.text.head_dim * shape.config.text.num_heads,
                shape.config.text.hidden_size
            );
        }
    }

    #[test]
    fn shares_of_all_ranks_make_the_whole() {
        let text = |name: &str| Shape::load(name, None).expect("a known shape").config.text;
        let (whole, share) = (text("72b"), text("72b/8"));
        assert_eq!((share.num_heads, share.num_kv_heads, share.head_dim), (8, 1, 128));
        assert_eq!((share.hidden_size, share.num_layers), (8192, 80));
        assert_eq!(8 * share.intermediate_size, whole.intermediate_size);
        assert_eq!(8 * share.vocab_size, whole.vocab_size);
        // More ranks than KV heads: each has one, and query heads are padded.
        assert_eq!((text("7b/8").num_heads, text("7b/8").num_kv_heads), (4, 1));
        for name in ["72b/3", "72b/x", "72b/0"] {
            let error = Shape::load(name, None).expect_err(name);
            assert!(error.to_string().starts_with("--shape"), "{name}: {error}");
        }
    }

    #[test]
    fn the_tiny_shape_is_that_of_the_fixture() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny");
        assert_eq!(ModelConfig::from_dir(&fixture).expect("a valid config"), tiny());
        let by_path = Shape::load(fixture.to_str().expect("UTF-8"), Some(2)).expect("a shape");
        assert_eq!(by_path.config.text.num_layers, 2);
        assert!(by_path.describe().ends_with("2 of 4 layers"), "{}", by_path.describe());
        assert!(Shape::load("no-such-shape", None).is_err());
        assert!(Shape::load("tiny", Some(0)).is_err());
    }
}
