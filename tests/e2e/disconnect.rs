//! A client that leaves stops its sequence: nothing is computed for nobody.

use std::sync::Mutex;

use serde_json::json;
use tessera_tests::chat::{self, text_body, with};
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::{CASES, Golden};
use tessera_tests::shared::{self, Exclusive};
use tessera_tests::{grpc, wait};

/// Far more steps than pass between a client's leaving and its sequence's end.
const MAX_TOKENS: u32 = 4000;

/// One rank, one test at a time: counters then belong to the test's own requests.
fn quiet() -> Exclusive {
    static SLOT: Mutex<Option<Cluster>> = Mutex::new(None);
    shared::exclusive(&SLOT, &UpOptions::new("tiny", 1))
}

/// Sequences that the leader itself counts now; the router's view of them is a little old.
fn running(cluster: &Cluster) -> u32 {
    let load =
        grpc::leader_health(&cluster.grpc().group()).load.expect("a leader reports its load");
    load.running + load.waiting
}

fn steps(cluster: &Cluster) -> u64 {
    grpc::leader_health(&cluster.grpc().group()).steps
}

/// Starts a long answer, lets `leave` read some of it and go, and asserts that the sequence ended long
/// before its last token.
fn assert_stops(cluster: &Cluster, leave: impl FnOnce(&Cluster)) {
    wait::until("nothing runs", || running(cluster) == 0);
    let before = steps(cluster);
    leave(cluster);
    wait::until("the sequence has ended", || running(cluster) == 0);
    let spent = steps(cluster) - before;
    assert!(spent > 0, "the request ran");
    assert!(spent < u64::from(MAX_TOKENS), "all {MAX_TOKENS} tokens were computed ({spent} steps)");
}

#[test]
fn one_rank_agrees_with_the_reference() {
    let cluster = quiet();
    for case in CASES {
        let golden = Golden::load("tiny", case);
        let answer = cluster.grpc().answer(chat::golden(&golden)).expect("is answered");
        assert_eq!(answer.choice().token_ids, golden.greedy_tokens, "{case}");
    }
}

#[test]
fn a_stream_that_is_dropped_stops() {
    assert_stops(&quiet(), |cluster| {
        let mut events = cluster.http().chat_stream(&text_body("Hello", MAX_TOKENS));
        assert_eq!(events.by_ref().take(5).count(), 5);
    });
}

#[test]
fn a_grpc_stream_that_is_dropped_stops() {
    assert_stops(&quiet(), |cluster| {
        let prompt = chat::user(vec![chat::text("Hello")]);
        let request = chat::request(prompt, chat::greedy(MAX_TOKENS));
        let mut events = cluster.grpc().generate(request).expect("is answered");
        assert!(events.by_ref().take(5).all(|event| event.is_ok()));
    });
}

#[test]
fn all_choices_of_a_client_that_leaves_stop() {
    assert_stops(&quiet(), |cluster| {
        let body = with(text_body("Hello", MAX_TOKENS), json!({"n": 3, "temperature": 1}));
        let mut events = cluster.http().chat_stream(&body);
        assert_eq!(events.by_ref().take(9).count(), 9);
        wait::until("all choices run", || running(cluster) >= 3);
    });
}

#[test]
fn a_whole_answer_that_nobody_waits_for_stops() {
    assert_stops(&quiet(), |cluster| {
        let address = cluster.endpoints.http;
        let body = text_body("Hello", MAX_TOKENS).to_string();
        let mut stream = std::net::TcpStream::connect(address).expect("connects");
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        std::io::Write::write_all(&mut stream, format!("{head}{body}").as_bytes()).expect("sent");
        grpc::wait_busy_group(&cluster.grpc());
    });
}
