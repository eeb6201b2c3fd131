//! Runs several sequences, all of whose tokens are given, through hand-made steps: any chunks of any
//! sequences side by side, with padding that is poisoned. Returns the bits of all logits.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use tessera_collective::{Communicator, threads};
use tessera_kernels::{Backend, GraphKey, StepInputs, StepKind, StepLimits, TokenSource};
use tessera_model::{ModelConfig, WeightSource};
use tessera_types::{Epoch, Prompt};

use super::fixture::is_media;
use super::rank::{self, BLOCK_SIZE, LoadedRank};

const NUM_BLOCKS: u32 = 64;
const MAX_TOKENS: u32 = 256;

/// A sequence with all its tokens.
pub struct Sequence {
    pub prompt: Prompt,
    /// Visual rows in order of appearance, `[rows, hidden]`.
    pub visual: Vec<f32>,
    /// KV blocks by position. Sequences that share a prefix share its blocks.
    pub blocks: Vec<u32>,
}

/// What one step computes: tokens of sequences, by index.
#[derive(Clone)]
pub struct Step {
    pub chunks: Vec<(usize, Range<usize>)>,
    /// Rows behind the last token, and sequences behind the last one, that must have no effect.
    pub padding: usize,
}

/// Bits of the logits `[vocab_size]` of every computed token, by sequence and position.
pub type Bits = BTreeMap<(usize, usize), Vec<u32>>;

/// Runs `steps` over a group of `world_size` threads, each with a backend of its own.
pub fn run<B: Backend>(
    backend: impl Fn() -> B + Copy + Send,
    config: &ModelConfig,
    source: &WeightSource,
    world_size: u32,
    sequences: &[Sequence],
    steps: &[Step],
) -> Bits {
    let group = threads::group(world_size, Epoch(1));
    let ranks: Vec<Bits> = std::thread::scope(|scope| {
        let spawn = |communicator| {
            scope.spawn(move || run_rank(backend(), config, source, communicator, sequences, steps))
        };
        let ranks: Vec<_> = group.into_iter().map(spawn).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let mut whole = Bits::new();
    for (place, bits) in ranks.into_iter().flatten() {
        whole.entry(place).or_default().extend(bits);
    }
    whole.values_mut().for_each(|bits| bits.truncate(config.text.vocab_size));
    whole
}

fn run_rank<B: Backend>(
    mut b: B,
    config: &ModelConfig,
    source: &WeightSource,
    communicator: Communicator,
    sequences: &[Sequence],
    steps: &[Step],
) -> Bits {
    let hidden = config.text.hidden_size;
    let mut visual: Vec<f32> = sequences.iter().flat_map(|one| one.visual.clone()).collect();
    // The row that padding reads.
    visual.extend(vec![f32::NAN; hidden]);
    let limits = StepLimits {
        max_tokens: MAX_TOKENS,
        max_sequences: MAX_TOKENS,
        max_blocks_per_sequence: NUM_BLOCKS,
        ..StepLimits::default()
    };
    let LoadedRank { decoder, mut kv } =
        rank::load(&mut b, config, source, communicator, limits, &visual);
    let mut bits = Bits::new();
    for step in steps {
        let inputs = step_inputs(config, sequences, step);
        b.upload(&inputs).unwrap();
        let (tokens, rows) = (inputs.token_source.len() as u32, inputs.logit_rows.len() as u32);
        let seqs = inputs.kv_len.len() as u32;
        let mut logits = decoder.visual();
        b.run(GraphKey { tokens, seqs, rows, kind: StepKind::Mixed }, &mut |b| {
            logits = decoder.forward(b, &mut kv, tokens, rows)?;
            Ok(())
        })
        .unwrap();
        let ticket = b.submit().unwrap();
        b.wait(ticket, Instant::now() + Duration::from_secs(60)).unwrap();
        let local = b.download(logits).unwrap();
        let places = step.chunks.iter().flat_map(|(sequence, tokens)| {
            tokens.clone().map(move |position| (*sequence, position))
        });
        for (place, row) in places.zip(local.chunks_exact(logits.cols as usize)) {
            let row = row.iter().map(|logit| logit.to_bits()).collect();
            assert!(bits.insert(place, row).is_none(), "{place:?} computed twice");
        }
    }
    bits
}

fn step_inputs(config: &ModelConfig, sequences: &[Sequence], step: &Step) -> StepInputs {
    let hidden = config.text.hidden_size;
    let media_before = |prompt: &Prompt, token: usize| {
        prompt.tokens[..token].iter().filter(|token| is_media(config, **token)).count()
    };
    let mut inputs =
        StepInputs { cu_q: vec![0], block_table_stride: NUM_BLOCKS, ..StepInputs::default() };
    for (index, tokens) in &step.chunks {
        let Sequence { prompt, blocks, .. } = &sequences[*index];
        let before: usize = sequences[..*index].iter().map(|one| one.visual.len() / hidden).sum();
        prompt.extend_positions(tokens.start, tokens.end, &mut inputs.positions);
        for token in tokens.clone() {
            let id = prompt.tokens[token];
            let visual_row = (before + media_before(prompt, token)) as i32;
            inputs.token_source.push(TokenSource::Host(id));
            inputs.visual_row.push(if is_media(config, id) { visual_row } else { -1 });
            let block = blocks[token / BLOCK_SIZE as usize];
            let slot = block * BLOCK_SIZE + token as u32 % BLOCK_SIZE;
            inputs.slot_mapping.push(i64::from(slot));
        }
        inputs.cu_q.push(inputs.token_source.len() as u32);
        inputs.kv_len.push(tokens.end as u32);
        let mut table = blocks.clone();
        table.resize(NUM_BLOCKS as usize, 0);
        inputs.block_tables.extend(table);
    }
    inputs.logit_rows = (0..inputs.token_source.len() as u32).collect();
    let poison = sequences.iter().map(|one| one.visual.len() / hidden).sum::<usize>() as i32;
    for _ in 0..step.padding {
        inputs.token_source.push(TokenSource::Host(0));
        inputs.positions.push([0; 3]);
        inputs.visual_row.push(poison);
        inputs.slot_mapping.push(-1);
        inputs.cu_q.push(inputs.logit_rows.len() as u32);
        inputs.kv_len.push(0);
        inputs.block_tables.extend(vec![0; NUM_BLOCKS as usize]);
    }
    inputs
}
