//! Random weights: one model for every split, sane at any depth.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod support;

use std::time::{Duration, Instant};

use support::fixture::Fixture;
use support::generate::{Request, generate};
use support::{max_difference, range};
use tessera_kernels::{ReferenceBackend, SliceReader, TensorSlice};
use tessera_model::{ModelConfig, VisionItem, VisionTower, WeightSource, Weights};
use tessera_types::{GridThw, PositionSpan, Prompt};

const RANDOM: WeightSource = WeightSource::Random { seed: 7 };

fn config() -> ModelConfig {
    let mut config = Fixture::open("tiny").config;
    // 6 heads over 2 KV heads, an MLP and a vocabulary that no degree divides.
    config.text.num_heads = 6;
    config.text.intermediate_size = 150;
    config.text.vocab_size = 2107;
    config.text.num_layers = 2;
    config
}

fn prompt() -> Prompt {
    let tokens: Vec<u32> = (0..24).map(|i| (i * 73 + 5) % 2000).collect();
    let positions = vec![PositionSpan::Text { len: tokens.len() as u32 }];
    Prompt { tokens, media: Vec::new(), positions }
}

fn request(prompt: &Prompt, steps: usize) -> Request<'_> {
    Request { prompt, visual: &[], steps, chunk: 64, all_logits: false }
}

#[test]
fn every_split_holds_the_same_random_model() {
    let (config, prompt) = (config(), prompt());
    let one = generate(&config, &RANDOM, 1, request(&prompt, 6));
    for world_size in [2, 4, 6, 8] {
        let split = generate(&config, &RANDOM, world_size, request(&prompt, 6));
        assert_eq!(split.tokens, one.tokens, "TP {world_size}");
        let share =
            max_difference(&split.logits.concat(), &one.logits.concat()) / range(&one.logits[0]);
        assert!(share < 5e-5, "TP {world_size}: logits differ by {share} of their range");
    }
}

#[test]
fn logits_stay_sane_at_any_depth_tied_or_not() {
    let (mut config, prompt) = (config(), prompt());
    for (layers, tied) in [(1, false), (1, true), (60, false), (60, true)] {
        config.text.num_layers = layers;
        config.text.tie_word_embeddings = tied;
        let logits = generate(&config, &RANDOM, 1, request(&prompt, 1)).logits.concat();
        let mean = logits.iter().sum::<f32>() / logits.len() as f32;
        let variance = logits.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / logits.len() as f32;
        let deviation = variance.sqrt();
        assert!((2.0..8.0).contains(&deviation), "{layers} layers, tied {tied}: {deviation}");
    }
}

#[test]
fn visual_rows_stay_sane_at_full_depth() {
    let mut config = Fixture::open("tiny").config;
    config.vision.depth = 32;
    let mut weights = Weights::open(&RANDOM, &config).unwrap();
    let mut backend = ReferenceBackend::new();
    let tower = VisionTower::load(&mut backend, &config.vision, 64, &mut weights).unwrap();
    let pixels: Vec<f32> = (0..48 * 1176).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
    let item = VisionItem { grid: GridThw { t: 1, h: 6, w: 8 }, pixel_values: &pixels };
    let deadline = Instant::now() + Duration::from_secs(60);
    let rows = tower.encode(&mut backend, &[item], deadline).unwrap().concat();
    let size = (rows.iter().map(|x| x * x).sum::<f32>() / rows.len() as f32).sqrt();
    assert!((0.1..10.0).contains(&size), "root mean square {size}");
}

#[test]
fn a_value_depends_on_seed_name_and_place_in_the_whole_tensor() {
    let config = config();
    let read =
        |seed: u64, tensor: &str, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>| {
            let weights = Weights::open(&WeightSource::Random { seed }, &config).unwrap();
            let slice = TensorSlice { tensor, shape: &[64, 96], rows, cols };
            let mut out = vec![0.0; slice.len()];
            weights.read_f32(&slice, &mut out).unwrap();
            out
        };
    let name = "model.layers.0.mlp.up_proj.weight";
    let whole = read(1, name, 0..64, 0..96);
    let part = read(1, name, 10..12, 90..96);
    assert_eq!(part, [&whole[10 * 96 + 90..11 * 96], &whole[11 * 96 + 90..12 * 96]].concat());
    assert_ne!(read(2, name, 0..64, 0..96), whole);
    assert_ne!(read(1, "model.layers.1.mlp.up_proj.weight", 0..64, 0..96), whole);
    let distinct: std::collections::BTreeSet<u32> =
        whole.iter().map(|value| value.to_bits()).collect();
    assert!(distinct.len() > 1000, "values repeat: {}", distinct.len());
}

#[test]
fn fingerprints_of_random_weights_follow_seed_and_config() {
    let config = config();
    let fingerprint = |seed: u64, config: &ModelConfig| {
        let weights = Weights::open(&WeightSource::Random { seed }, config).unwrap();
        weights.language_fingerprint(config).unwrap()
    };
    let mut deeper = config.clone();
    deeper.text.num_layers += 1;
    assert_eq!(fingerprint(1, &config), fingerprint(1, &config));
    assert_ne!(fingerprint(1, &config), fingerprint(2, &config));
    assert_ne!(fingerprint(1, &config), fingerprint(1, &deeper));
}
