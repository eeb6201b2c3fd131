//! The golden checkpoints and cases of `tests/fixtures` (described in `tests/golden/README.md`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tessera_model::{ModelConfig, WeightSource};
use tessera_types::{GridThw, PositionSpan, Prompt};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// One checkpoint directory.
pub struct Fixture {
    /// Configuration and golden cases.
    pub directory: PathBuf,
    /// The directory with the weights.
    weights: PathBuf,
    pub config: ModelConfig,
}

impl Fixture {
    pub fn open(name: &str) -> Self {
        Self::with_weights_of(name, name)
    }

    /// The configuration and cases of `name` with the weights of another fixture.
    pub fn with_weights_of(name: &str, weights: &str) -> Self {
        let [directory, weights] = [name, weights].map(|name| fixtures().join(name));
        let config = ModelConfig::from_dir(&directory).unwrap();
        Self { directory, weights, config }
    }

    /// `tiny` with a stretched context.
    pub fn yarn() -> Self {
        Self::with_weights_of("tiny-yarn", "tiny")
    }

    pub fn source(&self) -> WeightSource {
        WeightSource::Checkpoint(self.weights.clone())
    }

    /// All cases, in the order of their names.
    pub fn cases(&self) -> Vec<Case> {
        let files = std::fs::read_dir(self.directory.join("golden")).unwrap();
        let mut names: Vec<String> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
            .collect();
        names.sort();
        assert!(!names.is_empty(), "no golden cases in {}", self.directory.display());
        names.iter().map(|name| self.case(name)).collect()
    }

    pub fn case(&self, name: &str) -> Case {
        let golden = self.directory.join("golden");
        let text = std::fs::read_to_string(golden.join(format!("{name}.json"))).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let mut tensors = read_tensors(&golden.join(format!("{name}.safetensors")));
        if let Some(file) = json.get("pixel_values_in").and_then(Value::as_str) {
            let pixels = read_tensors(&fixtures().join(file));
            tensors.extend(pixels.into_iter().filter(|(name, _)| name.starts_with("pixel_values")));
        }
        Case { name: name.to_owned(), json, tensors }
    }
}

/// One golden request with all that the reference computed for it.
pub struct Case {
    pub name: String,
    json: Value,
    tensors: HashMap<String, Vec<f32>>,
}

impl Case {
    pub fn tensor(&self, name: &str) -> &[f32] {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn greedy_tokens(&self) -> Vec<u32> {
        numbers(&self.json["greedy_tokens"])
    }

    pub fn logit_range(&self) -> f32 {
        self.json["logit_range"].as_f64().unwrap() as f32
    }

    /// A figure of the case, for example `bf16_rms`.
    pub fn number(&self, name: &str) -> f32 {
        self.json[name].as_f64().unwrap() as f32
    }

    /// Distance from the best to the second-best logit, per step.
    pub fn margins(&self) -> Vec<f32> {
        let margins = self.json["margins"].as_array().unwrap();
        margins.iter().map(|margin| margin.as_f64().unwrap() as f32).collect()
    }

    /// RMS error of an item's visual rows in the reference's BF16 run.
    pub fn vit_bf16_rms(&self, item: usize) -> f32 {
        self.media()[item]["vit_bf16_rms"].as_f64().unwrap() as f32
    }

    pub fn rope_delta(&self) -> i64 {
        self.json["rope_delta"].as_i64().unwrap()
    }

    fn media(&self) -> &Vec<Value> {
        self.json["media"].as_array().unwrap()
    }

    pub fn grids(&self) -> Vec<GridThw> {
        let grid = |item: &Value| {
            let [t, h, w] = numbers(&item["grid_thw"]).try_into().unwrap();
            GridThw { t, h, w }
        };
        self.media().iter().map(grid).collect()
    }

    /// The expanded prompt with positions as spans. Media spans are left out: the decoder doesn't read
    /// them.
    pub fn prompt(&self, config: &ModelConfig) -> Prompt {
        let tokens: Vec<u32> = numbers(&self.json["expanded_ids"]);
        let mut positions = Vec::new();
        let mut media = self.media().iter().zip(self.grids());
        let mut at = 0;
        while at < tokens.len() {
            if !is_media(config, tokens[at]) {
                let text = tokens[at..].iter().take_while(|token| !is_media(config, **token));
                let len = text.count() as u32;
                positions.push(PositionSpan::Text { len });
                at += len as usize;
                continue;
            }
            let (item, GridThw { t, h, w }) = media.next().unwrap();
            let seconds = item["spg"].as_f64().unwrap_or(0.0);
            let step = (seconds * config.vision.tokens_per_second) as f32;
            positions.push(PositionSpan::Grid { t, h: h / 2, w: w / 2, step });
            at += (t * h * w / 4) as usize;
        }
        let prompt = Prompt { tokens, media: Vec::new(), positions };
        prompt.validate().unwrap();
        prompt
    }
}

/// Whether a visual row takes the place of this token's embedding.
pub fn is_media(config: &ModelConfig, token: u32) -> bool {
    token == config.image_token_id || token == config.video_token_id
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as u32).collect()
}

/// All tensors of a file as f32; integers are small enough to stay exact.
fn read_tensors(path: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = tensors.iter().map(|(name, view)| {
        let (words, _) = view.data().as_chunks::<4>();
        let values = match view.dtype() {
            Dtype::F32 => words.iter().map(|word| f32::from_le_bytes(*word)).collect(),
            Dtype::I32 => words.iter().map(|word| i32::from_le_bytes(*word) as f32).collect(),
            other => panic!("{name}: unexpected type {other:?}"),
        };
        (name.to_owned(), values)
    });
    values.collect()
}
