//! Whole clusters on a GPU: greedy tokens equal the golden ones, for text, images and videos given as frames, over both
//! faces. `tests/gpu/run.sh` runs them where there is a GPU; they also pass, slowly, on an emulated one.

use serde_json::json;
use tessera_tests::chat;
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::{CASES, Golden};

fn check(options: &UpOptions, model: &str, cases: &[&str]) {
    let cluster = Cluster::up(options);
    for case in cases {
        let golden = Golden::load(model, case);
        let answer = cluster.grpc().answer(chat::golden(&golden)).expect("is answered");
        assert_eq!(answer.choice().token_ids, golden.greedy_tokens, "{case} over gRPC");
        let answer = cluster.http().chat(&golden.http_body()).ok();
        let choice = &answer["choices"][0];
        assert_eq!(chat::ids(choice, "token_ids"), golden.greedy_tokens, "{case} over HTTP");
    }
}

#[test]
fn one_rank_gives_the_golden_tokens() {
    let options = UpOptions { device: "cuda-f32:0", ..UpOptions::new("tiny", 1) };
    check(&options, "tiny", &CASES);
}

/// Three choices decode together, in captured steps that are rounded up to four sequences.
#[test]
fn choices_beside_each_other_give_the_golden_tokens() {
    let options = UpOptions { device: "cuda-f32:0", ..UpOptions::new("tiny", 1) };
    let cluster = Cluster::up(&options);
    let golden = Golden::load("tiny", "text");
    let answer = cluster.http().chat(&chat::with(golden.http_body(), json!({"n": 3}))).ok();
    let choices = answer["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 3, "{answer}");
    for choice in choices {
        assert_eq!(chat::ids(choice, "token_ids"), golden.greedy_tokens);
    }
}

#[test]
fn two_ranks_on_one_gpu_give_the_golden_tokens() {
    let options = UpOptions {
        device: "cuda-f32:0,0",
        ranks_per_process: 2,
        ..UpOptions::new("tiny-nested", 2)
    };
    check(&options, "tiny-nested", &["text", "images", "video"]);
}

/// Two processes, each with its own context on the GPU.
#[test]
fn two_processes_on_one_gpu_give_the_golden_tokens() {
    let options = UpOptions { device: "cuda-f32:0", ..UpOptions::new("tiny", 2) };
    check(&options, "tiny", &["multi_turn"]);
}

/// Margins of this case are wide enough for BF16.
#[test]
fn bf16_gives_the_golden_tokens_where_margins_are_wide() {
    let options = UpOptions { device: "cuda:0", ..UpOptions::new("tiny", 1) };
    check(&options, "tiny", &["multi_turn"]);
}
