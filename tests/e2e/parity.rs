//! Promise 1: greedy tokens equal the reference exactly, whatever the tensor-parallel degree, the number
//! of processes, the checkpoint's form and the face.

use tessera_proto::common::v1::FinishReason;
use tessera_tests::cluster::{Cluster, Endpoints, UpOptions};
use tessera_tests::golden::{CASES, Golden};
use tessera_tests::{chat, golden, shared};

/// Logarithms of probabilities may differ by the rounding of logits (5e-5 of their range) and of sums.
const LOGPROB_TOLERANCE: f32 = 5e-3;

fn check_http(endpoints: &Endpoints, golden: &Golden) {
    let answer = endpoints.http().chat(&golden.http_body()).ok();
    let choice = &answer["choices"][0];
    assert_eq!(chat::ids(&answer, "prompt_token_ids"), golden.prompt_ids, "{}", golden.case);
    assert_eq!(chat::ids(choice, "token_ids"), golden.greedy_tokens, "{}", golden.case);
    assert_eq!(choice["message"]["content"], golden.greedy_text, "{}", golden.case);
    assert_eq!(choice["finish_reason"], "length", "{}", golden.case);
}

fn check_grpc(endpoints: &Endpoints, golden: &Golden) {
    let answer = endpoints.grpc().answer(chat::golden(golden)).expect("is answered");
    let choice = answer.choice();
    assert_eq!(answer.prompt().token_ids, golden.prompt_ids, "{}", golden.case);
    assert_eq!(choice.token_ids, golden.greedy_tokens, "{}", golden.case);
    assert_eq!(choice.text, golden.greedy_text, "{}", golden.case);
    assert_eq!(choice.reason, FinishReason::Length, "{}", golden.case);
}

fn check_cluster(options: &UpOptions, model: &str, cases: &[&str]) {
    let cluster = Cluster::up(options);
    for case in cases {
        check_grpc(&cluster.endpoints, &Golden::load(model, case));
    }
    check_http(&cluster.endpoints, &Golden::load(model, cases[0]));
}

#[test]
fn greedy_tokens_equal_the_reference_over_http() {
    let cluster = shared::tp2();
    for case in CASES {
        check_http(&cluster.endpoints, &Golden::load("tiny", case));
    }
}

#[test]
fn greedy_tokens_equal_the_reference_over_grpc() {
    let cluster = shared::tp2();
    for case in CASES {
        check_grpc(&cluster.endpoints, &Golden::load("tiny", case));
    }
}

#[test]
fn four_ranks_in_four_processes_agree() {
    check_cluster(&UpOptions::new("tiny", 4), "tiny", &["images", "multi_turn"]);
}

#[test]
fn eight_ranks_in_two_processes_agree() {
    let options = UpOptions { ranks_per_process: 4, ..UpOptions::new("tiny", 8) };
    check_cluster(&options, "tiny", &["images", "multi_turn"]);
}

/// The reference backend is held to the same tokens as the SIMD kernels with F32 weights; with BF16 weights,
/// where every margin is wide.
#[test]
fn the_other_devices_agree() {
    for (device, cases) in [("reference", &["images", "text"][..]), ("cpu", &["multi_turn"])] {
        check_cluster(&UpOptions { device, ..UpOptions::new("tiny", 2) }, "tiny", cases);
    }
}

/// Seven query heads per KV head on four ranks: one rank has a zero head. Sharded F32 weights, nested
/// configuration, tied head.
#[test]
fn eight_ranks_agree_on_padded_heads() {
    let options = UpOptions { ranks_per_process: 4, ..UpOptions::new("tiny-nested", 8) };
    check_cluster(&options, "tiny-nested", &CASES);
}

#[test]
fn log_probabilities_equal_the_reference() {
    let golden = Golden::load("tiny", "text");
    let mut request = chat::golden(&golden);
    request.sampling.as_mut().expect("set").logprobs = Some(5);
    let answer = shared::tp2().grpc().answer(request).expect("is answered");
    let positions = &answer.choice().logprobs;
    assert_eq!(positions.len(), golden.greedy_tokens.len());
    // Rows of the vocabulary without a token take no part in the distribution.
    let num_tokens = golden::num_tokens_of("tiny");
    let steps = golden.logits_steps();
    for ((position, logits), &token) in positions.iter().zip(&steps).zip(&golden.greedy_tokens) {
        let expected = log_softmax(&logits[..num_tokens]);
        let is_close = |id: u32, logprob: f32| {
            let difference = (logprob - expected[id as usize]).abs();
            assert!(
                difference <= LOGPROB_TOLERANCE,
                "token {id}: {logprob} differs by {difference}"
            );
        };
        is_close(token, position.logprob);
        assert_eq!(position.top.len(), 5);
        assert_eq!(position.top[0].token_id, token, "the greedy token is the most likely one");
        assert_eq!(position.top[0].logprob, position.logprob);
        assert!(position.top.is_sorted_by(|a, b| a.logprob >= b.logprob), "{position:?}");
        position.top.iter().for_each(|entry| is_close(entry.token_id, entry.logprob));
        let sum: f32 = position.top.iter().map(|entry| entry.logprob.exp()).sum();
        assert!(sum <= 1.0 + LOGPROB_TOLERANCE, "probabilities sum to {sum}");
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let log_sum = max + sum.ln() as f32;
    logits.iter().map(|&logit| logit - log_sum).collect()
}
