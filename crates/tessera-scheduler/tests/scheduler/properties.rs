//! Random histories. Whatever happens, the budget holds, no block leaks or is used twice, every sequence
//! ends, and each has exactly the tokens that it would have alone.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngSeed, TestRunner};
use tessera_scheduler::{AddError, SchedulerConfig, SequenceRequest};
use tessera_types::{SamplingParams, SequenceId, TenantId};

use crate::support::{Driver, block_keys, prompt, request};

/// Histories of each of the two tests, which run side by side.
const NUM_HISTORIES: u32 = 50_000;

#[derive(Debug, Clone)]
enum Operation {
    /// `copies` choices of one request.
    Add {
        copies: u64,
        family: u32,
        num_tokens: u32,
        max_tokens: u32,
        priority: i32,
        tenant: u64,
        forced: usize,
        edit: u32,
    },
    Abort {
        index: usize,
    },
    Hold {
        index: usize,
        held: bool,
    },
    MediaArrives {
        index: usize,
        for_all: bool,
    },
    SetBudget {
        num_tokens: u32,
    },
    NewEpoch {
        num_blocks: u32,
    },
    Turn,
}

fn operation() -> impl Strategy<Value = Operation> {
    let add = (1..4u64, 0..4u32, 1..32u32, 1..12u32, 0..2i32, 0..3u64, 0..4usize, 0..6u32)
        .prop_map(|(copies, family, num_tokens, max_tokens, priority, tenant, forced, edit)| {
            let copies = if edit < 3 { 1 } else { copies };
            Operation::Add {
                copies,
                family,
                num_tokens,
                max_tokens,
                priority,
                tenant,
                forced,
                edit,
            }
        });
    prop_oneof![
        8 => add,
        2 => (0..64usize).prop_map(|index| Operation::Abort { index }),
        2 => (0..64usize, any::<bool>()).prop_map(|(index, held)| Operation::Hold { index, held }),
        8 => (0..64usize, any::<bool>())
            .prop_map(|(index, for_all)| Operation::MediaArrives { index, for_all }),
        2 => (0..24u32).prop_map(|num_tokens| Operation::SetBudget { num_tokens }),
        1 => (10..32u32).prop_map(|num_blocks| Operation::NewEpoch { num_blocks }),
        24 => Just(Operation::Turn),
    ]
}

fn limits() -> impl Strategy<Value = (SchedulerConfig, u32)> {
    (1..6u32, 1..6u32, 0..12u32, 10..40u32, 0..2u32, 1..3u32).prop_map(
        |(block_size, max_running, extra_budget, num_blocks, reserved_blocks, pipeline_depth)| {
            let config = SchedulerConfig {
                block_size,
                max_running,
                max_waiting: 8,
                max_waiting_per_tenant: 5,
                max_tokens_per_step: max_running + reserved_blocks + extra_budget,
                max_model_len: 48,
                pipeline_depth,
                reserved_blocks,
            };
            (config, num_blocks)
        },
    )
}

fn history() -> impl Strategy<Value = ((SchedulerConfig, u32), Vec<Operation>)> {
    (limits(), proptest::collection::vec(operation(), 1..60))
}

fn new_request(driver: &Driver, operation: &Operation, id: u64) -> SequenceRequest {
    let &Operation::Add { family, num_tokens, max_tokens, priority, tenant, forced, edit, .. } =
        operation
    else {
        unreachable!("an addition")
    };
    // Families 2 and 3 have images, one of them at the very beginning.
    let media: &[(u32, u32)] = match family {
        2 => &[(2, 5), (9, 1), (14, 7)],
        3 => &[(0, 3), (6, 12)],
        _ => &[],
    };
    let prompt = prompt(family, num_tokens, media);
    let mut request = request(id, Arc::clone(&prompt), max_tokens);
    (request.priority, request.tenant) = (priority, TenantId(tenant));
    // Equal seeds let equal prompts compare too; keys are left out for some.
    request.seed = u64::from(family);
    if edit != 0 {
        request.block_keys = block_keys(&prompt, driver.scheduler.config().block_size);
    }
    match edit {
        1 => {
            request.sampling = Arc::new(SamplingParams {
                max_tokens,
                min_tokens: max_tokens / 2,
                stop_token_ids: vec![1, 2, 3, 4, 5],
                ..SamplingParams::default()
            });
        }
        // Refused where it exceeds the reserve, or where there is none.
        2 => (request.use_reserve, request.priority) = (true, i32::MAX),
        3 => Arc::make_mut(&mut request.sampling).prompt_logprobs = Some(family),
        _ => {}
    }
    // A moved request brings the beginning of its own output.
    if forced > 0 {
        let (tokens, _) = driver.expected(&request);
        request.output = tokens[..forced.min(tokens.len() - 1)].to_vec();
    }
    request
}

fn apply(driver: &mut Driver, operation: &Operation) {
    let num_known = driver.seen.len();
    // Sequences are numbered from 1 without gaps.
    let known = |index: usize| SequenceId((index % num_known) as u64 + 1);
    match *operation {
        Operation::Add { copies, .. } => {
            let mut request = new_request(driver, operation, num_known as u64 + 1);
            for _ in 0..copies {
                request.sequence = SequenceId(driver.seen.len() as u64 + 1);
                match driver.add(request.clone()) {
                    Ok(()) => {}
                    Err(
                        AddError::QueueFull { .. }
                        | AddError::TenantQueueFull { .. }
                        | AddError::NeverFits { .. },
                    ) => return,
                    Err(error) => panic!("{error}"),
                }
                request.seed += 1;
                request.output.clear();
            }
        }
        Operation::SetBudget { num_tokens } => {
            driver.scheduler.set_token_budget(num_tokens);
        }
        Operation::NewEpoch { num_blocks } => driver.new_epoch(num_blocks),
        Operation::Turn => {
            driver.turn();
        }
        Operation::Abort { .. } | Operation::Hold { .. } | Operation::MediaArrives { .. }
            if num_known == 0 => {}
        Operation::Abort { index } => driver.abort(known(index)),
        Operation::Hold { index, held } => driver.scheduler.set_held(known(index), held),
        Operation::MediaArrives { index, for_all: true } => {
            driver.media_arrives_for_all(known(index));
        }
        Operation::MediaArrives { index, for_all: false } => {
            driver.media_arrives(known(index));
        }
    }
}

fn run(config: SchedulerConfig, num_blocks: u32, operations: &[Operation]) -> Driver {
    let mut driver = Driver::new(config, num_blocks);
    operations.iter().for_each(|operation| apply(&mut driver, operation));
    let known: Vec<SequenceId> = driver.seen.keys().copied().collect();
    known.iter().for_each(|&id| driver.scheduler.set_held(id, false));
    // All media arrives in the end, in any number of rounds: a lost prefix asks again.
    loop {
        driver.run();
        let arrived = known.iter().filter(|&&id| driver.media_arrives(id)).count();
        if arrived == 0 {
            return driver;
        }
    }
}

fn check_histories(seed: u64) {
    let config = ProptestConfig {
        cases: NUM_HISTORIES,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed),
        ..ProptestConfig::default()
    };
    let outcome = TestRunner::new(config).run(&history(), |((config, num_blocks), operations)| {
        run(config, num_blocks, &operations).check_end();
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

#[test]
fn any_history_gives_the_tokens_of_an_undisturbed_run_first_half() {
    check_histories(1);
}

#[test]
fn any_history_gives_the_tokens_of_an_undisturbed_run_second_half() {
    check_histories(2);
}

/// The property above is worth something only if its histories reach the hard cases.
#[test]
fn random_histories_reach_the_hard_cases() {
    let mut runner = TestRunner::deterministic();
    let (mut preemptions, mut hits, mut evicted, mut moved, mut scored) = (0, 0, 0, 0, 0);
    for _ in 0..500 {
        let tree = history().new_tree(&mut runner).expect("a history");
        let ((config, num_blocks), operations) = tree.current();
        let driver = run(config, num_blocks, &operations);
        let counters = driver.scheduler.counters();
        preemptions += counters.num_preemptions;
        hits += driver.num_hits;
        evicted += counters.num_evicted_blocks;
        moved += driver.seen.values().filter(|seen| seen.num_moved > 0).count();
        scored += driver.seen.values().filter(|seen| seen.prompt_logprobs.len() > 8).count();
    }
    let reached = format!("{preemptions} {hits} {evicted} {moved} {scored}");
    assert!(preemptions > 40 && hits > 200 && evicted > 200, "{reached}");
    assert!(moved > 20 && scored > 50, "{reached}");
}
