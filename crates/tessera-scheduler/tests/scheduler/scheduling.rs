//! What a plan holds in small situations that a reader can check by hand.

use std::sync::Arc;

use tessera_scheduler::{AddError, ApplyError, Scheduler, SchedulerConfig, SequenceRequest};
use tessera_types::{
    BlockId, Epoch, FinishReason, SamplingParams, SequenceId, SequenceSlot, StepId, StepOutput,
    StepPlan, TokenId,
};

use crate::support::{Driver, EOS, block_keys, config, prompt, request};

/// `(slot, tokens, sample)` of every scheduled sequence.
fn rows(plan: &StepPlan) -> Vec<(u32, u32, bool)> {
    plan.scheduled.iter().map(|s| (s.slot.0, s.num_tokens, s.sample)).collect()
}

fn admitted(plan: &StepPlan) -> Vec<u64> {
    plan.admitted.iter().map(|a| a.sequence.0).collect()
}

#[test]
fn a_long_prompt_is_cut_by_the_budget() {
    let mut driver = Driver::new(config(), 16);
    driver.add(request(1, prompt(1, 20, &[]), 3)).expect("accepted");
    let plans: Vec<_> = std::iter::from_fn(|| driver.turn()).collect();
    let all: Vec<_> = plans.iter().map(rows).collect();
    assert_eq!(all[..3], [[(0, 8, false)], [(0, 8, false)], [(0, 4, true)]]);
    assert_eq!(all[3..5], [[(0, 1, true)], [(0, 1, true)]]);
    assert_eq!(plans[0].zero_blocks, [BlockId(0), BlockId(1)]);
    assert_eq!(plans[5].released, [SequenceSlot(0)], "the last plan holds the release alone");
    driver.check_end();
}

#[test]
fn a_long_prompt_does_not_delay_those_in_decode() {
    let mut driver = Driver::new(config(), 32);
    // Older, but held back until the others decode.
    driver.add(request(1, prompt(1, 40, &[]), 2)).expect("accepted");
    driver.scheduler.set_held(SequenceId(1), true);
    for id in [2, 3] {
        driver.add(request(id, prompt(id as u32, 4, &[]), 20)).expect("accepted");
    }
    driver.turn();
    driver.scheduler.set_held(SequenceId(1), false);
    for _ in 0..6 {
        let plan = driver.turn().expect("work");
        let decoding = plan.scheduled.iter().filter(|s| s.slot.0 < 2);
        assert_eq!(decoding.map(|s| s.num_tokens).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(plan.num_tokens(), 8, "the prompt takes the rest of the budget");
    }
    driver.run();
    driver.check_end();
}

#[test]
fn higher_priority_goes_first_and_then_earlier_arrival() {
    let mut driver = Driver::new(SchedulerConfig { max_running: 1, ..config() }, 16);
    for (id, priority, arrival) in [(1, 0, 30), (2, 0, 10), (3, 5, 40), (4, 0, 20)] {
        let mut request = request(id, prompt(1, 4, &[]), 1);
        (request.priority, request.arrival) = (priority, arrival);
        driver.add(request).expect("accepted");
    }
    let mut order = Vec::new();
    while let Some(plan) = driver.turn() {
        order.extend(admitted(&plan));
    }
    assert_eq!(order, [3, 2, 4, 1]);
}

#[test]
fn text_before_a_missing_embedding_is_computed_and_nothing_after_it() {
    let mut driver = Driver::new(config(), 16);
    driver.add(request(1, prompt(1, 14, &[(3, 4), (9, 2)]), 2)).expect("accepted");
    assert_eq!(rows(&driver.turn().expect("text")), [(0, 3, false)]);
    assert_eq!(driver.turn(), None);
    assert!(driver.media_arrives(SequenceId(1)));
    assert_eq!(rows(&driver.turn().expect("first image")), [(0, 6, false)]);
    assert_eq!(driver.turn(), None);
    assert!(driver.media_arrives(SequenceId(1)));
    assert_eq!(rows(&driver.turn().expect("the rest")), [(0, 5, true)]);
    driver.run();
    driver.check_end();
}

#[test]
fn a_media_span_is_cut_by_the_budget() {
    let mut driver = Driver::new(config(), 16);
    driver.add(request(1, prompt(1, 21, &[(2, 17)]), 1)).expect("accepted");
    driver.media_arrives(SequenceId(1));
    let all: Vec<_> = std::iter::from_fn(|| driver.turn()).map(|plan| rows(&plan)).collect();
    assert_eq!(all[..3], [[(0, 8, false)], [(0, 8, false)], [(0, 5, true)]]);
    driver.check_end();
}

#[test]
fn a_sequence_that_starts_with_a_missing_image_takes_no_slot() {
    let mut driver = Driver::new(SchedulerConfig { max_running: 1, ..config() }, 16);
    driver.add(request(1, prompt(1, 6, &[(0, 4)]), 1)).expect("accepted");
    driver.add(request(2, prompt(2, 6, &[]), 1)).expect("accepted");
    assert_eq!(admitted(&driver.turn().expect("the second")), [2]);
    driver.media_arrives(SequenceId(1));
    driver.run();
    driver.check_end();
}

#[test]
fn the_youngest_is_preempted_and_comes_back_with_its_output() {
    // Both fit at first, six blocks, but each grows to four.
    let mut driver = Driver::new(config(), 6);
    for id in [1, 2] {
        let sampling =
            SamplingParams { max_tokens: 10, ignore_eos: true, ..SamplingParams::default() };
        let mut request = request(id, prompt(id as u32, 6, &[]), 10);
        request.sampling = Arc::new(sampling);
        driver.add(request).expect("accepted");
    }
    let mut readmitted = None;
    while let Some(plan) = driver.turn() {
        let again = plan.admitted.into_iter().find(|a| !a.output.is_empty());
        readmitted = readmitted.or(again);
    }
    let readmitted = readmitted.expect("one was preempted");
    assert_eq!(readmitted.sequence, SequenceId(2));
    let tokens = &driver.seen[&SequenceId(2)].tokens;
    assert_eq!(readmitted.output[..], tokens[..readmitted.output.len()]);
    assert!(driver.scheduler.load().num_preemptions > 0);
    driver.check_end();
}

#[test]
fn an_equal_prefix_is_not_computed_again() {
    let mut driver = Driver::new(config(), 16);
    let with_keys = |id, num_tokens| {
        let prompt = prompt(1, num_tokens, &[(5, 4)]);
        let block_keys = block_keys(&prompt, 4);
        tessera_scheduler::SequenceRequest { block_keys, ..request(id, prompt, 2) }
    };
    driver.add(with_keys(1, 18)).expect("accepted");
    driver.media_arrives(SequenceId(1));
    driver.run();
    driver.add(with_keys(2, 16)).expect("accepted");
    assert!(driver.seen[&SequenceId(2)].missing.is_empty(), "the hit covers the image");
    let plan = driver.turn().expect("work");
    // Four blocks match, but one token must be left to draw from.
    assert_eq!((plan.admitted[0].num_computed_tokens, plan.num_tokens()), (12, 4));
    driver.run();
    driver.check_end();
}

#[test]
fn a_lost_prefix_asks_for_its_image_again() {
    let mut driver = Driver::new(config(), 5);
    let first = prompt(1, 13, &[(5, 4)]);
    let keys = block_keys(&first, 4);
    let mut request_1 = request(1, Arc::clone(&first), 1);
    request_1.block_keys = keys.clone();
    driver.add(request_1.clone()).expect("accepted");
    driver.media_arrives(SequenceId(1));
    driver.run();
    // Takes every block before the next one, which counts on the cache, is admitted.
    driver.add(request(2, prompt(2, 20, &[]), 1)).expect("accepted");
    driver.turn();
    let mut request_3 = request(3, first, 1);
    request_3.block_keys = keys;
    driver.add(request_3).expect("accepted");
    assert!(driver.seen[&SequenceId(3)].missing.is_empty());
    driver.run();
    assert_eq!(driver.seen[&SequenceId(3)].missing.len(), 1, "the blocks that covered it are gone");
    assert!(driver.media_arrives(SequenceId(3)));
    driver.run();
    driver.check_end();
}

#[test]
fn forced_output_is_not_reported_and_may_end_at_once() {
    let mut driver = Driver::new(config(), 16);
    let mut moved = request(1, prompt(1, 5, &[]), 6);
    let (tokens, _) = driver.expected(&moved);
    moved.output = tokens[..2].to_vec();
    driver.add(moved).expect("accepted");
    assert_eq!(driver.turn().expect("work").admitted[0].output, tokens[..2]);
    driver.run();
    let mut ended = request(2, prompt(1, 5, &[]), 6);
    ended.output = vec![7, EOS];
    driver.add(ended).expect("accepted");
    assert_eq!(driver.seen[&SequenceId(2)].finished, Some(FinishReason::EndOfSequence));
    assert_eq!(driver.turn(), None);
    driver.seen.remove(&SequenceId(2));
    driver.check_end();
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let mut driver = Driver::new(SchedulerConfig { max_waiting: 2, ..config() }, 8);
    let never = driver.add(request(1, prompt(1, 30, &[]), 20));
    assert_eq!(never, Err(AddError::NeverFits { blocks: 13, available: 8 }));
    let too_long = driver.add(request(1, prompt(1, 60, &[]), 5));
    assert!(matches!(too_long, Err(AddError::ContextExceeded { prompt_tokens: 60, .. })));
    let mut too_much = request(1, prompt(1, 4, &[]), 2);
    too_much.output = vec![1, 2, 3];
    assert!(matches!(driver.add(too_much), Err(AddError::OutputBeyondLimit { .. })));
    let empty = driver.add(request(1, prompt(1, 0, &[]), 2));
    assert!(matches!(empty, Err(AddError::Prompt(_))));
    driver.add(request(1, prompt(1, 28, &[]), 5)).expect("fits exactly");
    assert_eq!(
        driver.add(request(1, prompt(1, 4, &[]), 5)),
        Err(AddError::Duplicate { sequence: SequenceId(1) })
    );
    driver.add(request(2, prompt(1, 4, &[]), 1)).expect("accepted");
    let full = driver.add(request(3, prompt(1, 4, &[]), 1));
    assert_eq!(full, Err(AddError::QueueFull { max_waiting: 2 }));
    driver.run();
    driver.check_end();
    driver.scheduler.end_epoch();
    assert_eq!(driver.add(request(4, prompt(1, 4, &[]), 1)), Err(AddError::NoEpoch));
}

#[test]
fn the_canary_finds_room_when_all_is_taken() {
    let config = SchedulerConfig { max_running: 1, reserved_blocks: 1, ..config() };
    let mut driver = Driver::new(config, 4);
    driver.add(request(1, prompt(1, 10, &[]), 3)).expect("accepted");
    driver.turn();
    driver.turn();
    let mut canary = request(2, prompt(2, 2, &[]), 2);
    (canary.use_reserve, canary.priority) = (true, i32::MAX);
    driver.add(canary.clone()).expect("accepted");
    assert_eq!(admitted(&driver.turn().expect("work")), [2]);
    driver.run();
    driver.check_end();
    let mut large = request(3, prompt(2, 4, &[]), 2);
    large.use_reserve = true;
    assert_eq!(driver.add(large), Err(AddError::NeverFits { blocks: 2, available: 1 }));
}

#[test]
fn at_depth_two_the_step_after_the_end_is_dropped_and_its_blocks_wait() {
    let mut driver = Driver::new(SchedulerConfig { pipeline_depth: 2, ..config() }, 3);
    let mut ends = request(1, prompt(1, 4, &[]), 8);
    let (tokens, _) = driver.expected(&ends);
    // Ends with its first token, which is known only after the second was scheduled.
    let stop: TokenId = tokens[0];
    let sampling =
        SamplingParams { max_tokens: 8, stop_token_ids: vec![stop], ..SamplingParams::default() };
    ends.sampling = Arc::new(sampling);
    driver.add(ends).expect("accepted");
    driver.add(request(2, prompt(2, 8, &[]), 1)).expect("accepted");
    let first = driver.turn().expect("prefill");
    assert_eq!(admitted(&first), [1], "the second needs two of the two blocks left");
    let second = driver.turn().expect("decode of a token that is still drawn");
    assert_eq!(rows(&second)[0], (0, 1, true));
    assert_eq!(driver.seen[&SequenceId(1)].finished, Some(FinishReason::StopToken));
    driver.run();
    driver.check_end();
}

/// A request that asks for the log probabilities of its prompt, with keys.
fn scored(id: u64, num_tokens: u32, max_tokens: u32) -> SequenceRequest {
    let prompt = prompt(1, num_tokens, &[]);
    let mut request = request(id, Arc::clone(&prompt), max_tokens);
    request.block_keys = block_keys(&prompt, 4);
    let sampling = Arc::make_mut(&mut request.sampling);
    (sampling.prompt_logprobs, sampling.ignore_eos) = (Some(2), true);
    request
}

#[test]
fn prompt_logprobs_need_every_row_but_leave_blocks_behind() {
    let mut driver = Driver::new(config(), 16);
    for id in [1, 2] {
        driver.add(scored(id, 13, 2)).expect("accepted");
        let first = driver.turn().expect("work");
        assert_eq!((first.admitted[0].num_computed_tokens, first.num_tokens()), (0, 8));
        driver.run();
        assert_eq!(driver.seen[&SequenceId(id)].prompt_logprobs.len(), 12);
    }
    let mut plain = scored(3, 13, 2);
    Arc::make_mut(&mut plain.sampling).prompt_logprobs = None;
    driver.add(plain).expect("accepted");
    assert_eq!(driver.turn().expect("work").admitted[0].num_computed_tokens, 12);
    driver.run();
    driver.check_end();
}

#[test]
fn prompt_logprobs_are_reported_once_over_preemption_and_overlap() {
    for pipeline_depth in [1, 2] {
        // The first grows into blocks that the second needs for the end of its prompt.
        let mut driver = Driver::new(SchedulerConfig { pipeline_depth, ..config() }, 8);
        let mut grows = request(1, prompt(2, 6, &[]), 20);
        Arc::make_mut(&mut grows.sampling).ignore_eos = true;
        driver.add(grows).expect("accepted");
        driver.add(scored(2, 22, 3)).expect("accepted");
        let mut reported_before = None;
        while driver.scheduler.load().num_preemptions == 0 {
            driver.turn();
            reported_before = Some(driver.seen[&SequenceId(2)].prompt_logprobs.len());
        }
        assert!(reported_before.is_some_and(|reported| (1..21).contains(&reported)));
        driver.run();
        driver.check_end();
    }
}

#[test]
fn prompt_logprobs_of_other_rows_are_refused() {
    let mut driver = Driver::new(config(), 8);
    driver.add(scored(1, 6, 2)).expect("accepted");
    let plan = driver.scheduler.schedule().expect("work");
    driver.model.forward(&plan).expect("a good plan");
    let mut output = driver.model.sample(plan.step, &Default::default()).expect("forwarded");
    output.prompt_logprobs[0].tokens.pop();
    let refused = driver.scheduler.apply(output);
    assert!(matches!(refused, Err(ApplyError::WrongPromptLogprobs { .. })), "{refused:?}");
}

#[test]
fn a_foreign_output_is_refused() {
    let mut driver = Driver::new(config(), 8);
    let output = |step, tokens| StepOutput { step: StepId(step), tokens, ..StepOutput::default() };
    let stray = driver.scheduler.apply(output(1, vec![]));
    assert_eq!(stray, Err(ApplyError::UnexpectedStep { expected: None, got: StepId(1) }));
    driver.add(request(1, prompt(1, 4, &[]), 2)).expect("accepted");
    let plan = driver.scheduler.schedule().expect("work");
    let early = driver.scheduler.apply(output(2, vec![]));
    assert!(matches!(early, Err(ApplyError::UnexpectedStep { got: StepId(2), .. })));
    let short = driver.scheduler.apply(output(1, vec![]));
    assert_eq!(short, Err(ApplyError::WrongCount { step: plan.step, expected: 1, got: 0 }));
}

#[test]
fn a_new_epoch_knows_nothing_of_the_last() {
    let mut driver = Driver::new(config(), 8);
    let first = prompt(1, 12, &[]);
    let mut with_keys = request(1, Arc::clone(&first), 4);
    with_keys.block_keys = block_keys(&first, 4);
    driver.add(with_keys.clone()).expect("accepted");
    driver.turn();
    driver.turn();
    let mut scheduler: Scheduler = driver.scheduler;
    assert_eq!(scheduler.end_epoch(), [SequenceId(1)]);
    assert_eq!(scheduler.schedule(), None);
    scheduler.begin_epoch(Epoch(4), 8);
    scheduler.add(with_keys).expect("accepted");
    let plan = scheduler.schedule().expect("work");
    assert_eq!(
        (plan.epoch, plan.step, plan.admitted[0].num_computed_tokens),
        (Epoch(4), StepId(1), 0)
    );
}
