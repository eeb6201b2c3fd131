//! Checkpoints that are wrong, and how much of a right one each rank reads.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod support;

use std::error::Error;
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;
use support::checkpoint::{Tensors, write_index};
use support::fixture::Fixture;
use tessera_kernels::{ReferenceBackend, SliceReader, StepLimits, TensorSlice, WeightError};
use tessera_model::{
    Decoder, ModelConfig, ModelError, Result, TpSplit, VisionTower, WeightSource, Weights, tensors,
};
use tessera_types::{ModelFingerprint, Rank};

const LIMITS: StepLimits = StepLimits {
    max_tokens: 8,
    max_sequences: 2,
    max_blocks_per_sequence: 4,
    max_visual_rows: 4,
    num_real_tokens: 100,
};

fn open(directory: &Path, config: &ModelConfig) -> Result<Weights> {
    Weights::open(&WeightSource::Checkpoint(directory.to_owned()), config)
}

/// Loads the decoder of one rank and returns the bytes it read.
fn load_decoder(directory: &Path, config: &ModelConfig, rank: u32, world_size: u32) -> Result<u64> {
    let mut weights = open(directory, config)?;
    let split = TpSplit::new(&config.text, Rank(rank), world_size)?;
    let mut backend = ReferenceBackend::new();
    Decoder::load(&mut backend, &config.text, &split, &LIMITS, &mut weights)?;
    Ok(weights.bytes_read())
}

fn load_tower(directory: &Path, config: &ModelConfig) -> Result<u64> {
    let mut weights = open(directory, config)?;
    VisionTower::load(&mut ReferenceBackend::new(), &config.vision, 16, &mut weights)?;
    Ok(weights.bytes_read())
}

fn tiny() -> (Fixture, Tensors) {
    let fixture = Fixture::open("tiny");
    let tensors = Tensors::read(&fixture.directory);
    (fixture, tensors)
}

fn is_vision(name: &str) -> bool {
    name.starts_with("visual.")
}

#[test]
fn a_missing_tensor_is_named_with_its_file() {
    let (fixture, mut tensors) = tiny();
    let name = "model.layers.2.mlp.up_proj.weight";
    tensors.0.remove(name).unwrap();
    let single = tensors.write();
    let error = load_decoder(single.path(), &fixture.config, 0, 1).unwrap_err();
    let message = error.to_string();
    assert!(
        matches!(&error, ModelError::Weight(WeightError::Missing { tensor, .. }) if tensor == name)
    );
    assert!(message.contains("model.safetensors") && message.contains(name), "{message}");
    load_tower(single.path(), &fixture.config).expect("the tower needs no language tensor");

    let sharded = tensors.write_sharded(3);
    let message = load_decoder(sharded.path(), &fixture.config, 0, 1).unwrap_err().to_string();
    assert!(
        message.contains("model.safetensors.index.json") && message.contains(name),
        "{message}"
    );
}

#[test]
fn an_untied_model_needs_its_head() {
    let (fixture, mut tensors) = tiny();
    tensors.0.remove("lm_head.weight").unwrap();
    let directory = tensors.write();
    let error = load_decoder(directory.path(), &fixture.config, 0, 1).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let (fixture, mut tensors) = tiny();
    let name = "visual.blocks.1.attn.qkv.weight";
    let tensor = tensors.0.get_mut(name).unwrap();
    tensor.shape = vec![64, 192];
    let directory = tensors.write();
    let error = load_tower(directory.path(), &fixture.config).unwrap_err();
    let ModelError::Weight(WeightError::Shape { file, tensor, expected, found }) = &error else {
        panic!("{error}")
    };
    assert!(file.ends_with("model.safetensors"));
    assert_eq!(
        (tensor.as_str(), expected.as_slice(), found.as_slice()),
        (name, &[192, 64][..], &[64, 192][..])
    );
}

#[test]
fn a_tensor_of_another_type_is_refused() {
    let (fixture, mut tensors) = tiny();
    let tensor = tensors.0.get_mut("model.norm.weight").unwrap();
    (tensor.dtype, tensor.shape) = (Dtype::I16, tensor.shape.clone());
    let directory = tensors.write();
    let error = load_decoder(directory.path(), &fixture.config, 0, 1).unwrap_err();
    assert!(
        matches!(error, ModelError::Weight(WeightError::DType { found, .. }) if found == "I16")
    );
}

#[test]
fn a_wrong_tensor_is_found_before_anything_is_read() {
    let (fixture, mut tensors) = tiny();
    // The last tensor that a load would reach.
    tensors.0.remove("lm_head.weight").unwrap();
    let directory = tensors.write();
    let mut weights = open(directory.path(), &fixture.config).unwrap();
    let split = TpSplit::new(&fixture.config.text, Rank(0), 1).unwrap();
    let mut backend = ReferenceBackend::new();
    let config = &fixture.config.text;
    assert!(Decoder::load(&mut backend, config, &split, &LIMITS, &mut weights).is_err());
    assert_eq!(weights.bytes_read(), 0);
}

#[test]
fn a_value_that_is_not_finite_is_found_by_row() {
    let (fixture, mut tensors) = tiny();
    let name = "model.layers.0.mlp.down_proj.weight";
    let at = 2 * (344 * 7 + 3);
    tensors.0.get_mut(name).unwrap().bytes[at..at + 2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    let directory = tensors.write();
    let error = load_decoder(directory.path(), &fixture.config, 0, 2).unwrap_err();
    let found = matches!(&error, ModelError::Weight(WeightError::NotFinite { tensor, row: 7, .. }) if tensor == name);
    assert!(found, "{error}");
    load_decoder(directory.path(), &fixture.config, 1, 2).expect("rank 1 holds other columns");
}

#[test]
fn broken_files_are_named() {
    let (fixture, tensors) = tiny();
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(open(empty.path(), &fixture.config), Err(ModelError::NoCheckpoint { .. })));

    let directory = tensors.write();
    let file = directory.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for (bytes, expected) in [
        (&whole[..whole.len() - 1], "cut short"),
        (&whole[..5], "too few"),
        (&whole[..1000], "does not fit"),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let message = open(directory.path(), &fixture.config).unwrap_err().to_string();
        assert!(message.contains("model.safetensors") && message.contains(expected), "{message}");
    }
    let mut garbage = whole.clone();
    garbage[9] = b'!';
    std::fs::write(&file, garbage).unwrap();
    let error = open(directory.path(), &fixture.config).unwrap_err();
    assert!(matches!(&error, ModelError::Json { .. }) && error.source().is_some(), "{error}");
}

#[test]
fn an_index_is_not_trusted() {
    let (fixture, tensors) = tiny();
    let directory = tensors.write_sharded(2);
    std::fs::remove_file(directory.path().join("model-00002-of-00002.safetensors")).unwrap();
    let error = open(directory.path(), &fixture.config).unwrap_err();
    assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");

    for name in ["../model.safetensors", "/model.safetensors", "..", ""] {
        let weight_map = json!({ "model.norm.weight": name });
        write_index(directory.path(), weight_map.as_object().unwrap().clone());
        let error = open(directory.path(), &fixture.config).unwrap_err();
        assert!(matches!(&error, ModelError::Checkpoint { .. }), "{name:?}: {error}");
    }
}

#[test]
fn an_impossible_degree_is_refused() {
    let fixture = Fixture::open("tiny");
    for world_size in [3, 5, 7] {
        let error = load_decoder(&fixture.directory, &fixture.config, 0, world_size).unwrap_err();
        assert!(matches!(error, ModelError::Split(_)), "{error}");
    }
}

#[test]
fn every_rank_reads_its_own_slices_only() {
    let (fixture, tensors) = tiny();
    let language = tensors.num_bytes(|name| !is_vision(name));
    let norms = tensors.num_bytes(|name| !is_vision(name) && name.contains("norm"));
    for world_size in [1, 2] {
        let ranks = 0..world_size;
        let load =
            |rank| load_decoder(&fixture.directory, &fixture.config, rank, world_size).unwrap();
        let read: Vec<u64> = ranks.map(load).collect();
        // Norms are on every rank; everything else is read once.
        let expected = language + norms * u64::from(world_size - 1);
        assert_eq!(read.iter().sum::<u64>(), expected, "TP {world_size}: {read:?}");
    }
    // Beyond the KV heads, keys and values are shared by ranks too.
    let shared = tensors.num_bytes(|name| name.contains("k_proj") || name.contains("v_proj"));
    let read =
        (0..4).map(|rank| load_decoder(&fixture.directory, &fixture.config, rank, 4).unwrap());
    assert_eq!(read.sum::<u64>(), language + 3 * norms + shared);
    assert_eq!(
        load_tower(&fixture.directory, &fixture.config).unwrap(),
        tensors.num_bytes(is_vision)
    );
}

/// All values of a tensor.
fn values(weights: &mut Weights, name: &str, shape: &[usize]) -> Vec<f32> {
    let cols = shape[1..].iter().product();
    let slice = TensorSlice { tensor: name, shape, rows: 0..shape[0], cols: 0..cols };
    let mut out = vec![0.0; slice.len()];
    weights.read_f32(&slice, &mut out).unwrap();
    out
}

#[test]
fn stored_types_hold_the_same_values() {
    let (fixture, tensors) = tiny();
    let mut original = open(&fixture.directory, &fixture.config).unwrap();
    let f32s = tensors.converted(Dtype::F32).write();
    let f16s = tensors.converted(Dtype::F16).write();
    let mut wide = open(f32s.path(), &fixture.config).unwrap();
    let mut half = open(f16s.path(), &fixture.config).unwrap();
    for spec in tensors::all(&fixture.config) {
        let expected = values(&mut original, &spec.name, &spec.shape);
        assert_eq!(values(&mut wide, &spec.name, &spec.shape), expected, "{}", spec.name);
        let rounded: Vec<f32> =
            expected.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect();
        assert_eq!(values(&mut half, &spec.name, &spec.shape), rounded, "{}", spec.name);
    }
}

#[test]
fn a_slice_is_the_rectangle_of_the_whole() {
    let fixture = Fixture::open("tiny");
    let mut weights = open(&fixture.directory, &fixture.config).unwrap();
    let (name, shape) = ("model.layers.1.mlp.down_proj.weight", [256, 344]);
    let whole = values(&mut weights, name, &shape);
    for (rows, cols) in [(3..200, 17..301), (0..256, 343..344), (255..256, 0..344), (5..5, 0..344)]
    {
        let slice =
            TensorSlice { tensor: name, shape: &shape, rows: rows.clone(), cols: cols.clone() };
        let mut part = vec![0.0; slice.len()];
        weights.read_f32(&slice, &mut part).unwrap();
        let expected = rows.flat_map(|row| &whole[row * 344..][cols.clone()]).copied();
        assert_eq!(part, expected.collect::<Vec<_>>());
        let mut narrow = vec![half::bf16::ZERO; slice.len()];
        weights.read_bf16(&slice, &mut narrow).unwrap();
        assert_eq!(narrow.iter().map(|value| value.to_f32()).collect::<Vec<_>>(), part);
    }
}

fn fingerprints(directory: &Path, config: &ModelConfig) -> [ModelFingerprint; 2] {
    let weights = open(directory, config).unwrap();
    [weights.language_fingerprint(config).unwrap(), weights.vision_fingerprint(config).unwrap()]
}

#[test]
fn fingerprints_follow_contents_not_packaging() {
    let (fixture, tensors) = tiny();
    let config = &fixture.config;
    let original = fingerprints(&fixture.directory, config);
    assert_ne!(original[0], original[1]);
    assert_eq!(fingerprints(tensors.write_sharded(3).path(), config), original, "shards");
    let mut renamed = Tensors(Default::default());
    for (name, tensor) in &tensors.0 {
        let name = match name.strip_prefix("model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None if is_vision(name) => format!("model.{name}"),
            None => name.clone(),
        };
        renamed.0.insert(name, tensor.clone());
    }
    assert_eq!(fingerprints(renamed.write().path(), config), original, "names");
}

#[test]
fn fingerprints_change_with_weights_and_config_of_their_part() {
    let (fixture, tensors) = tiny();
    let config = &fixture.config;
    let original = fingerprints(&fixture.directory, config);
    for (name, changed) in
        [("model.layers.3.self_attn.q_proj.bias", 0), ("visual.merger.mlp.2.weight", 1)]
    {
        let mut edited = tensors.clone();
        *edited.0.get_mut(name).unwrap().bytes.last_mut().unwrap() ^= 1;
        let found = fingerprints(edited.write().path(), config);
        assert_ne!(found[changed], original[changed], "{name}");
        assert_eq!(found[1 - changed], original[1 - changed], "{name}");
    }
    let mut edited = config.clone();
    edited.text.rope_theta = 1e4;
    edited.vision.full_attention_blocks = vec![0];
    let found = fingerprints(&fixture.directory, &edited);
    assert!(found[0] != original[0] && found[1] != original[1]);
    // The kind of type is part of it too: F32 files of the same values round differently in BF16 backends.
    let wide = fingerprints(tensors.converted(Dtype::F32).write().path(), config);
    assert!(wide[0] != original[0] && wide[1] != original[1]);
}
