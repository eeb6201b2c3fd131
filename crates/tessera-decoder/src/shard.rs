//! What this process holds of the model: its ranks with their share of the weights, loaded once and kept
//! over epochs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_cluster::{DecoderCapacity, ModelIdentity};
use tessera_engine::{EngineConfig, GrammarVocabulary, LocalRanks, RankProgress, RankSpec};
use tessera_kernels::{CpuBackend, Device, ReferenceBackend, StepLimits, cuda};
use tessera_model::{ModelConfig, Weights};
use tessera_processor::{BlockKeyChain, ProcessorConfig, Tokenizer};
use tessera_scheduler::SchedulerConfig;
use tessera_types::{NumericsId, Rank};

use crate::config::DecoderConfig;
use crate::error::DecoderError;
use crate::gpus;
use crate::kv_memory::{self, KvMemory};
use crate::loading::LoadObserver;

/// Ranks whose weights are in place, and what follows from them.
pub(crate) struct Shard {
    pub ranks: LocalRanks,
    pub progress: Vec<RankProgress>,
    pub engine: EngineConfig,
    pub identity: ModelIdentity,
    pub capacity: DecoderCapacity,
    pub block_keys: BlockKeyChain,
}

fn model_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DecoderError {
    DecoderError::Model(error.into())
}

/// Reads the checkpoint's settings and this process's slices of its weights. Takes as long as the disk.
///
/// # Errors
/// A broken checkpoint, by file and field or tensor; a tensor-parallel degree the model cannot be split
/// to; a KV cache that holds no block.
pub(crate) fn load(config: &DecoderConfig, observe: LoadObserver) -> Result<Shard, DecoderError> {
    let started = Instant::now();
    let device = config.parse_device()?;
    let source = &config.model;
    let model = Arc::new(ModelConfig::from_dir(&source.directory).map_err(model_error)?);
    let processor = ProcessorConfig::load(&source.directory).map_err(model_error)?;
    let weights = Weights::open(&source.weights, &model).map_err(model_error)?;
    let language_fingerprint = weights.language_fingerprint(&model).map_err(model_error)?;
    let vision_fingerprint = weights.vision_fingerprint(&model).map_err(model_error)?;
    drop(weights);
    let tokenizer =
        Tokenizer::load(&source.directory.join("tokenizer.json")).map_err(model_error)?;
    let mut engine = engine_config(config, &model, processor.generation.eos_token_ids);
    // Rows of the vocabulary beyond its tokens are padding and never drawn.
    let num_real_tokens = tokenizer.num_tokens().min(engine.vocab_size);
    if config.slot == 0 {
        let eos_token_ids = engine.eos_token_ids.clone();
        engine.grammar_vocabulary = Some(GrammarVocabulary::of(tokenizer, eos_token_ids));
    }
    let limits = StepLimits {
        max_tokens: engine.scheduler.max_tokens_per_step,
        max_sequences: engine.scheduler.num_slots(),
        max_blocks_per_sequence: engine.scheduler.max_blocks_per_sequence(),
        max_visual_rows: engine.scheduler.max_tokens_per_step,
        num_real_tokens,
    };
    let spec = |rank: u32| RankSpec {
        rank: Rank(rank),
        world_size: config.tp,
        model: Arc::clone(&model),
        weights: source.weights.clone(),
        limits,
        block_size: config.block_size,
    };
    let first = config.first_rank();
    let specs = (first..first + config.ranks_per_process).map(spec).collect();
    let ranks = load_ranks(config, device, specs, observe)?;
    let kv_memory = kv_memory(config, device, &ranks, &engine.scheduler)?;
    kv_memory.log(&engine.scheduler);
    let num_kv_blocks = kv_memory.num_blocks;
    let numerics = numerics_of(&ranks);
    tracing::info!(
        num_kv_blocks,
        first_rank = first,
        num_ranks = config.ranks_per_process,
        seconds = started.elapsed().as_secs_f64(),
        "model shard loaded"
    );
    Ok(Shard {
        progress: ranks.progress(),
        ranks,
        identity: ModelIdentity {
            name: source.name.clone(),
            language_fingerprint,
            vision_fingerprint,
            language_numerics: numerics,
            // A decoder computes no embeddings; those it is given name their own numerics in their keys.
            vision_numerics: NumericsId::default(),
        },
        capacity: DecoderCapacity {
            num_kv_blocks,
            block_size: config.block_size,
            max_sequences: engine.scheduler.max_running,
            max_model_len: kv_memory.longest_sequence(&engine.scheduler),
        },
        block_keys: BlockKeyChain::new(language_fingerprint, numerics, config.block_size, "", []),
        engine,
    })
}

fn load_ranks(
    config: &DecoderConfig,
    device: Device,
    specs: Vec<RankSpec>,
    mut observe: LoadObserver,
) -> Result<LocalRanks, DecoderError> {
    let loaded = match device {
        Device::Reference => {
            LocalRanks::load_observed(specs, |_| Ok(ReferenceBackend::new()), &mut observe)
        }
        Device::Cpu(format) => {
            let threads = match config.threads {
                0 => available_cores() / specs.len().max(1),
                threads => threads,
            };
            let make_backend = move |_| CpuBackend::new(threads.max(1), format);
            LocalRanks::load_observed(specs, make_backend, &mut observe)
        }
        Device::Cuda(device) => {
            let (first, deterministic) = (config.first_rank(), config.deterministic);
            let make_backend =
                move |rank: Rank| cuda::open(&device.options(local(rank, first), deterministic));
            LocalRanks::load_observed(specs, make_backend, &mut observe)
        }
    };
    loaded.map_err(model_error)
}

/// Place of a rank among those of this process.
fn local(rank: Rank, first: u32) -> usize {
    (rank.0 - first) as usize
}

fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn engine_config(
    config: &DecoderConfig,
    model: &ModelConfig,
    eos_token_ids: Vec<u32>,
) -> EngineConfig {
    let context = u32::try_from(model.text.max_position_embeddings).unwrap_or(u32::MAX);
    let max_model_len = match config.max_model_len {
        0 => context,
        len => len.min(context),
    };
    EngineConfig {
        scheduler: SchedulerConfig {
            block_size: config.block_size,
            max_running: config.max_sequences,
            max_waiting: config.max_waiting,
            max_waiting_per_tenant: config.max_waiting_per_tenant,
            max_tokens_per_step: config.max_tokens_per_step,
            max_model_len,
            pipeline_depth: config.pipeline_depth,
            ..SchedulerConfig::default()
        },
        hidden_size: model.text.hidden_size as u32,
        vocab_size: model.text.vocab_size as u32,
        eos_token_ids,
        max_embedding_bytes: config.max_embedding_bytes,
        step_time_target: match config.step_time_target_ms {
            0 => None,
            ms => Some(Duration::from_millis(ms.into())),
        },
        planted: config.planted,
        ..EngineConfig::default()
    }
}

/// The cache that every local rank can hold.
fn kv_memory(
    config: &DecoderConfig,
    device: Device,
    ranks: &LocalRanks,
    scheduler: &SchedulerConfig,
) -> Result<KvMemory, DecoderError> {
    let bytes = ranks.ranks().iter().map(|rank| rank.info().kv_block_bytes).max().unwrap_or(1);
    let num_ranks = config.ranks_per_process;
    let room = match device {
        Device::Reference | Device::Cpu(_) => kv_memory::host_room(num_ranks),
        Device::Cuda(device) => Some(gpus::kv_room(device, num_ranks)?),
    };
    KvMemory::plan(config.kv_cache_bytes, room, bytes, scheduler)
}

fn numerics_of(ranks: &LocalRanks) -> NumericsId {
    ranks.ranks().first().map(|rank| rank.info().numerics_id).unwrap_or_default()
}
