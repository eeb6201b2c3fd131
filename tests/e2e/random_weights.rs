//! `--weights random:SEED`: any shape runs without a file, and the weights are a function of the seed
//! alone, not of the split.

use std::fs;

use tessera_tests::chat;
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::fixtures;

/// Tokens of a cluster whose model directory has no weights.
fn tokens(seed: u64, tp: u32) -> Vec<u32> {
    let model = fixtures::copy_of("tiny");
    fs::remove_file(model.path().join("model.safetensors")).expect("removed");
    let weights = format!("random:{seed}");
    let options = UpOptions {
        model: model.path().to_owned(),
        more: ["--weights", &weights].map(Into::into).to_vec(),
        ..UpOptions::new("tiny", tp)
    };
    let cluster = Cluster::up(&options);
    let picture = chat::image_bytes(&fixtures::media("odd_97x131.png"));
    let prompt = chat::user(vec![picture, chat::text("What is this?")]);
    let answer = cluster.grpc().answer(chat::request(prompt, chat::greedy(16)));
    answer.expect("is answered").choice().token_ids.clone()
}

#[test]
fn random_weights_depend_on_the_seed_and_not_on_the_split() {
    let first = tokens(1, 1);
    assert_eq!(first.len(), 16);
    assert_eq!(tokens(1, 2), first);
    assert_ne!(tokens(2, 1), first);
}
