//! What the JSON files of a checkpoint say about text and images (specification §1, §4, §11). Both flat
//! and nested `config.json` are read; a field that re-saved checkpoints leave out has its default here.

use std::path::Path;

use tessera_media::{PatchConfig, PixelRecipe, ResizeRecipe};
use tessera_types::TokenId;

use crate::checkpoint_file::CheckpointFile;
use crate::describe::PixelBounds;
use crate::error::CheckpointError;
use crate::sampling::GenerationDefaults;

/// Bounds when `preprocessor_config.json` states none (the class defaults: 56² and 1280 · 28²).
const DEFAULT_BOUNDS: PixelBounds = PixelBounds { min_pixels: 3136, max_pixels: 1_003_520 };
/// `tokens_per_second` when `vision_config` leaves it out. Published files say 2.
const DEFAULT_TOKENS_PER_SECOND: f64 = 4.0;
/// PIL's number for bicubic, the only filter the recipes know.
const BICUBIC: u64 = 3;

/// Ids of the tokens around and in place of media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialTokenIds {
    /// Stands for one visual token of an image.
    pub image_pad: TokenId,
    /// Stands for one visual token of a video.
    pub video_pad: TokenId,
    pub vision_start: TokenId,
    pub vision_end: TokenId,
}

/// All that a checkpoint decides about prompts and images, apart from template and vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessorConfig {
    /// Longest prompt plus output, in tokens.
    pub max_context_len: u32,
    /// Rows of the embedding, padding rows included.
    pub vocab_size: u32,
    pub special: SpecialTokenIds,
    /// Bounds on the pixels of a resized image or frame, unless the request gives its own.
    pub pixel_bounds: PixelBounds,
    /// How pixels become patch rows.
    pub recipe: PixelRecipe,
    /// Temporal positions per second of video.
    pub tokens_per_second: f64,
    pub generation: GenerationDefaults,
}

impl ProcessorConfig {
    /// Reads `config.json`, `preprocessor_config.json` and, if there, `generation_config.json`.
    ///
    /// # Errors
    /// The first file or field that is missing, malformed or contradicts another, by name.
    pub fn load(directory: &Path) -> Result<Self, CheckpointError> {
        let config = CheckpointFile::read(directory, "config.json")?;
        let images = CheckpointFile::read(directory, "preprocessor_config.json")?;
        let generation = CheckpointFile::read_if_present(directory, "generation_config.json")?;
        let max_context_len = max_context_len(&config)?;
        let vocab_size = config.required_u32(&["vocab_size", "text_config.vocab_size"])?;
        Ok(Self {
            max_context_len,
            vocab_size,
            special: special_tokens(&config, vocab_size)?,
            pixel_bounds: pixel_bounds(&images)?,
            recipe: recipe(&images, &config)?,
            tokens_per_second: tokens_per_second(&config)?,
            generation: GenerationDefaults::read(&generation, &config)?,
        })
    }
}

fn special_tokens(
    config: &CheckpointFile,
    vocab_size: u32,
) -> Result<SpecialTokenIds, CheckpointError> {
    let id = |name: &str| -> Result<TokenId, CheckpointError> {
        let id = config.required_u32(&[name, &format!("text_config.{name}")])?;
        match id < vocab_size {
            true => Ok(id),
            false => Err(config.invalid(name, format!("is {id}, beyond vocab_size {vocab_size}"))),
        }
    };
    let special = SpecialTokenIds {
        image_pad: id("image_token_id")?,
        video_pad: id("video_token_id")?,
        vision_start: id("vision_start_token_id")?,
        vision_end: id("vision_end_token_id")?,
    };
    match special.image_pad == special.video_pad {
        true => Err(config.invalid("video_token_id", "equals image_token_id")),
        false => Ok(special),
    }
}

/// Top-level `min_pixels`/`max_pixels` win over `size`, which has two spellings.
fn pixel_bounds(images: &CheckpointFile) -> Result<PixelBounds, CheckpointError> {
    let min = images.integer(&["min_pixels", "size.min_pixels", "size.shortest_edge"])?;
    let max = images.integer(&["max_pixels", "size.max_pixels", "size.longest_edge"])?;
    let bounds = PixelBounds {
        min_pixels: min.unwrap_or(DEFAULT_BOUNDS.min_pixels),
        max_pixels: max.unwrap_or(DEFAULT_BOUNDS.max_pixels),
    };
    match bounds.min_pixels == 0 || bounds.min_pixels > bounds.max_pixels {
        true => {
            let PixelBounds { min_pixels, max_pixels } = bounds;
            let problem = format!("is {min_pixels}, must be at least 1 and at most {max_pixels}");
            Err(images.invalid("min_pixels", problem))
        }
        false => Ok(bounds),
    }
}

fn recipe(
    images: &CheckpointFile,
    config: &CheckpointFile,
) -> Result<PixelRecipe, CheckpointError> {
    let default = PatchConfig::default();
    let to_f32 = |triple: [f64; 3]| triple.map(|value| value as f32);
    let patch = PatchConfig {
        patch_size: images.u32(&["patch_size"])?.unwrap_or(default.patch_size),
        merge_size: images.u32(&["merge_size"])?.unwrap_or(default.merge_size),
        temporal_patch_size: images
            .u32(&["temporal_patch_size"])?
            .unwrap_or(default.temporal_patch_size),
        image_mean: images.triple("image_mean")?.map_or(default.image_mean, to_f32),
        image_std: images.triple("image_std")?.map_or(default.image_std, to_f32),
    };
    check_geometry(images, config, &patch)?;
    if patch.image_std.iter().any(|&std| std.is_nan() || std <= 0.0) {
        return Err(images.invalid("image_std", "must be positive"));
    }
    let flag = |field: &str| images.get(field).and_then(|value| value.as_bool()).unwrap_or(true);
    for field in ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"] {
        if !flag(field) {
            return Err(images.invalid(field, "is false, which is not supported"));
        }
    }
    if images.integer(&["resample"])?.is_some_and(|filter| filter != BICUBIC) {
        return Err(images.invalid("resample", "must be 3 (bicubic)"));
    }
    if images.number(&["rescale_factor"])?.is_some_and(|f| (f * 255.0 - 1.0).abs() > 1e-9) {
        return Err(images.invalid("rescale_factor", "must be 1/255"));
    }
    Ok(PixelRecipe { resize: ResizeRecipe::Torchvision, patch })
}

/// The vision tower and the image processor state the same geometry in two files.
fn check_geometry(
    images: &CheckpointFile,
    config: &CheckpointFile,
    patch: &PatchConfig,
) -> Result<(), CheckpointError> {
    let pairs = [
        ("patch_size", patch.patch_size, "vision_config.patch_size"),
        ("merge_size", patch.merge_size, "vision_config.spatial_merge_size"),
        ("temporal_patch_size", patch.temporal_patch_size, "vision_config.temporal_patch_size"),
    ];
    for (field, value, in_config) in pairs {
        if value == 0 || value > 1024 {
            return Err(images.invalid(field, format!("must be 1 to 1024, got {value}")));
        }
        if let Some(other) = config.u32(&[in_config])?.filter(|&other| other != value) {
            let problem = format!("is {value}, but {in_config} in config.json is {other}");
            return Err(images.invalid(field, problem));
        }
    }
    Ok(())
}

fn tokens_per_second(config: &CheckpointFile) -> Result<f64, CheckpointError> {
    let field = "vision_config.tokens_per_second";
    match config.number(&[field])?.unwrap_or(DEFAULT_TOKENS_PER_SECOND) {
        rate if rate > 0.0 && rate <= 1000.0 => Ok(rate),
        rate => Err(config.invalid(field, format!("must be above 0 and at most 1000, got {rate}"))),
    }
}

/// Longest context in tokens. With YaRN it is its factor times the original one, whatever
/// `max_position_embeddings` says: published advice leaves that field as it was.
fn max_context_len(config: &CheckpointFile) -> Result<u32, CheckpointError> {
    let field = "max_position_embeddings";
    let length = config.required_u32(&[field, "text_config.max_position_embeddings"])?;
    if length == 0 {
        return Err(config.invalid(field, "must be at least 1"));
    }
    let places = ["text_config.rope_parameters", "text_config.rope_scaling"];
    let rope = config.get_any(&[places[0], places[1], "rope_parameters", "rope_scaling"]);
    let Some((place, rope)) = rope else { return Ok(length) };
    let is_yarn = |name: &str| rope.get(name).and_then(|value| value.as_str()) == Some("yarn");
    if !is_yarn("type") && !is_yarn("rope_type") {
        return Ok(length);
    }
    let number = |name: &str| rope.get(name).and_then(|value| value.as_f64());
    let stretched = number("factor").zip(number("original_max_position_embeddings"));
    match stretched.map(|(factor, original)| factor * original) {
        Some(length) if length >= 1.0 && length <= f64::from(u32::MAX) => Ok(length as u32),
        _ => Err(config.invalid(place, "needs a factor and original_max_position_embeddings")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn published() -> [Value; 2] {
        let config = json!({
            "max_position_embeddings": 128000, "vocab_size": 152064, "eos_token_id": 151645,
            "image_token_id": 151655, "video_token_id": 151656,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653,
            "vision_config": {"patch_size": 14, "tokens_per_second": 2},
        });
        let images = json!({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14,
            "temporal_patch_size": 2, "merge_size": 2});
        [config, images]
    }

    fn load(config: &Value, images: &Value) -> Result<ProcessorConfig, CheckpointError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (name, value) in [("config.json", config), ("preprocessor_config.json", images)] {
            std::fs::write(directory.path().join(name), value.to_string()).expect("a written file");
        }
        ProcessorConfig::load(directory.path())
    }

    #[test]
    fn flat_and_nested_configs_say_the_same() {
        let [flat, images] = published();
        let mut nested = flat.clone();
        let mut text = serde_json::Map::new();
        for field in ["max_position_embeddings", "vocab_size", "eos_token_id"] {
            let value = nested.as_object_mut().and_then(|map| map.remove(field));
            text.insert(field.to_owned(), value.expect("a published field"));
        }
        nested["text_config"] = Value::Object(text);
        let expected = load(&flat, &images).expect("the flat form");
        assert_eq!(load(&nested, &images).expect("the nested form"), expected);
        assert_eq!(expected.pixel_bounds.max_pixels, 12_845_056);
        assert_eq!(expected.tokens_per_second, 2.0);
    }

    #[test]
    fn pixel_bounds_are_read_in_all_their_forms() {
        let [config, _] = published();
        let cases = [
            (json!({"min_pixels": 4000, "max_pixels": 5000}), 4000, 5000),
            (json!({"size": {"shortest_edge": 4000, "longest_edge": 5000}}), 4000, 5000),
            (json!({"size": {"min_pixels": 4000, "max_pixels": 5000}}), 4000, 5000),
            (
                json!({"max_pixels": 9000, "size": {"shortest_edge": 10, "longest_edge": 5000}}),
                10,
                9000,
            ),
            (json!({"min_pixels": null, "max_pixels": null}), 3136, 1_003_520),
            (json!({}), 3136, 1_003_520),
        ];
        for (images, min_pixels, max_pixels) in cases {
            let loaded = load(&config, &images).expect("a valid file");
            assert_eq!(loaded.pixel_bounds, PixelBounds { min_pixels, max_pixels }, "{images}");
        }
    }

    #[test]
    fn yarn_stretches_the_original_context() {
        let [mut config, images] = published();
        config["max_position_embeddings"] = json!(32_768);
        let yarn =
            json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768});
        for place in ["rope_scaling", "rope_parameters"] {
            let mut stretched = config.clone();
            stretched[place] = yarn.clone();
            assert_eq!(load(&stretched, &images).expect("a valid file").max_context_len, 131_072);
        }
        config["rope_scaling"] = json!({"type": "mrope", "mrope_section": [16, 24, 24]});
        assert_eq!(load(&config, &images).expect("a valid file").max_context_len, 32_768);
        config["rope_scaling"] = json!({"type": "yarn"});
        assert!(load(&config, &images).expect_err("no factor").to_string().contains("factor"));
    }

    #[test]
    fn faults_name_file_and_field() {
        type Edit = fn(&mut Value, &mut Value);
        let cases: [(&str, &str, Edit); 10] = [
            ("config.json", "vocab_size", |c, _| c["vocab_size"] = Value::Null),
            ("config.json", "image_token_id", |c, _| c["image_token_id"] = json!(152_064)),
            ("config.json", "video_token_id", |c, _| c["video_token_id"] = json!(151_655)),
            ("config.json", "max_position_embeddings", |c, _| {
                c["max_position_embeddings"] = json!(-1)
            }),
            ("config.json", "tokens_per_second", |c, _| {
                c["vision_config"]["tokens_per_second"] = json!(0)
            }),
            ("preprocessor_config.json", "patch_size", |_, p| p["patch_size"] = json!(16)),
            ("preprocessor_config.json", "min_pixels", |_, p| p["min_pixels"] = json!(99_999_999)),
            ("preprocessor_config.json", "image_mean", |_, p| p["image_mean"] = json!([1, 2])),
            ("preprocessor_config.json", "rescale_factor", |_, p| p["rescale_factor"] = json!(0.5)),
            ("preprocessor_config.json", "resample", |_, p| p["resample"] = json!(2)),
        ];
        for (file, field, edit) in cases {
            let [mut config, mut images] = published();
            edit(&mut config, &mut images);
            let error = load(&config, &images).expect_err(field).to_string();
            assert!(error.contains(&format!("/{file}")) && error.contains(field), "{error}");
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let error = ProcessorConfig::load(directory.path()).expect_err("an empty directory");
        assert!(
            matches!(error, CheckpointError::Read { .. })
                && error.to_string().contains("config.json")
        );
        std::fs::write(directory.path().join("config.json"), "{").expect("a written file");
        let error = ProcessorConfig::load(directory.path()).expect_err("half a file");
        assert!(matches!(error, CheckpointError::Json { .. }));
    }
}
