//! The result of a request does not depend on its neighbours.

use std::collections::BTreeMap;

use tessera_proto::inference::v1::GenerateRequest;
use tessera_tests::chat;
use tessera_tests::golden::{CASES, Golden};
use tessera_tests::grpc::Client;
use tessera_tests::shared;

fn tokens(grpc: &Client, request: &GenerateRequest) -> BTreeMap<u32, Vec<u32>> {
    let answer = grpc.answer(request.clone()).expect("is answered");
    answer.choices.into_iter().map(|(index, choice)| (index, choice.token_ids)).collect()
}

/// Golden requests, drawn ones, several choices, short and long ones.
fn mixed_requests() -> Vec<GenerateRequest> {
    let golden = CASES.map(|case| chat::golden(&Golden::load("tiny", case)));
    let drawn = (0..6).map(|seed| {
        let case = Golden::load("tiny", CASES[seed as usize % CASES.len()]);
        let mut request = chat::request(case.grpc_messages(), chat::drawn(5 + 7 * seed));
        (request.seed, request.n) = (Some(u64::from(seed)), Some(1 + seed % 2));
        request
    });
    golden.into_iter().chain(drawn).collect()
}

#[test]
fn many_at_once_give_the_tokens_of_each_alone() {
    let cluster = shared::tp2();
    let requests = mixed_requests();
    let grpc = cluster.grpc();
    let alone: Vec<_> = requests.iter().map(|request| tokens(&grpc, request)).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let start = |request| {
            // A client of its own, as with many users.
            let grpc = cluster.grpc();
            scope.spawn(move || [(); 2].map(|()| tokens(&grpc, request)))
        };
        let running: Vec<_> = requests.iter().map(start).collect();
        running.into_iter().map(|client| client.join().expect("every client is answered")).collect()
    });
    for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(together, &[alone.clone(), alone.clone()], "request {index}");
    }
}
