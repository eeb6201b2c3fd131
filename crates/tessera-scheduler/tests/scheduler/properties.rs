//! Random histories. Whatever happens, the budget holds, no block leaks or is used twice, every sequence
//! ends, and each has exactly the tokens that it would have alone.

use std::sync::Arc;

use proptest::prelude::*;
use tessera_scheduler::{AddError, SchedulerConfig, SequenceRequest};
use tessera_types::{SamplingParams, SequenceId};

use crate::support::{Driver, block_keys, prompt, request};

#[derive(Debug, Clone)]
enum Operation {
    Add { family: u32, num_tokens: u32, max_tokens: u32, priority: i32, forced: usize, edit: u32 },
    Abort { index: usize },
    MediaArrives { index: usize },
    Turn,
}

fn operation() -> impl Strategy<Value = Operation> {
    let add = (0..4u32, 1..40u32, 1..24u32, 0..2i32, 0..4usize, 0..5u32).prop_map(
        |(family, num_tokens, max_tokens, priority, forced, edit)| Operation::Add {
            family,
            num_tokens,
            max_tokens,
            priority,
            forced,
            edit,
        },
    );
    prop_oneof![
        4 => add,
        1 => (0..64usize).prop_map(|index| Operation::Abort { index }),
        4 => (0..64usize).prop_map(|index| Operation::MediaArrives { index }),
        12 => Just(Operation::Turn),
    ]
}

fn limits() -> impl Strategy<Value = (SchedulerConfig, u32)> {
    (1..6u32, 1..6u32, 0..12u32, 10..40u32, 0..2u32).prop_map(
        |(block_size, max_running, extra_budget, num_blocks, reserved_blocks)| {
            let config = SchedulerConfig {
                block_size,
                max_running,
                max_waiting: 8,
                max_waiting_per_tenant: 6,
                max_tokens_per_step: max_running + reserved_blocks + extra_budget,
                max_model_len: 64,
                pipeline_depth: 1,
                reserved_blocks,
            };
            (config, num_blocks)
        },
    )
}

fn new_request(driver: &Driver, operation: &Operation, id: u64) -> Option<SequenceRequest> {
    let &Operation::Add { family, num_tokens, max_tokens, priority, forced, edit } = operation
    else {
        return None;
    };
    // Families 2 and 3 have images, one of them at the very beginning.
    let media: &[(u32, u32)] = match family {
        2 => &[(2, 5), (9, 1), (14, 7)],
        3 => &[(0, 3), (6, 12)],
        _ => &[],
    };
    let prompt = prompt(family, num_tokens, media);
    let mut request = request(id, Arc::clone(&prompt), max_tokens);
    request.priority = priority;
    // Equal seeds let equal prompts compare too; keys are left out for some.
    request.seed = u64::from(family);
    if edit != 0 {
        request.block_keys = block_keys(&prompt, driver.scheduler.config().block_size);
    }
    if edit == 1 {
        request.sampling = Arc::new(SamplingParams {
            max_tokens,
            min_tokens: max_tokens / 2,
            stop_token_ids: vec![1, 2, 3, 4, 5],
            ..SamplingParams::default()
        });
    }
    if edit == 4 {
        Arc::make_mut(&mut request.sampling).prompt_logprobs = Some(family);
    }
    if edit == 3 {
        // Refused where it exceeds the reserve, or where there is none.
        (request.use_reserve, request.priority) = (true, i32::MAX);
    }
    // A moved request brings the beginning of its own output.
    let (tokens, _) = driver.expected(&request);
    request.output = tokens[..forced.min(tokens.len() - 1)].to_vec();
    Some(request)
}

fn run(config: SchedulerConfig, num_blocks: u32, operations: &[Operation]) -> Driver {
    let mut driver = Driver::new(config, num_blocks);
    for operation in operations {
        let known: Vec<SequenceId> = driver.seen.keys().copied().collect();
        match *operation {
            Operation::Add { .. } => {
                let id = known.last().map_or(1, |last| last.0 + 1);
                let request = new_request(&driver, operation, id).expect("an addition");
                match driver.add(request) {
                    Ok(())
                    | Err(
                        AddError::QueueFull { .. }
                        | AddError::TenantQueueFull { .. }
                        | AddError::NeverFits { .. },
                    ) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Operation::Abort { index } if !known.is_empty() => {
                driver.abort(known[index % known.len()])
            }
            Operation::MediaArrives { index } if !known.is_empty() => {
                driver.media_arrives(known[index % known.len()]);
            }
            Operation::Abort { .. } | Operation::MediaArrives { .. } => {}
            Operation::Turn => {
                driver.turn();
            }
        }
    }
    // All media arrives in the end, in any number of rounds: a lost prefix asks again.
    loop {
        driver.run();
        let known: Vec<SequenceId> = driver.seen.keys().copied().collect();
        let arrived = known.into_iter().filter(|&id| driver.media_arrives(id)).count();
        if arrived == 0 {
            return driver;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_gives_the_tokens_of_an_undisturbed_run(
        (config, num_blocks) in limits(),
        operations in proptest::collection::vec(operation(), 1..120),
    ) {
        for pipeline_depth in [1, 2] {
            let config = SchedulerConfig { pipeline_depth, ..config.clone() };
            run(config, num_blocks, &operations).check_end();
        }
    }
}

/// The property above is worth something only if its histories reach the hard cases.
#[test]
fn random_histories_reach_preemption_and_prefix_hits() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = (limits(), proptest::collection::vec(operation(), 1..120));
    let (mut preemptions, mut hits) = (0, 0);
    for _ in 0..100 {
        let tree = strategy.new_tree(&mut runner).expect("a history");
        let ((config, num_blocks), operations) = tree.current();
        let config = SchedulerConfig { pipeline_depth: 2, ..config };
        let driver = run(config, num_blocks, &operations);
        preemptions += driver.scheduler.load().num_preemptions;
        hits += driver.num_hits;
    }
    assert!(preemptions > 20 && hits > 50, "{preemptions} preemptions, {hits} prefix hits");
}
