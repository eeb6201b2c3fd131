//! Prompts that several sequences have in common.

use std::sync::Arc;

use tessera_scheduler::{SchedulerConfig, SequenceRequest};
use tessera_types::{Prompt, SequenceId};

use crate::support::{Driver, block_keys, config, prompt, request};

/// A choice of a request with this prompt.
fn choice(id: u64, prompt: &Arc<Prompt>) -> SequenceRequest {
    let block_keys = block_keys(prompt, 4);
    let mut request = request(id, Arc::clone(prompt), 3);
    Arc::make_mut(&mut request.sampling).ignore_eos = true;
    SequenceRequest { block_keys, arrival: 0, ..request }
}

#[test]
fn choices_share_the_full_blocks_of_their_prompt_in_the_first_step() {
    let limits = SchedulerConfig { max_tokens_per_step: 32, ..config() };
    let mut driver = Driver::new(limits, 16);
    let prompt = prompt(1, 18, &[]);
    for id in 1..=4 {
        driver.add(choice(id, &prompt)).expect("accepted");
    }
    let plan = driver.turn().expect("work");
    let tokens: Vec<_> = plan.scheduled.iter().map(|s| (s.num_tokens, s.sample)).collect();
    assert_eq!(tokens, [(18, true), (2, true), (2, true), (2, true)]);
    for other in &plan.admitted[1..] {
        assert_eq!((other.num_computed_tokens, other.block_table.len()), (16, 4));
    }
    let counters = driver.scheduler.counters();
    assert_eq!((counters.num_queried_tokens, counters.num_hit_tokens), (4 * 18, 3 * 16));
    driver.run();
    driver.check_end();
}

#[test]
fn a_prompt_of_several_steps_is_computed_once() {
    for pipeline_depth in [1, 2] {
        let mut driver = Driver::new(SchedulerConfig { pipeline_depth, ..config() }, 32);
        let prompt = prompt(1, 41, &[]);
        for id in 1..=3 {
            driver.add(choice(id, &prompt)).expect("accepted");
        }
        driver.run();
        // Ten full blocks once, the last token and two of three outputs thrice; at depth 2 also what is
        // scheduled before the last token is known, which output limits rule out here.
        assert_eq!(driver.num_tokens, 40 + 3 * (1 + 2));
        driver.check_end();
    }
}

#[test]
fn a_more_urgent_sequence_has_the_shared_prompt_computed_in_its_own_turn() {
    let mut driver = Driver::new(SchedulerConfig { max_running: 3, ..config() }, 64);
    let (shared, other) = (prompt(1, 33, &[]), prompt(2, 60, &[]));
    driver.add(choice(1, &shared)).expect("accepted");
    driver.turn();
    // Between them stands a prompt that would take the budget of many steps.
    let mut between = request(2, other, 1);
    between.priority = 1;
    driver.add(between).expect("accepted");
    let mut urgent = choice(3, &shared);
    urgent.priority = 2;
    driver.add(urgent).expect("accepted");
    let mut order = Vec::new();
    while let Some(plan) = driver.turn() {
        order.extend(plan.admitted.iter().map(|a| (a.sequence.0, a.num_computed_tokens)));
    }
    assert_eq!(order, [(3, 32), (2, 0)]);
    driver.check_end();
}

#[test]
fn the_others_go_on_when_the_one_that_computes_ends() {
    let mut driver = Driver::new(config(), 32);
    let prompt = prompt(1, 30, &[]);
    for id in 1..=3 {
        driver.add(choice(id, &prompt)).expect("accepted");
    }
    driver.turn();
    driver.abort(SequenceId(1));
    let plan = driver.turn().expect("the second goes on");
    assert_eq!(
        (plan.admitted[0].sequence, plan.admitted[0].num_computed_tokens),
        (SequenceId(2), 8)
    );
    driver.run();
    driver.check_end();
}

#[test]
fn choices_ask_for_an_image_once() {
    // The image is at the very beginning, so the first choice cannot start without it.
    let mut driver = Driver::new(config(), 32);
    let prompt = prompt(1, 22, &[(0, 9)]);
    let missing = |driver: &Driver| {
        let missing = driver.seen.values().map(|seen| seen.missing.len());
        missing.collect::<Vec<_>>()
    };
    for id in 1..=3 {
        driver.add(choice(id, &prompt)).expect("accepted");
    }
    driver.run();
    assert_eq!(missing(&driver), [1, 0, 0]);
    // Only the one that asked hears of it; the others are covered by what it computes.
    assert!(driver.media_arrives(SequenceId(1)));
    driver.run();
    assert_eq!(missing(&driver), [0, 0, 0]);
    driver.check_end();
}

#[test]
fn the_next_choice_asks_when_the_first_one_ends() {
    let mut driver = Driver::new(config(), 32);
    let prompt = prompt(1, 22, &[(6, 9)]);
    for id in 1..=2 {
        driver.add(choice(id, &prompt)).expect("accepted");
    }
    driver.run();
    assert!(driver.seen[&SequenceId(2)].missing.is_empty());
    driver.abort(SequenceId(1));
    assert_eq!(driver.seen[&SequenceId(2)].missing.len(), 1);
    driver.media_arrives(SequenceId(2));
    driver.run();
    driver.check_end();
}

#[test]
fn a_sequence_with_its_image_passes_one_without() {
    let mut driver = Driver::new(config(), 32);
    let prompt = prompt(1, 22, &[(6, 9)]);
    driver.add(choice(1, &prompt)).expect("accepted");
    driver.run();
    driver.add(choice(2, &prompt)).expect("accepted");
    driver.media_arrives_for_all(SequenceId(1));
    driver.scheduler.set_held(SequenceId(1), true);
    driver.run();
    driver.check_end();
}
