//! Whole rows: order of the edits, filters against slow obvious twins, and the distribution of draws.

use tessera_types::{SamplingParams, SequenceSlot, TokenMask};

use super::*;
use crate::inputs::SamplerSequence;

const BARRED: f32 = f32::NEG_INFINITY;

fn state(params: &SamplingParams, prompt: &[TokenId], output: &[TokenId]) -> SamplerState {
    SamplerState::new(&SamplerSequence {
        slot: SequenceSlot(0),
        prompt,
        output,
        params,
        eos_token_ids: &[1],
        seed: 0x5EED,
    })
}

fn draw(logits: &[f32], params: &SamplingParams, output_index: u32) -> Result<Draw, DrawError> {
    process_row(&mut logits.to_vec(), &state(params, &[], &[]), None, output_index, logits.len())
}

fn sampled(edit: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    edit(&mut params);
    params.validate().unwrap();
    params
}

/// Logits without pattern, in [−spread / 2, spread / 2), on a coarse grid when ties are wanted.
fn row(len: usize, spread: f32, grid: Option<f32>, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * spread;
        grid.map_or(value, |grid| (value / grid).round() * grid)
    };
    (0..len).map(|_| next()).collect()
}

/// Pearson's statistic of `num_draws` draws over softmax(logits), and its degrees of freedom.
fn chi_square(logits: &[f32], params: &SamplingParams, num_draws: u32) -> (f64, f64) {
    let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut counts = vec![0u32; logits.len()];
    for output_index in 0..num_draws {
        counts[draw(logits, params, output_index).unwrap().token as usize] += 1;
    }
    let mut statistic = 0.0;
    for (&count, weight) in counts.iter().zip(&weights) {
        let expected = f64::from(num_draws) * weight / total;
        assert!(expected >= 5.0, "too few draws for the statistic");
        statistic += (f64::from(count) - expected).powi(2) / expected;
    }
    (statistic, logits.len() as f64 - 1.0)
}

#[test]
fn draws_follow_the_softmax() {
    for salt in 0..4 {
        let logits = row(40, 4.0, None, salt);
        let (statistic, freedom) = chi_square(&logits, &sampled(|_| {}), 20_000);
        // Mean n, variance 2n; the draws are fixed by the seed, so this either always holds or never.
        let deviations = (statistic - freedom) / (2.0 * freedom).sqrt();
        assert!(deviations.abs() < 4.0, "chi-square {statistic} for {freedom} degrees of freedom");
    }
}

#[test]
fn temperature_sharpens_and_flattens() {
    let logits = [2.0, 1.0, 0.0, -1.0];
    for temperature in [0.25, 0.5, 2.0] {
        let params = sampled(|p| p.temperature = temperature);
        let num_draws = 20_000;
        let mut hits = 0;
        for output_index in 0..num_draws {
            hits += u32::from(draw(&logits, &params, output_index).unwrap().token == 0);
        }
        let weight = |logit: f32| f64::from(logit / temperature).exp();
        let expected = weight(2.0) / logits.iter().map(|&logit| weight(logit)).sum::<f64>();
        let share = f64::from(hits) / f64::from(num_draws);
        assert!((share - expected).abs() < 0.01, "{share} at {temperature}, expected {expected}");
    }
}

#[test]
fn seeds_and_output_indices_draw_differently_and_repeatably() {
    let logits = row(1000, 1.0, None, 3);
    let params = sampled(|_| {});
    let tokens: Vec<_> = (0..50).map(|i| draw(&logits, &params, i).unwrap().token).collect();
    let again: Vec<_> = (0..50).map(|i| draw(&logits, &params, i).unwrap().token).collect();
    assert_eq!(tokens, again);
    let distinct: std::collections::BTreeSet<_> = tokens.iter().collect();
    assert!(distinct.len() > 40, "{} distinct tokens of 50", distinct.len());

    let with_seed = |state: &SamplerState, i| {
        process_row(&mut logits.clone(), state, None, i, logits.len()).unwrap().token
    };
    let other = SamplerState::new(&SamplerSequence {
        slot: SequenceSlot(0),
        prompt: &[],
        output: &[],
        params: &params,
        eos_token_ids: &[],
        seed: 0x5EED + 1,
    });
    assert_ne!(tokens, (0..50).map(|i| with_seed(&other, i)).collect::<Vec<_>>());
}

#[test]
fn greedy_takes_the_highest_and_the_lowest_of_equals() {
    let params = SamplingParams::default();
    assert_eq!(draw(&[0.0, 3.0, 3.0, 1.0], &params, 0).unwrap().token, 1);
    // Filters and seed don't matter to it.
    let params = SamplingParams { top_p: 1e-6, top_k: 1, min_p: 1.0, ..params };
    assert_eq!(draw(&[0.0, 3.0, 3.0, 1.0], &params, 9).unwrap().token, 1);
}

#[test]
fn padded_ids_are_never_drawn_nor_counted() {
    let params = sampled(|p| p.logprobs = Some(20));
    let mut logits = vec![0.0, 0.0, 1e30, 1e30];
    let state = state(&params, &[], &[]);
    let draw = process_row(&mut logits, &state, None, 0, 2).unwrap();
    assert!(draw.token < 2);
    let logprobs = draw.logprobs.unwrap();
    assert_eq!(logprobs.top.len(), 2);
    assert!((logprobs.logprob - 0.5f32.ln()).abs() < 1e-6);
}

#[test]
fn log_probabilities_come_before_every_edit() {
    let params = sampled(|p| {
        p.temperature = 0.5;
        p.logit_bias = vec![(3, 100.0)];
        p.repetition_penalty = 2.0;
        p.top_k = 1;
        p.logprobs = Some(2);
    });
    let logits = [1.0, 2.0, 3.0, 0.0];
    let state = state(&params, &[2], &[]);
    let draw = process_row(&mut logits.to_vec(), &state, None, 0, 4).unwrap();
    assert_eq!(draw.token, 3);
    let logprobs = draw.logprobs.unwrap();
    let total: f32 = logits.iter().map(|logit: &f32| logit.exp()).sum();
    assert!((logprobs.logprob - (0.0 - total.ln())).abs() < 1e-6);
    let top: Vec<_> = logprobs.top.iter().map(|&(token, _)| token).collect();
    assert_eq!(top, [2, 1]);
    assert!((logprobs.top[0].1 - (3.0 - total.ln())).abs() < 1e-6);
}

#[test]
fn penalties_count_prompt_and_output_as_each_should() {
    let params = sampled(|p| {
        p.repetition_penalty = 2.0;
        p.presence_penalty = 0.25;
        p.frequency_penalty = 0.5;
    });
    // 0: unseen; 1: prompt only; 2: twice in the output; 3: both, with a negative logit.
    let mut state = state(&params, &[1, 3, 1, 999], &[2, 3]);
    state.record(2);
    let mut logits = [4.0, 4.0, 4.0, -4.0];
    state.edit(&mut logits, 0, 3);
    assert_eq!(logits, [4.0, 2.0, 2.0 - 1.0 - 0.25, -8.0 - 0.5 - 0.25]);

    // A sequence that takes a slot again, with its output given at once, has the same state.
    assert_eq!(state, self::state(&params, &[1, 3, 1, 999], &[2, 3, 2]));
    state.record(0);
    assert_eq!(state, self::state(&params, &[1, 3, 1, 999], &[2, 3, 2, 0]));
}

#[test]
fn bias_precedes_penalties() {
    let params = sampled(|p| {
        p.repetition_penalty = 2.0;
        p.logit_bias = vec![(0, 3.0), (50, 1.0)];
    });
    let mut logits = [-1.0, 0.0];
    state(&params, &[0], &[]).edit(&mut logits, 0, 0);
    assert_eq!(logits, [1.0, 0.0], "the sign that the penalty sees is that after the bias");
}

#[test]
fn min_tokens_bars_what_ends_a_sequence() {
    let mut params = SamplingParams { min_tokens: 2, ..SamplingParams::default() };
    params.stop_token_ids = vec![2, 99];
    params.ignore_eos = true;
    let logits = [0.0, 9.0, 8.0, 1.0];
    let token = |output_index| draw(&logits, &params, output_index).unwrap().token;
    assert_eq!([token(0), token(1), token(2)], [3, 3, 1]);
}

#[test]
fn a_mask_bars_clear_bits_and_all_beyond_it() {
    let mask = |words: &[u64]| TokenMask { words: words.into() };
    let params = SamplingParams::default();
    let state = state(&params, &[], &[]);
    let logits: Vec<f32> = (0..130).map(|i| i as f32).collect();
    let token = |words: &[u64]| {
        let mask = mask(words);
        process_row(&mut logits.clone(), &state, Some(&mask), 0, 130).map(|draw| draw.token)
    };
    assert_eq!(token(&[u64::MAX; 3]), Ok(129));
    assert_eq!(token(&[1 << 5, 1 << 3, 0]), Ok(67));
    assert_eq!(token(&[0b1001]), Ok(3));
    assert_eq!(token(&[]), Err(DrawError::NothingAllowed));
    // Bits past the vocabulary mean nothing.
    assert_eq!(token(&[0, 0, !0b11]), Err(DrawError::NothingAllowed));
}

#[test]
fn broken_and_empty_rows_are_typed_errors() {
    for params in [SamplingParams::default(), sampled(|_| {})] {
        let error = draw(&[0.0, f32::NAN, 1.0], &params, 0).unwrap_err();
        assert!(matches!(error, DrawError::InvalidLogit { token: 1, .. }));
        let error = draw(&[0.0, 1.0, f32::INFINITY], &params, 0).unwrap_err();
        assert_eq!(error, DrawError::InvalidLogit { token: 2, value: f32::INFINITY });
        assert_eq!(draw(&[BARRED; 5], &params, 0), Err(DrawError::NothingAllowed));
        assert_eq!(draw(&[], &params, 0), Err(DrawError::NothingAllowed));
        let mut one = [BARRED; 70];
        one[69] = -1e30;
        assert_eq!(draw(&one, &params, 0).unwrap().token, 69);
    }
    // Only real ids are looked at: padding may hold anything.
    let state = state(&SamplingParams::default(), &[], &[]);
    let draw = process_row(&mut [0.0, f32::NAN], &state, None, 0, 1).unwrap();
    assert_eq!(draw.token, 0);
}

/// Which tokens a filter keeps.
fn kept(logits: &[f32], filter: impl FnOnce(&mut [f32])) -> Vec<usize> {
    let mut filtered = logits.to_vec();
    filter(&mut filtered);
    for (after, before) in filtered.iter().zip(logits) {
        assert!(after == before || *after == BARRED, "a filter drops or leaves alone");
    }
    (0..logits.len()).filter(|&i| filtered[i] > BARRED).collect()
}

/// Tokens by falling logit and rising id, as a full sort gives them.
fn ranking(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > BARRED).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    order
}

fn sorted(mut tokens: Vec<usize>) -> Vec<usize> {
    tokens.sort_unstable();
    tokens
}

fn rows() -> impl Iterator<Item = Vec<f32>> {
    (0..12u64).map(|salt| {
        let grid = (salt % 2 == 1).then_some(0.5);
        let mut logits = row([1, 2, 17, 700, 3000, 65][salt as usize % 6], 12.0, grid, salt);
        if salt > 5 && logits.len() > 2 {
            logits[1] = BARRED;
        }
        logits
    })
}

#[test]
fn top_k_is_a_full_sort_cut_short() {
    for logits in rows() {
        for top_k in [0, 1, 2, 16, 699, 5000] {
            let mut expected = ranking(&logits);
            expected.truncate(if top_k == 0 { usize::MAX } else { top_k });
            let kept = kept(&logits, |row| filters::apply_top_k(row, top_k));
            assert_eq!(kept, sorted(expected), "top_k {top_k}");
        }
    }
}

#[test]
fn top_p_is_the_smallest_set_that_reaches_it() {
    for logits in rows() {
        let weight = |i: usize| f64::from(logits[i]).exp();
        let order = ranking(&logits);
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        for top_p in [1e-9, 0.05, 0.3, 0.7, 0.95, 0.9999, 1.0f32] {
            let kept = kept(&logits, |row| filters::apply_top_p(row, top_p));
            assert_eq!(kept, sorted(order[..kept.len()].to_vec()), "a prefix of the ranking");
            let mass: f64 = order[..kept.len()].iter().map(|&i| weight(i)).sum();
            let without_last = mass - weight(order[kept.len() - 1]);
            let target = f64::from(top_p) * total;
            // Where the target falls on a border within rounding, either side of it is right.
            assert!(mass >= target * (1.0 - 1e-6), "top_p {top_p} is not reached");
            assert!(without_last < target * (1.0 + 1e-6), "top_p {top_p} needs fewer tokens");
        }
    }
}

#[test]
fn min_p_drops_what_is_less_likely_than_its_share_of_the_best() {
    for logits in rows() {
        let best = ranking(&logits)[0];
        for min_p in [0.0, 1e-6, 0.0503, 0.6, 1.0f32] {
            let kept = kept(&logits, |row| filters::apply_min_p(row, min_p));
            let share = |i: &usize| (f64::from(logits[*i]) - f64::from(logits[best])).exp();
            let allowed = ranking(&logits);
            let expected = allowed.into_iter().filter(|i| share(i) >= f64::from(min_p)).collect();
            assert_eq!(kept, sorted(expected), "min_p {min_p}");
        }
    }
}

#[test]
fn filtered_tokens_are_never_drawn() {
    let logits = row(300, 6.0, None, 8);
    let order = ranking(&logits);
    let params = sampled(|p| {
        p.top_k = 20;
        p.top_p = 0.9;
        p.min_p = 0.01;
    });
    let mut drawn = std::collections::BTreeSet::new();
    for output_index in 0..2000 {
        drawn.insert(draw(&logits, &params, output_index).unwrap().token as usize);
    }
    assert!(drawn.iter().all(|token| order[..20].contains(token)), "{drawn:?}");
    assert!(drawn.len() > 5, "{drawn:?}");
    let tiny = sampled(|p| p.top_p = 1e-9);
    assert_eq!(draw(&logits, &tiny, 0).unwrap().token as usize, order[0]);
}

#[test]
fn the_best_of_any_shards_is_the_draw_of_the_whole_row() {
    let len = 300;
    let mask = TokenMask { words: [!0x10, u64::MAX, 0xF0F0, 0, u64::MAX].into() };
    for temperature in [0.0, 0.8] {
        let params = sampled(|p| {
            (p.temperature, p.min_tokens, p.repetition_penalty) = (temperature, 9, 1.3);
            p.logit_bias = vec![(3, 2.0), (140, 1.5), (290, 1.0)];
        });
        assert!(is_separable(&params));
        for salt in 0..40 {
            let logits = row(len, 12.0, Some(0.5), salt);
            let state = state(&params, &[2, 130, 131, 299], &[140]);
            let shard = |first: usize, end: usize| {
                let mut logits = logits[first..end].to_vec();
                shard_candidate(&mut logits, first as TokenId, &state, Some(&mask), 5).unwrap()
            };
            let whole = process_row(&mut logits.clone(), &state, Some(&mask), 5, len).unwrap();
            for cut in [0, 1, 64, 100, 137, 299, 300] {
                let shards = [shard(cut, len), shard(0, cut)].into_iter().flatten();
                let best = shards.reduce(|a, b| if a.beats(&b) { a } else { b }).unwrap();
                assert_eq!(best.token, whole.token, "cut at {cut}");
                assert!(mask.allows(best.token));
            }
        }
    }
}

#[test]
fn an_invalid_logit_is_named_by_its_token_in_the_whole_row() {
    let state = state(&SamplingParams::default(), &[0], &[]);
    let found = shard_candidate(&mut [0.0, f32::INFINITY], 500, &state, None, 0);
    assert_eq!(found, Err(DrawError::InvalidLogit { token: 501, value: f32::INFINITY }));
}
