//! Runs one sequence through a decoder split over threads, as the engine would: chunked prefill into
//! scattered blocks of the paged cache, then one token per step, each taken from the device's table.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tessera_collective::{AbortHandle, CollectiveConfig, Communicator, tcp, threads};
use tessera_kernels::{
    Backend, GraphKey, ReferenceBackend, SampleRow, SamplerSequence, StepInputs, StepKind,
    StepLimits, TokenSource,
};
use tessera_model::{ModelConfig, WeightSource};
use tessera_types::{Epoch, LateInputs, Prompt, Rank, SamplingParams, SequenceId, SequenceSlot};

use super::fixture::is_media;
use super::rank::{self, BLOCK_SIZE, LoadedRank};

const NUM_BLOCKS: u32 = 23;
const SLOT: SequenceSlot = SequenceSlot(1);

/// What to run.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub prompt: &'a Prompt,
    /// Visual rows of all items in order of appearance, `[rows, hidden]`.
    pub visual: &'a [f32],
    /// Tokens to draw.
    pub steps: usize,
    /// Most prompt tokens computed at once.
    pub chunk: usize,
    /// Return the logits of every prompt token, not only of the last.
    pub all_logits: bool,
}

/// Logits in the order of computation, each `[vocab_size]`, and the drawn tokens.
#[derive(Debug, Default, PartialEq)]
pub struct Generation {
    pub logits: Vec<Vec<f32>>,
    pub tokens: Vec<u32>,
}

/// Runs `request` at a tensor-parallel degree, ranks joined by threads.
pub fn generate(
    config: &ModelConfig,
    source: &WeightSource,
    world_size: u32,
    request: Request<'_>,
) -> Generation {
    generate_over(config, source, threads::group(world_size, Epoch(1)), request)
}

/// Communicators over TCP, one per rank, as separate processes would make them.
pub fn tcp_group(world_size: u32) -> Vec<Communicator> {
    let (localhost, settings) = (IpAddr::from([127, 0, 0, 1]), CollectiveConfig::default());
    let deadline = Instant::now() + Duration::from_secs(60);
    let abort = AbortHandle::new(Epoch(1));
    let address = SocketAddr::new(localhost, 0);
    let (root, id) = tcp::Root::bind(address, world_size, &abort, &settings).unwrap();
    std::thread::scope(|scope| {
        let connect = |rank| {
            let (id, settings) = (&id, &settings);
            scope.spawn(move || {
                let abort = AbortHandle::new(Epoch(1));
                tcp::connect(id, localhost, Rank(rank), world_size, deadline, &abort, settings)
            })
        };
        let others: Vec<_> = (1..world_size).map(connect).collect();
        let first = root.accept(deadline).unwrap();
        let others = others.into_iter().map(|rank| rank.join().unwrap().unwrap());
        std::iter::once(first).chain(others).collect()
    })
}

/// Runs `request` over the ranks of a group on the reference backend.
pub fn generate_over(
    config: &ModelConfig,
    source: &WeightSource,
    group: Vec<Communicator>,
    request: Request<'_>,
) -> Generation {
    generate_on(ReferenceBackend::new, config, source, group, request)
}

/// Runs `request` over the ranks of a group, each on a backend of its own. All must draw the same
/// tokens.
pub fn generate_on<B: Backend>(
    backend: impl Fn() -> B + Copy + Send,
    config: &ModelConfig,
    source: &WeightSource,
    group: Vec<Communicator>,
    request: Request<'_>,
) -> Generation {
    let ranks = std::thread::scope(|scope| {
        let spawn = |communicator| {
            scope.spawn(move || run_rank(backend(), config, source, communicator, request))
        };
        let ranks: Vec<_> = group.into_iter().map(spawn).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    let mut whole = Generation { tokens: ranks[0].tokens.clone(), ..Generation::default() };
    assert!(ranks.iter().all(|rank| rank.tokens == whole.tokens), "ranks disagree about tokens");
    for row in 0..ranks[0].logits.len() {
        let mut logits: Vec<f32> = ranks.iter().flat_map(|rank| rank.logits[row].clone()).collect();
        logits.truncate(config.text.vocab_size);
        whole.logits.push(logits);
    }
    whole
}

fn run_rank<B: Backend>(
    mut b: B,
    config: &ModelConfig,
    source: &WeightSource,
    communicator: Communicator,
    request: Request<'_>,
) -> Generation {
    let Request { prompt, visual, steps, chunk, all_logits } = request;
    let limits = StepLimits {
        max_tokens: chunk as u32,
        max_sequences: chunk as u32 + SLOT.0 + 1,
        max_blocks_per_sequence: NUM_BLOCKS,
        ..StepLimits::default()
    };
    let LoadedRank { decoder, mut kv } =
        rank::load(&mut b, config, source, communicator, limits, visual);
    let params = SamplingParams::default();
    b.sampler_admit(SamplerSequence {
        slot: SLOT,
        prompt: &prompt.tokens,
        output: &[],
        params: &params,
        eos_token_ids: &[],
        seed: 0,
    })
    .unwrap();

    let mut result = Generation::default();
    let len = prompt.tokens.len();
    let mut start = 0;
    while result.tokens.len() < steps {
        let end = if start < len { len.min(start + chunk) } else { start + 1 };
        let samples = end >= len;
        let mut inputs = step_inputs(config, prompt, start, end);
        let rows = if all_logits {
            0..(end - start) as u32
        } else {
            (end - start) as u32 - 1..(end - start) as u32
        };
        inputs.logit_rows = rows.filter(|_| samples || all_logits).collect();
        b.upload(&inputs).unwrap();
        let (tokens, rows) = ((end - start) as u32, inputs.logit_rows.len() as u32);
        let key = GraphKey { tokens, seqs: 1, rows, kind: StepKind::Mixed };
        let mut logits = decoder.visual();
        b.run(key, &mut |b| {
            logits = decoder.forward(b, &mut kv, tokens, rows)?;
            Ok(())
        })
        .unwrap();
        if samples && !all_logits {
            let output_index = result.tokens.len() as u32;
            let row = SampleRow { slot: SLOT, sequence: SequenceId(7), output_index };
            b.sample(logits, &[row], &LateInputs::default()).unwrap();
        }
        let ticket = b.submit().unwrap();
        let readback = b.wait(ticket, Instant::now() + Duration::from_secs(60)).unwrap();
        let local = b.download(logits).unwrap();
        result.logits.extend(local.chunks_exact(logits.cols as usize).map(<[f32]>::to_vec));
        result.tokens.extend(readback.tokens.iter().map(|sampled| sampled.token));
        if all_logits && samples {
            break;
        }
        start = end;
    }
    result
}

/// Inputs of the tokens `start..end`; beyond the prompt a token is the one drawn last.
fn step_inputs(config: &ModelConfig, prompt: &Prompt, start: usize, end: usize) -> StepInputs {
    // Blocks lie anywhere but in order.
    let block = |index: u32| (index * 5 + 3) % NUM_BLOCKS;
    let visual_rows_before = |token: usize| {
        prompt.tokens[..token].iter().filter(|token| is_media(config, **token)).count()
    };
    let mut inputs = StepInputs {
        cu_q: vec![0, (end - start) as u32],
        kv_len: vec![end as u32],
        block_tables: (0..NUM_BLOCKS).map(block).collect(),
        block_table_stride: NUM_BLOCKS,
        ..StepInputs::default()
    };
    prompt.extend_positions(start, end, &mut inputs.positions);
    for token in start..end {
        let id = prompt.tokens.get(token).copied();
        inputs.token_source.push(id.map_or(TokenSource::LastSampled(SLOT), TokenSource::Host));
        let visual_row =
            id.filter(|id| is_media(config, *id)).map(|_| visual_rows_before(token) as i32);
        inputs.visual_row.push(visual_row.unwrap_or(-1));
        let (index, offset) = (token as u32 / BLOCK_SIZE, token as u32 % BLOCK_SIZE);
        inputs.slot_mapping.push(i64::from(block(index) * BLOCK_SIZE + offset));
    }
    inputs
}
