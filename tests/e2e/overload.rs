//! Promise 6: what is full says so, with a hint when to come back, and takes requests again later.

use tessera_tests::chat::{self, text_body};
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::Golden;
use tessera_tests::{grpc, wait};
use tonic::Code;

#[test]
fn a_full_router_refuses_with_a_hint() {
    let more = ["--set", "router.limits.max_running_requests=1"].map(Into::into).into_iter();
    let more = more.chain(["--set", "router.limits.max_waiting_requests=0"].map(Into::into));
    let options = UpOptions { more: more.collect(), ..UpOptions::new("tiny", 1) };
    let cluster = Cluster::up(&options);
    let mut running = cluster.http().chat_stream(&text_body("Hello", 4000));
    assert_eq!(running.by_ref().take(3).count(), 3);

    let refused = cluster.http().chat(&text_body("Hello", 1));
    assert_eq!(refused.status, 429, "{refused}");
    let error = &refused.json()["error"];
    assert_eq!(error["type"], "rate_limit_error", "{refused}");
    assert_eq!(error["code"], "rate_limit_exceeded", "{refused}");
    let seconds = refused.headers.get("retry-after").and_then(|text| text.parse::<u32>().ok());
    assert!(seconds.is_some_and(|seconds| seconds > 0), "{refused}");

    let golden = Golden::load("tiny", "text");
    let status = cluster.grpc().answer(chat::golden(&golden)).expect_err("is refused");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let detail = grpc::detail(&status);
    assert!(detail.retryable && detail.retry_after_ms > 0, "{detail:?}");

    drop(running);
    let answer = wait::for_value("there is room again", || {
        cluster.grpc().answer(chat::golden(&golden)).ok()
    });
    assert_eq!(answer.choice().token_ids, golden.greedy_tokens);
}

#[test]
fn sequences_that_do_not_fit_together_take_turns() {
    // Room for one sequence of this length, so the others wait or are preempted.
    let more = ["--set", "decoder.kv_cache_bytes=400000"].map(Into::into).to_vec();
    let cluster = Cluster::up(&UpOptions { more, ..UpOptions::new("tiny", 1) });
    let goldens = ["text", "images", "video", "multi_turn"].map(|case| Golden::load("tiny", case));
    let answers: Vec<_> = std::thread::scope(|scope| {
        let ask = |golden| {
            let grpc = cluster.grpc();
            scope.spawn(move || grpc.answer(chat::golden(golden)).expect("is answered"))
        };
        let running: Vec<_> = goldens.iter().map(ask).collect();
        running.into_iter().map(|client| client.join().expect("a client")).collect()
    });
    for (golden, answer) in goldens.iter().zip(&answers) {
        assert_eq!(answer.choice().token_ids, golden.greedy_tokens, "{}", golden.case);
    }
}
