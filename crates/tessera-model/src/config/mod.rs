//! `config.json` in all shapes it is published in (specification §1): flat, or with a `text_config`;
//! `rope_scaling` or `rope_parameters`; vision fields left out where they equal the class default.

mod fields;
mod rope;

use std::path::Path;

use serde::Serialize;
use tessera_kernels::{RopeSpec, YarnSpec};

use self::fields::Fields;
use self::rope::Rope;
use crate::error::{ModelError, Result};

/// The language model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextConfig {
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    /// Rows of the embedding table; the last of them may have no token.
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// Rotary frequencies that follow T, H and W; sums to half of `head_dim`.
    pub mrope_section: [u32; 3],
    /// Present where the context is stretched beyond that of the training.
    pub yarn: Option<YarnConfig>,
    /// Longest context in tokens; with YaRN `factor` times the original one, whatever the file says.
    pub max_position_embeddings: usize,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
}

impl TextConfig {
    /// What the backend needs to rotate keys.
    pub fn rope(&self) -> RopeSpec {
        let yarn = self.yarn.map(|yarn| YarnSpec {
            factor: yarn.factor,
            original_context: yarn.original_max_position_embeddings as f64,
            attention_factor: yarn.attention_factor,
            beta_fast: yarn.beta_fast,
            beta_slow: yarn.beta_slow,
        });
        RopeSpec { theta: self.rope_theta, sections: self.mrope_section, yarn }
    }
}

/// `rope_scaling` of type `yarn`, with the defaults of the reference implementation. It is static: short
/// contexts are stretched too.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct YarnConfig {
    /// At least 1.
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    /// 0.1 · ln(factor) + 1 where the file does not give it.
    pub attention_factor: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
}

/// The vision tower.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VisionConfig {
    pub depth: usize,
    pub hidden_size: usize,
    pub num_heads: usize,
    pub intermediate_size: usize,
    /// Width of the merged rows, equal to the language model's `hidden_size`.
    pub out_hidden_size: usize,
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side of the square of patches that becomes one visual token.
    pub spatial_merge_size: usize,
    /// Frames per patch.
    pub temporal_patch_size: usize,
    /// Side of an attention window in pixels.
    pub window_size: usize,
    /// Blocks that attend over a whole frame group; the others stay inside windows.
    pub full_attention_blocks: Vec<usize>,
    /// Positions on the T axis per second of video.
    pub tokens_per_second: f64,
}

impl VisionConfig {
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Values of one patch: channels · frames · patch².
    pub fn patch_len(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches per visual token.
    pub fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Side of an attention window in merge units.
    pub fn window_units(&self) -> usize {
        self.window_size / (self.patch_size * self.spatial_merge_size)
    }
}

/// A whole checkpoint's configuration, validated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelConfig {
    pub text: TextConfig,
    pub vision: VisionConfig,
    pub image_token_id: u32,
    pub video_token_id: u32,
    pub vision_start_token_id: u32,
    pub vision_end_token_id: u32,
}

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// An unreadable file; a missing, contradictory or unsupported field, by name.
    pub fn from_dir(directory: &Path) -> Result<Self> {
        let file = directory.join("config.json");
        match std::fs::read_to_string(&file) {
            Ok(text) => Self::from_json(&file, &text),
            Err(source) => Err(ModelError::File { file, source }),
        }
    }

    /// Parses the text of a `config.json`; `file` is for messages.
    ///
    /// # Errors
    /// As for [`ModelConfig::from_dir`].
    pub fn from_json(file: &Path, text: &str) -> Result<Self> {
        let json = serde_json::from_str(text);
        let json = json.map_err(|source| ModelError::Json { file: file.to_owned(), source })?;
        let top = Fields::new(file, "", &json)?;
        if let Some(kind) = top.string("model_type")?.filter(|kind| *kind != "qwen2_5_vl") {
            return Err(top.unsupported("model_type", kind));
        }
        let quantised = top.section("quantization_config")?;
        let nested = top.section("text_config")?;
        let text_fields = nested.as_ref().unwrap_or(&top);
        let quantised = match quantised {
            Some(fields) => Some(fields),
            None => text_fields.section("quantization_config")?,
        };
        if let Some(fields) = quantised {
            let method = fields.string("quant_method")?.unwrap_or("unnamed");
            return Err(fields.unsupported("quant_method", method));
        }
        let vision = top.section("vision_config")?.ok_or_else(|| top.missing("vision_config"))?;
        [&top, text_fields, &vision].into_iter().try_for_each(check_dtype)?;
        let text = text_config(&top, text_fields)?;
        let vision = vision_config(&vision, text.hidden_size)?;
        let token_id = |name| -> Result<u32> {
            let id = top.required(name, top.size(name)?)?;
            match id < text.vocab_size {
                true => Ok(id as u32),
                false => Err(
                    top.wrong(name, format!("is {id}, beyond a vocabulary of {}", text.vocab_size))
                ),
            }
        };
        Ok(Self {
            image_token_id: token_id("image_token_id")?,
            video_token_id: token_id("video_token_id")?,
            vision_start_token_id: token_id("vision_start_token_id")?,
            vision_end_token_id: token_id("vision_end_token_id")?,
            text,
            vision,
        })
    }
}

fn text_config(top: &Fields<'_>, fields: &Fields<'_>) -> Result<TextConfig> {
    reject_sliding_window(fields)?;
    require_silu(fields)?;
    let Rope { theta: rope_theta, section: mrope_section, yarn } = rope::read(top, fields)?;
    let size = |name| fields.required(name, fields.size(name)?);
    let (hidden_size, num_heads) = (size("hidden_size")?, size("num_attention_heads")?);
    let tied = match top.boolean("tie_word_embeddings")? {
        Some(tied) => Some(tied),
        None => fields.boolean("tie_word_embeddings")?,
    };
    let config = TextConfig {
        hidden_size,
        num_layers: size("num_hidden_layers")?,
        num_heads,
        num_kv_heads: size("num_key_value_heads")?,
        head_dim: match fields.size("head_dim")? {
            Some(head_dim) => head_dim,
            None => fields.divide("hidden_size", hidden_size, "num_attention_heads", num_heads)?,
        },
        intermediate_size: size("intermediate_size")?,
        vocab_size: size("vocab_size")?,
        rms_norm_eps: fields.required("rms_norm_eps", fields.positive("rms_norm_eps")?)?,
        rope_theta,
        mrope_section,
        yarn,
        max_position_embeddings: match yarn {
            Some(yarn) => yarn.context(),
            None => size("max_position_embeddings")?,
        },
        tie_word_embeddings: tied.unwrap_or(false),
    };
    fields.divide("num_attention_heads", num_heads, "num_key_value_heads", config.num_kv_heads)?;
    let sum: u32 = config.mrope_section.iter().sum();
    if 2 * sum as usize != config.head_dim {
        let reason = format!("sums to {sum}, half of head_dim {} is needed", config.head_dim);
        return Err(fields.wrong("mrope_section", reason));
    }
    Ok(config)
}

/// Names of the types that weights may be stored in.
const DTYPES: [&str; 4] = ["bfloat16", "float16", "float32", "auto"];

/// The field says in which type the weights were saved, and files say so themselves, tensor by tensor. So
/// it is checked and otherwise not followed: a backend computes in its own types (`--device`), whatever a
/// checkpoint was stored in.
fn check_dtype(fields: &Fields<'_>) -> Result<()> {
    for name in ["torch_dtype", "dtype"] {
        let dtype = fields.string(name)?.map(|dtype| dtype.trim_start_matches("torch."));
        if let Some(dtype) = dtype.filter(|dtype| !DTYPES.contains(dtype)) {
            return Err(fields.unsupported(name, &format!("the weight type {dtype}")));
        }
    }
    Ok(())
}

fn reject_sliding_window(fields: &Fields<'_>) -> Result<()> {
    if fields.boolean("use_sliding_window")? == Some(true) {
        return Err(fields.unsupported("use_sliding_window", "sliding window attention"));
    }
    let kinds = fields.strings("layer_types")?;
    match kinds.iter().find(|kind| **kind != "full_attention") {
        Some(kind) => Err(fields.unsupported("layer_types", kind)),
        None => Ok(()),
    }
}

fn require_silu(fields: &Fields<'_>) -> Result<()> {
    match fields.string("hidden_act")? {
        Some(act) if act != "silu" => Err(fields.unsupported("hidden_act", act)),
        _ => Ok(()),
    }
}

/// Defaults are those of the published class, where the field may be left out.
fn vision_config(fields: &Fields<'_>, text_hidden: usize) -> Result<VisionConfig> {
    require_silu(fields)?;
    let size = |name, default| -> Result<usize> { Ok(fields.size(name)?.unwrap_or(default)) };
    let in_channels = fields.size("in_channels")?.or(fields.size("in_chans")?).unwrap_or(3);
    let config = VisionConfig {
        depth: size("depth", 32)?,
        // The class default, 3584, fits no published tower.
        hidden_size: fields.required("hidden_size", fields.size("hidden_size")?)?,
        num_heads: size("num_heads", 16)?,
        intermediate_size: size("intermediate_size", 3420)?,
        out_hidden_size: size("out_hidden_size", 3584)?,
        in_channels,
        patch_size: size("patch_size", 14)?,
        spatial_merge_size: size("spatial_merge_size", 2)?,
        temporal_patch_size: size("temporal_patch_size", 2)?,
        window_size: size("window_size", 112)?,
        full_attention_blocks: match fields.indices("fullatt_block_indexes")? {
            Some(blocks) => blocks,
            None => vec![7, 15, 23, 31],
        },
        tokens_per_second: fields.positive("tokens_per_second")?.unwrap_or(4.0),
    };
    let head_dim =
        fields.divide("hidden_size", config.hidden_size, "num_heads", config.num_heads)?;
    if !head_dim.is_multiple_of(4) {
        let reason = format!("gives heads of {head_dim}, which must be a multiple of 4");
        return Err(fields.wrong("num_heads", reason));
    }
    if config.out_hidden_size != text_hidden {
        let reason =
            format!("is {}, but the text hidden_size is {text_hidden}", config.out_hidden_size);
        return Err(fields.wrong("out_hidden_size", reason));
    }
    let unit = config.patch_size * config.spatial_merge_size;
    fields.divide("window_size", config.window_size, "patch_size · spatial_merge_size", unit)?;
    match config.full_attention_blocks.iter().find(|block| **block >= config.depth) {
        Some(block) => {
            let reason = format!("names block {block} of {}", config.depth);
            Err(fields.wrong("fullatt_block_indexes", reason))
        }
        None => Ok(config),
    }
}

#[cfg(test)]
mod tests;
