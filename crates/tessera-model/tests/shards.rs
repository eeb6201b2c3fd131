//! Pre-sharded checkpoints: the same model bit for bit, for their own degree only, whole or not at all.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod support;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::fixture::Fixture;
use support::generate::{Request, generate};
use tempfile::TempDir;
use tessera_kernels::{ReferenceBackend, StepLimits};
use tessera_model::{
    Decoder, LoadMeter, LoadProgress, ModelConfig, ModelError, Result, ShardJob, TpSplit,
    VisionTower, WeightSource, Weights, write_shards,
};
use tessera_types::Rank;

const LIMITS: StepLimits = StepLimits {
    max_tokens: 8,
    max_sequences: 2,
    max_blocks_per_sequence: 4,
    max_visual_rows: 4,
    num_real_tokens: 100,
};

fn go_on(_: LoadProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Shards a fixture into a directory of this name.
fn sharded(fixture: &Fixture, tp: u32) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    write_shards(&ShardJob { model: &fixture.directory, tp, out: &out }, &go_on).unwrap();
    directory
}

fn source(directory: &TempDir) -> WeightSource {
    WeightSource::Checkpoint(directory.path().join("out"))
}

fn load(source: &WeightSource, config: &ModelConfig, rank: u32, tp: u32) -> Result<LoadProgress> {
    let meter = LoadMeter::default();
    let mut weights = Weights::open(source, config)?.with_meter(&meter);
    let split = TpSplit::new(&config.text, Rank(rank), tp)?;
    let mut backend = ReferenceBackend::new();
    Decoder::load(&mut backend, &config.text, &split, &LIMITS, &mut weights)?;
    Ok(meter.progress())
}

#[test]
fn logits_are_those_of_the_original_bit_for_bit() {
    // Split and shared KV heads, padded query heads, a tied head in several files of F32.
    for name in ["tiny", "tiny-nested"] {
        let fixture = Fixture::open(name);
        let case = fixture.case("text");
        let prompt = case.prompt(&fixture.config);
        let request =
            Request { prompt: &prompt, visual: &[], steps: 4, chunk: 64, all_logits: false };
        for tp in [1, 2, 4] {
            let directory = sharded(&fixture, tp);
            let config = ModelConfig::from_dir(&directory.path().join("out")).unwrap();
            assert_eq!(config, fixture.config);
            let expected = generate(&fixture.config, &fixture.source(), tp, request);
            let found = generate(&config, &source(&directory), tp, request);
            assert!(found == expected, "{name} at TP {tp}");
        }
    }
}

#[test]
fn visual_towers_load_from_any_degree_and_read_their_own_file() {
    let fixture = Fixture::open("tiny");
    let directory = sharded(&fixture, 2);
    let load = |source: &WeightSource| {
        let mut weights = Weights::open(source, &fixture.config).unwrap();
        let mut backend = ReferenceBackend::new();
        VisionTower::load(&mut backend, &fixture.config.vision, 16, &mut weights).unwrap();
        weights.bytes_read()
    };
    assert_eq!(load(&source(&directory)), load(&fixture.source()));
    for rank in 0..2 {
        let file = directory.path().join(format!("out/model-tp2-rank{rank}.safetensors"));
        std::fs::remove_file(file).unwrap();
    }
    load(&source(&directory));
}

#[test]
fn fingerprints_are_those_of_the_original() {
    let fixture = Fixture::open("tiny");
    let config = &fixture.config;
    let fingerprints = |source: &WeightSource, config: &ModelConfig| {
        let weights = Weights::open(source, config).unwrap();
        let language = weights.language_fingerprint(config).unwrap();
        [language, weights.vision_fingerprint(config).unwrap()]
    };
    let original = fingerprints(&fixture.source(), config);
    for tp in [1, 4] {
        assert_eq!(fingerprints(&source(&sharded(&fixture, tp)), config), original, "TP {tp}");
    }
    let mut other = config.clone();
    other.text.rope_theta = 1e4;
    let changed = fingerprints(&source(&sharded(&fixture, 2)), &other);
    assert!(changed[0] != original[0] && changed[1] == original[1]);
}

#[test]
fn another_degree_is_refused() {
    let fixture = Fixture::open("tiny");
    let source = source(&sharded(&fixture, 2));
    // The directory is gone by now, which matters to nobody who asks for its degree first.
    assert!(matches!(
        Weights::open(&source, &fixture.config),
        Err(ModelError::NoCheckpoint { .. })
    ));
    let directory = sharded(&fixture, 2);
    let source = self::source(&directory);
    for tp in [1, 4] {
        let error = load(&source, &fixture.config, 0, tp).unwrap_err();
        assert!(
            matches!(error, ModelError::ShardDegree { found: 2, expected, .. } if expected == tp),
            "{error}"
        );
    }
    let out = tempfile::tempdir().unwrap();
    let WeightSource::Checkpoint(model) = &source else { unreachable!() };
    let again = ShardJob { model, tp: 4, out: &out.path().join("again") };
    let error = write_shards(&again, &go_on).unwrap_err();
    assert!(error.to_string().contains("pre-sharded for TP 2 already"), "{error}");
}

#[test]
fn files_of_another_checkpoint_are_refused() {
    let fixture = Fixture::open("tiny");
    let (two, other) = (sharded(&fixture, 2), sharded(&Fixture::open("small-margin"), 2));
    let file = |directory: &TempDir, name: &str| directory.path().join("out").join(name);
    let rank = "model-tp2-rank1.safetensors";
    std::fs::copy(file(&other, rank), file(&two, rank)).unwrap();
    let error = load(&source(&two), &fixture.config, 1, 2).unwrap_err();
    assert!(error.to_string().contains("belongs to another"), "{error}");
    load(&source(&two), &fixture.config, 0, 2).expect("rank 0 reads its own file only");

    std::fs::copy(file(&two, "model-tp2-rank0.safetensors"), file(&two, rank)).unwrap();
    let error = load(&source(&two), &fixture.config, 1, 2).unwrap_err();
    assert!(error.to_string().contains("is of rank \"0\""), "{error}");

    let manifest = file(&two, "tessera_shards.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"format_version\":1", "\"format_version\":9"))
        .unwrap();
    let error = Weights::open(&source(&two), &fixture.config).unwrap_err();
    assert!(error.to_string().contains("has format 9"), "{error}");
}

#[test]
fn a_rank_reads_each_byte_of_its_file_once() {
    let fixture = Fixture::open("tiny");
    let directory = sharded(&fixture, 2);
    for rank in 0..2 {
        let progress = load(&source(&directory), &fixture.config, rank, 2).unwrap();
        assert_eq!(progress.loaded_bytes, progress.total_bytes);
        let original = load(&fixture.source(), &fixture.config, rank, 2).unwrap();
        assert_eq!(progress, original);
        let file = directory.path().join(format!("out/model-tp2-rank{rank}.safetensors"));
        let bytes = std::fs::read(file).unwrap();
        let header = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        assert_eq!(bytes.len() as u64 - 8 - header, progress.total_bytes);
    }
}

#[test]
fn the_rest_of_the_model_comes_along() {
    let fixture = Fixture::open("tiny-nested");
    let directory = sharded(&fixture, 2);
    let out = directory.path().join("out");
    for name in ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json"]
    {
        let copied = std::fs::read(out.join(name)).unwrap();
        assert_eq!(copied, std::fs::read(fixture.directory.join(name)).unwrap(), "{name}");
    }
    assert!(!out.join("model.safetensors.index.json").exists());
}

fn entries(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

#[test]
fn an_interrupted_write_leaves_nothing_that_loads() {
    let fixture = Fixture::open("tiny");
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let calls = AtomicUsize::new(0);
    let stop_half_way = |progress: LoadProgress| {
        calls.fetch_add(1, Ordering::Relaxed);
        assert!(!out.exists());
        // What a process that is killed now would leave is no checkpoint.
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let source = WeightSource::Checkpoint(entry.unwrap().path());
            let opened = Weights::open(&source, &fixture.config);
            assert!(matches!(opened, Err(ModelError::NoCheckpoint { .. })));
        }
        match progress.loaded_bytes * 2 < progress.total_bytes {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    };
    let job = ShardJob { model: &fixture.directory, tp: 2, out: &out };
    let error = write_shards(&job, &stop_half_way).unwrap_err();
    assert!(matches!(error, ModelError::Cancelled) && calls.load(Ordering::Relaxed) > 10);
    assert_eq!(entries(directory.path()), 0);

    std::fs::create_dir(&out).unwrap();
    write_shards(&job, &go_on).expect("an empty directory may be filled");
    let error = write_shards(&job, &go_on).unwrap_err();
    assert!(matches!(error, ModelError::OutputExists { .. }), "{error}");
    assert_eq!(entries(directory.path()), 1);
}

#[test]
fn an_impossible_degree_writes_nothing() {
    let fixture = Fixture::open("tiny");
    let directory = tempfile::tempdir().unwrap();
    for tp in [0, 3] {
        let out = directory.path().join("out");
        let job = ShardJob { model: &fixture.directory, tp, out: &out };
        assert!(matches!(write_shards(&job, &go_on), Err(ModelError::Split(_))));
        assert_eq!(entries(directory.path()), 0);
    }
}
