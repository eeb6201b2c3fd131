//! With more than one group and encoder, a loss is felt only by what ran on the lost one.

use rustix::process::Signal;
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::Golden;
use tessera_tests::{chat, fixtures, grpc, tree, wait};

use crate::observed::{LONG, assert_serves, start_grpc};

fn two_of_each() -> Cluster {
    let more = ["--groups", "2"].map(Into::into).to_vec();
    let cluster = Cluster::up(&UpOptions { encoders: 2, more, ..UpOptions::new("tiny", 1) });
    wait::until("both groups and both encoders are known", || {
        cluster
            .grpc()
            .cluster()
            .is_ok_and(|view| (view.groups.len(), view.encoders.len()) == (2, 2))
    });
    cluster
}

#[test]
fn another_group_takes_new_requests_at_once() {
    let cluster = two_of_each();
    let golden = Golden::load("tiny", "text");
    let reader = start_grpc(&cluster.endpoints, &golden);
    let lost = grpc::wait_busy_group(&cluster.grpc());
    let processes = cluster.processes("decoder");
    let of_group =
        processes.iter().find(|process| process.flag("--group") == Some(lost.name.clone()));
    let victim = of_group.expect("the group has a process");
    victim.signal(Signal::KILL);
    // No wait for the next epoch: a request that fails now would mean that nobody took over. The one
    // moment in which the router cannot know yet is over when the stream has ended.
    let observed = reader.finish();
    assert!(observed.token_ids.len() < LONG as usize);
    for case in ["text", "image_odd", "images"] {
        assert_serves(&cluster.endpoints, case);
    }
    wait::until("the lost group serves again", || {
        let groups = cluster.grpc().cluster().map_or_else(|_| Vec::new(), |view| view.groups);
        groups.iter().any(|group| group.name == lost.name && group.epoch > lost.epoch)
    });
}

/// Every picture is new, so every request needs an encoder; each succeeds although encoders die.
#[test]
fn another_encoder_takes_the_pictures() {
    let cluster = two_of_each();
    let ask = |seed: u32| {
        let picture = fixtures::bmp(84, 56, seed);
        let prompt = chat::user(vec![chat::image_bytes(&picture), chat::text("What is this?")]);
        let answer = cluster.grpc().answer(chat::request(prompt, chat::greedy(2)));
        answer.unwrap_or_else(|status| panic!("picture {seed}: {status:?}"))
    };
    (0..4).for_each(|seed| drop(ask(seed)));
    let victim = cluster.processes("encoder").remove(0);
    victim.signal(Signal::KILL);
    tree::assert_gone(std::slice::from_ref(&victim));
    (4..16).for_each(|seed| drop(ask(seed)));
    wait::until("the encoder is restarted", || cluster.processes("encoder").len() == 2);
    assert_serves(&cluster.endpoints, "images");
}

/// A stopped encoder keeps its connections open; what it was to encode goes to the other one all the same.
#[test]
fn another_encoder_takes_the_pictures_of_a_frozen_one() {
    let cluster = two_of_each();
    let victim = cluster.processes("encoder").remove(0);
    victim.signal(Signal::STOP);
    for seed in 20..26 {
        let picture = fixtures::bmp(84, 56, seed);
        let prompt = chat::user(vec![chat::image_bytes(&picture), chat::text("What is this?")]);
        let answer = cluster.grpc().answer(chat::request(prompt, chat::greedy(2)));
        answer.unwrap_or_else(|status| panic!("picture {seed}: {status:?}"));
    }
    victim.signal(Signal::CONT);
    assert_serves(&cluster.endpoints, "images");
}
