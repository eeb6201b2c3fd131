//! What real ranks give beside free tokens: constrained output, log probabilities of prompts, the warm-up.

use std::time::Duration;

use crossbeam_channel::bounded;
use tessera_engine::Event;
use tessera_kernels::{CpuBackend, CpuFormat};
use tessera_processor::Tokenizer;
use tessera_scheduler::SchedulerConfig;
use tessera_types::{Grammar, SamplingParams, TokenId, TokenLogprobs};

use crate::golden::{self, Golden};
use crate::ranks::{
    Drawn, Group, NUM_BLOCKS, finished, load_ranks, load_ranks_on, scheduler, tokens,
};

/// What two grammars and temperatures make of a prompt, token by token.
pub fn constrained(group: &Group, golden: &Golden) -> Vec<Vec<Drawn>> {
    // White space is free otherwise, and this model is fond of it.
    let schema = r#"{"type": "array", "items": {"enum": [1, "two", null]}, "maxItems": 4,
        "x-guidance": {"whitespace_flexible": false}}"#;
    let grammars =
        [Grammar::JsonSchema(schema.to_owned()), Grammar::Regex("[a-z ]{5,20}\\.".to_owned())];
    let streams: Vec<_> = grammars
        .into_iter()
        .flat_map(|grammar| [0.0, 1.0].map(|temperature| (grammar.clone(), temperature)))
        .map(|(grammar, temperature)| {
            let sampling = SamplingParams {
                max_tokens: 64,
                temperature,
                logprobs: Some(1),
                grammar: Some(grammar),
                ..SamplingParams::default()
            };
            group.submit_sampled(golden, sampling, Vec::new())
        })
        .collect();
    streams.iter().map(finished).collect()
}

/// The true model under grammars: what it writes can be read.
#[test]
fn a_constrained_model_writes_what_its_grammar_admits() {
    let tokenizer = Tokenizer::load(&golden::checkpoint().join("tokenizer.json"));
    let tokenizer = tokenizer.expect("the fixture's tokenizer");
    let golden = golden::load("text", 0);
    let cpu = |_| CpuBackend::new(1, CpuFormat::Bf16);
    let backends = [load_ranks(0..2, 2), load_ranks_on(cpu, 0..2, 2)];
    for ranks in backends {
        let group = Group::start(ranks, 2);
        group.begin_threads(1, 2, NUM_BLOCKS);
        let all = constrained(&group, &golden);
        let text = |drawn: &Vec<Drawn>| {
            let (end, drawn) = drawn.split_last().expect("a token");
            assert_eq!(end.0, 2050, "it ends by itself: {drawn:?}");
            tokenizer.decode(&tokens(drawn))
        };
        for drawn in &all[..2] {
            let value: serde_json::Value = serde_json::from_str(&text(drawn)).expect("JSON");
            let items = value.as_array().expect("a list");
            let admitted = [1.into(), "two".into(), serde_json::Value::Null];
            assert!(items.len() <= 4 && items.iter().all(|item| admitted.contains(item)));
        }
        for drawn in &all[2..] {
            let text = text(drawn);
            let letters = text.strip_suffix('.').expect("a full stop");
            assert!((5..=20).contains(&letters.len()), "{text:?}");
            assert!(letters.bytes().all(|b| b.is_ascii_lowercase() || b == b' '), "{text:?}");
        }
    }
}

/// All log probabilities of a prompt, from its second token on.
fn prompt_logprobs(group: &Group, golden: &Golden) -> Vec<TokenLogprobs> {
    let sampling =
        SamplingParams { max_tokens: 2, prompt_logprobs: Some(3), ..SamplingParams::default() };
    let events = group.submit_sampled(golden, sampling, Vec::new());
    let mut all = Vec::new();
    for event in &events {
        match event {
            Event::PromptLogprobs { first_token, tokens } => {
                assert_eq!(first_token as usize, all.len() + 1, "lost or repeated");
                all.extend(tokens);
            }
            Event::Token { .. } => assert_eq!(all.len(), golden.prompt.tokens.len() - 1),
            Event::Finished { .. } => return all,
            Event::Failed { error } => panic!("{error}"),
            _ => {}
        }
    }
    panic!("the stream ended without a last event")
}

#[test]
fn prompt_logprobs_are_those_of_the_reference_whatever_the_chunks() {
    let (golden, images) = (golden::load("text", 0), golden::load("images", 1));
    let vocab_size = golden.logits.len() / golden.prompt.tokens.len();
    for world_size in [1, 2] {
        let mut runs = Vec::new();
        for max_tokens_per_step in [33, 7] {
            let limits = SchedulerConfig { max_tokens_per_step, ..scheduler(2) };
            let group = Group::start_with(load_ranks(0..world_size, world_size), limits);
            group.begin_threads(1, world_size, NUM_BLOCKS);
            runs.push([&golden, &images].map(|golden| prompt_logprobs(&group, golden)));
        }
        let targets = golden.prompt.tokens[1..].iter();
        for ((row, &target), ours) in
            golden.logits.chunks_exact(vocab_size).zip(targets).zip(&runs[0][0])
        {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            let exact = |token: TokenId| f64::from(row[token as usize]) - sum.ln();
            let close = |logprob: f32, token| (f64::from(logprob) - exact(token)).abs() < 1e-3;
            assert!(close(ours.logprob, target), "{ours:?}, exactly {}", exact(target));
            assert!(ours.top.len() == 3 && ours.top.is_sorted_by(|a, b| a.1 >= b.1));
            assert!(ours.top.iter().all(|&(token, logprob)| close(logprob, token)));
        }
        assert_eq!(runs[0], runs[1], "degree {world_size}");
    }
}

#[test]
fn a_warm_up_fits_the_budget_and_leaves_nothing_behind() {
    let group = Group::start(load_ranks(0..2, 2), 2);
    group.begin_threads(1, 2, NUM_BLOCKS);
    let warm_up = || {
        let (sender, reply) = bounded(1);
        let answer = Box::new(move |result| sender.send(result).expect("one reply"));
        group.handle.warm_up(answer).expect("an empty inbox");
        reply.recv().expect("a reply").expect("full steps")
    };
    let found = warm_up();
    assert_eq!(found.token_budget, 33, "there is no target, so it is the greatest");
    assert!(found.step_time > Duration::ZERO);
    assert_eq!(warm_up(), found, "once is enough");
    let golden = golden::load("text", 0);
    assert_eq!(tokens(&finished(&group.submit(&golden, 32))), golden.greedy_tokens);
    let load = group.handle.load();
    assert_eq!(load.scheduler.num_free_blocks, load.scheduler.num_blocks);
}
