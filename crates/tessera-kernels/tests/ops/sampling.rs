//! Sampling over a split vocabulary. The rules of a draw have their own tests beside their code; here
//! the ranks must agree, and padding must never win.

use std::sync::Arc;

use tessera_kernels::{
    Backend, KernelError, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits, TokenSource,
};
use tessera_types::{LateInputs, SamplingParams, SequenceId, SequenceSlot, TokenMask};

use crate::support::*;

backend_tests!(
    every_split_draws_the_same_tokens,
    padding_is_never_drawn_and_never_counted,
    masks_and_penalties_apply,
    a_sampled_token_is_the_next_input_on_all_ranks,
    steps_in_flight_keep_their_draws,
    scores_are_log_probabilities,
    an_impossible_draw_fails_on_every_rank,
);

const VOCAB: usize = 90;
const REAL: usize = 83;

fn limits() -> StepLimits {
    StepLimits { num_real_tokens: REAL as u32, ..LIMITS }
}

fn admit<B: Backend>(b: &mut B, slot: u32, params: &SamplingParams) {
    let (slot, seed) = (SequenceSlot(slot), 99 + u64::from(slot));
    let sequence =
        SamplerSequence { slot, prompt: &[1, 2], output: &[], params, eos_token_ids: &[3], seed };
    b.sampler_admit(sequence).unwrap();
}

fn row(slot: u32) -> SampleRow {
    SampleRow { slot: SequenceSlot(slot), sequence: SequenceId(slot.into()), output_index: 4 }
}

/// This rank's columns of `[rows, VOCAB]`, padded to equal widths with a value that would win.
fn shard(logits: &[f32], rank: usize, world_size: usize) -> Vec<f32> {
    let width = VOCAB.div_ceil(world_size);
    let rows = logits.chunks_exact(VOCAB);
    let own = rows.flat_map(|row| {
        (rank * width..(rank + 1) * width).map(|col| row.get(col).copied().unwrap_or(1e6))
    });
    own.collect()
}

/// Samples `rows` from `logits` on every rank and returns tokens with log probabilities of rank 0.
fn sample<B: TestBackend>(
    world_size: usize,
    logits: &[f32],
    params: &[SamplingParams],
    late: &LateInputs,
) -> Vec<(u32, Option<f32>)> {
    let rows: Vec<SampleRow> = (0..params.len() as u32).map(row).collect();
    let results = on_ranks(world_size as u32, |communicator| {
        let mut b = planned::<B>(limits());
        let local = shard(logits, communicator.rank().index(), world_size);
        b.set_communicator(Some(communicator)).unwrap();
        params.iter().enumerate().for_each(|(slot, params)| admit(&mut b, slot as u32, params));
        let act = act(0, rows.len(), local.len() / rows.len());
        set(&mut b, act, &local);
        b.sample(act, &rows, late).unwrap();
        let ticket = b.submit().unwrap();
        let tokens = b.wait(ticket, soon()).unwrap().tokens;
        assert_eq!(
            tokens.iter().map(|t| t.slot).collect::<Vec<_>>(),
            rows.iter().map(|r| r.slot).collect::<Vec<_>>()
        );
        tokens.into_iter().map(|t| (t.token, t.logprobs.map(|l| l.logprob))).collect::<Vec<_>>()
    });
    for other in &results[1..] {
        let tokens = |result: &[(u32, Option<f32>)]| result.iter().map(|r| r.0).collect::<Vec<_>>();
        assert_eq!(tokens(other), tokens(&results[0]), "ranks disagree");
    }
    results.into_iter().next().unwrap()
}

fn params(edit: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams::default();
    edit(&mut params);
    params
}

fn every_split_draws_the_same_tokens<B: TestBackend>() {
    let logits: Vec<f32> = Noise::new(40).values(7 * VOCAB).iter().map(|x| x * 4.0).collect();
    let params = [
        params(|p| p.logprobs = Some(2)),
        params(|p| p.temperature = 1.0),
        params(|p| (p.temperature, p.top_p) = (0.7, 0.8)),
        params(|p| (p.temperature, p.top_k) = (1.5, 7)),
        params(|p| (p.temperature, p.min_p) = (1.0, 0.1)),
        params(|p| p.logit_bias = vec![(70, 2.5)]),
        params(|p| (p.temperature, p.repetition_penalty) = (1.3, 1.5)),
    ];
    let one = sample::<B>(1, &logits, &params, &LateInputs::default());
    let real = &logits[..REAL];
    let max = real.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert_eq!(real[one[0].0 as usize], max, "greedy");
    for world_size in [2, 4, 8] {
        assert_eq!(sample::<B>(world_size, &logits, &params, &LateInputs::default()), one);
    }
}

fn padding_is_never_drawn_and_never_counted<B: TestBackend>() {
    let mut logits = vec![0.0; 2 * VOCAB];
    for row in logits.chunks_exact_mut(VOCAB) {
        row[17] = 1.0;
        row[REAL..].fill(50.0);
    }
    let params =
        [params(|p| p.logprobs = Some(0)), params(|p| (p.temperature, p.top_k) = (1.0, 1))];
    for world_size in [1, 4] {
        let drawn = sample::<B>(world_size, &logits, &params, &LateInputs::default());
        let expected = (1f64.exp() / (1f64.exp() + (REAL - 1) as f64)).ln();
        assert_eq!((drawn[0].0, drawn[1].0), (17, 17));
        assert!((f64::from(drawn[0].1.unwrap()) - expected).abs() < 1e-5);
    }
}

fn masks_and_penalties_apply<B: TestBackend>() {
    let mut logits = vec![0.0; 2 * VOCAB];
    // Token 2 stands in the prompt; token 40 is barred for slot 0 only.
    for row in logits.chunks_exact_mut(VOCAB) {
        (row[2], row[40], row[60]) = (3.0, 2.8, 2.7);
    }
    let mut words = vec![u64::MAX; 2];
    words[0] &= !(1 << 40);
    let mask = TokenMask { words: Arc::from(words) };
    let late = LateInputs { masks: vec![(SequenceSlot(0), mask)] };
    let penalised = params(|p| p.repetition_penalty = 1.2);
    let drawn = sample::<B>(2, &logits, &[penalised.clone(), penalised], &late);
    assert_eq!((drawn[0].0, drawn[1].0), (60, 40));
}

fn a_sampled_token_is_the_next_input_on_all_ranks<B: TestBackend>() {
    let (mut noise, mut weights) = (Noise::new(41), MemoryWeights::default());
    let table = weights.add("embed.weight", &[VOCAB, 32], &mut noise);
    let mut logits = vec![0.0; VOCAB];
    logits[77] = 5.0;
    let sums = on_ranks(2, |communicator| {
        let (mut b, weights) = (planned::<B>(limits()), weights.clone());
        let rank = communicator.rank().index();
        b.set_communicator(Some(communicator)).unwrap();
        let rows = rank * 45..(rank + 1) * 45;
        let spec = stacked(vec![part("embed", [VOCAB, 32], rows, 0..32, false)]);
        let embed = b.load_linear(&spec, &weights).unwrap();
        admit(&mut b, 2, &SamplingParams::default());
        set(&mut b, act(0, 1, 45), &shard(&logits, rank, 2));
        b.sample(act(0, 1, 45), &[row(2)], &LateInputs::default()).unwrap();
        let inputs = StepInputs {
            token_source: vec![TokenSource::LastSampled(SequenceSlot(2))],
            positions: vec![[0; 3]],
            slot_mapping: vec![-1],
            visual_row: vec![-1],
            cu_q: vec![0],
            ..StepInputs::default()
        };
        b.upload(&inputs).unwrap();
        b.embed_merge(&embed, act(1, 0, 32), act(2, 1, 32)).unwrap();
        b.download(act(2, 1, 32)).unwrap()
    });
    let sum: Vec<f32> = sums[0].iter().zip(&sums[1]).map(|(a, b)| a + b).collect();
    assert_eq!(sum, table[77 * 32..78 * 32]);
}

/// Two steps are always on their way, more than once around every ring of buffers.
fn steps_in_flight_keep_their_draws<B: TestBackend>() {
    let token = |step: u32, slot: u32| (7 * step + 30 * slot) % REAL as u32;
    for world_size in [1, 2] {
        on_ranks(world_size, |communicator| {
            let mut b = planned::<B>(limits());
            let rank = communicator.rank().index();
            b.set_communicator(Some(communicator)).unwrap();
            [0, 1].into_iter().for_each(|slot| admit(&mut b, slot, &SamplingParams::default()));
            let mut tickets = std::collections::VecDeque::new();
            for step in 0..9 {
                let mut logits = vec![0.0; 2 * VOCAB];
                for slot in [0, 1] {
                    logits[slot as usize * VOCAB + token(step, slot) as usize] = 9.0;
                }
                let local = shard(&logits, rank, world_size as usize);
                let act = act(0, 2, local.len() / 2);
                set(&mut b, act, &local);
                b.sample(act, &[row(0), row(1)], &LateInputs::default()).unwrap();
                tickets.push_back((step, b.submit().unwrap()));
                let in_flight = if step == 8 { 0 } else { 2 };
                while tickets.len() > in_flight {
                    let (step, ticket) = tickets.pop_front().unwrap();
                    let drawn = b.wait(ticket, soon()).unwrap().tokens;
                    let drawn: Vec<u32> = drawn.iter().map(|drawn| drawn.token).collect();
                    assert_eq!(drawn, [0, 1].map(|slot| token(step, slot)), "step {step}");
                }
            }
        });
    }
}

fn scores_are_log_probabilities<B: TestBackend>() {
    let logits: Vec<f32> = Noise::new(42).values(3 * VOCAB).iter().map(|x| x * 6.0).collect();
    let rows = [(0, 0), (50, 2), (82, 5)].map(|(target, num_top)| ScoreRow { target, num_top });
    let scores = on_ranks(4, |communicator| {
        let mut b = planned::<B>(limits());
        let local = shard(&logits, communicator.rank().index(), 4);
        b.set_communicator(Some(communicator)).unwrap();
        let act = act(0, 3, local.len() / 3);
        set(&mut b, act, &local);
        b.score_rows(act, &rows).unwrap();
        let ticket = b.submit().unwrap();
        b.wait(ticket, soon()).unwrap().scores
    });
    assert!(scores[1..].iter().all(Vec::is_empty), "rank 0 tells for all");
    for ((logits, row), score) in logits.chunks_exact(VOCAB).zip(rows).zip(&scores[0]) {
        let real = &logits[..REAL];
        let sum: f64 = real.iter().map(|logit| f64::from(*logit).exp()).sum();
        let close = |logprob: f32, token: u32| {
            (f64::from(logprob) - (f64::from(real[token as usize]) - sum.ln())).abs() < 1e-5
        };
        assert!(close(score.logprob, row.target));
        let mut likeliest: Vec<u32> = (0..REAL as u32).collect();
        likeliest.sort_by(|a, b| real[*b as usize].total_cmp(&real[*a as usize]));
        let top: Vec<u32> = score.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(top, likeliest[..row.num_top as usize]);
        assert!(score.top.iter().all(|&(token, logprob)| close(logprob, token)));
    }
}

fn an_impossible_draw_fails_on_every_rank<B: TestBackend>() {
    let mut logits = vec![0.0; VOCAB];
    logits[5] = f32::NAN;
    let errors = on_ranks(2, |communicator| {
        let mut b = planned::<B>(limits());
        let local = shard(&logits, communicator.rank().index(), 2);
        b.set_communicator(Some(communicator)).unwrap();
        admit(&mut b, 0, &SamplingParams::default());
        set(&mut b, act(0, 1, 45), &local);
        b.sample(act(0, 1, 45), &[row(0)], &LateInputs::default()).unwrap_err()
    });
    assert!(matches!(errors[0], KernelError::Draw { slot: SequenceSlot(0), .. }));
    assert!(matches!(errors[1], KernelError::DrawElsewhere { slot: SequenceSlot(0) }));
}
