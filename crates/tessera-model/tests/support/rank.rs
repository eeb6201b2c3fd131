//! One rank of a group with its share of a model loaded, ready for its first step.

use tessera_collective::Communicator;
use tessera_kernels::{Backend, HostRows, StepLimits};
use tessera_model::{Decoder, ModelConfig, TpSplit, WeightSource, Weights};

/// Tokens per KV block.
pub const BLOCK_SIZE: u32 = 16;

/// What a rank has between loading and its end.
pub struct LoadedRank<B: Backend> {
    pub decoder: Decoder<B>,
    pub kv: B::Kv,
}

/// Loads the rank of `communicator`, gives it a cache of `max_blocks_per_sequence` blocks, uploads `visual`
/// `[rows, hidden]` on rank 0, and joins the group. `limits` need neither the visual rows nor the vocabulary.
pub fn load<B: Backend>(
    b: &mut B,
    config: &ModelConfig,
    source: &WeightSource,
    communicator: Communicator,
    limits: StepLimits,
    visual: &[f32],
) -> LoadedRank<B> {
    let hidden = config.text.hidden_size;
    let limits = StepLimits {
        max_visual_rows: (visual.len() / hidden) as u32,
        num_real_tokens: config.text.vocab_size as u32,
        ..limits
    };
    let split = TpSplit::new(&config.text, communicator.rank(), communicator.world_size()).unwrap();
    let mut weights = Weights::open(source, config).unwrap();
    let decoder = Decoder::load(b, &config.text, &split, &limits, &mut weights).unwrap();
    let kv = b.alloc_kv(&decoder.kv_spec(BLOCK_SIZE), limits.max_blocks_per_sequence).unwrap();
    if communicator.rank().0 == 0 {
        let rows = HostRows { values: visual, cols: hidden as u32 };
        b.upload_rows(decoder.visual(), 0, rows).unwrap();
    }
    b.set_communicator(Some(communicator)).unwrap();
    LoadedRank { decoder, kv }
}
