//! `kill -9` on every role.

use std::sync::Mutex;

use rustix::process::Signal;
use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::Golden;
use tessera_tests::shared::{self, Exclusive};
use tessera_tests::{chat, tree, wait};
use tessera_tests::{grpc, http};

use crate::observed::{
    LONG, Reader, assert_cut_off_cleanly, assert_serves, assert_undisturbed, start_grpc, start_http,
};

fn cluster() -> Exclusive {
    static SLOT: Mutex<Option<Cluster>> = Mutex::new(None);
    shared::exclusive(&SLOT, &UpOptions::new("tiny", 2))
}

/// Streams over both faces, proven to be running.
fn start_streams(cluster: &Cluster) -> Vec<(Golden, Reader)> {
    let text = Golden::load("tiny", "text");
    let image = Golden::load("tiny", "image_odd");
    let readers = vec![
        (text.clone(), start_grpc(&cluster.endpoints, &text)),
        (image.clone(), start_http(&cluster.endpoints, &image, LONG)),
    ];
    wait::until("both sequences run", || cluster.grpc().group().running >= 2);
    readers
}

/// Waits until a group of an epoch after `epoch` serves.
fn wait_next_epoch(cluster: &Cluster, epoch: u64) {
    let next = || {
        let groups = cluster.grpc().cluster().ok()?.groups;
        let formed = groups.first().is_some_and(|group| group.epoch > epoch);
        (formed && cluster.endpoints.is_ready()).then_some(())
    };
    wait::for_value(&format!("an epoch after {epoch} serves"), next);
}

/// Kills the decoder process of a slot while streams run, and asserts everything that must follow.
fn kill_decoder(cluster: &Cluster, slot: u32) {
    let epoch = cluster.grpc().group().epoch;
    let streams = start_streams(cluster);
    let victim = cluster.decoder(slot);
    let survivor = cluster.decoder(1 - slot);
    victim.signal(Signal::KILL);
    let observed: Vec<_> =
        streams.into_iter().map(|(golden, reader)| (golden, reader.finish())).collect();
    wait_next_epoch(cluster, epoch);
    for (golden, observed) in &observed {
        assert_cut_off_cleanly(&cluster.endpoints, golden, observed);
    }
    for case in ["text", "images", "multi_turn"] {
        assert_serves(&cluster.endpoints, case);
    }
    tree::assert_gone(std::slice::from_ref(&victim));
    assert_ne!(cluster.decoder(slot), victim, "the supervisor started another process");
    // A survivor with an intact device never reloads: it is the same process.
    assert_eq!(cluster.decoder(1 - slot), survivor);
}

#[test]
fn a_killed_follower_ends_the_epoch_and_the_next_one_serves() {
    kill_decoder(&cluster(), 1);
}

#[test]
fn a_killed_leader_ends_the_epoch_and_the_next_one_serves() {
    kill_decoder(&cluster(), 0);
}

/// Who waits for a whole answer gets an error in OpenAI's form that says when to try again.
#[test]
fn a_whole_answer_that_is_lost_is_a_503() {
    let cluster = cluster();
    let epoch = cluster.grpc().group().epoch;
    let address = cluster.endpoints.http;
    let body = chat::with(
        Golden::load("tiny", "text").http_body(),
        serde_json::json!({"max_tokens": LONG}),
    );
    let client = std::thread::spawn(move || http::Client::new(address).chat(&body));
    grpc::wait_busy_group(&cluster.grpc());
    cluster.decoder(1).signal(Signal::KILL);
    let response = client.join().expect("the client is answered");
    assert_eq!(response.status, 503, "{response}");
    let error = &response.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&"server_error".into(), &"group_lost".into()));
    assert!(response.headers.get("retry-after").is_some(), "{response}");
    wait_next_epoch(&cluster, epoch);
    assert_serves(&cluster.endpoints, "text");
}

#[test]
fn kills_in_a_loop_leave_no_process_behind() {
    let cluster = cluster();
    let before = cluster.supervisor.descendants().len();
    for round in 0..3 {
        let epoch = cluster.grpc().group().epoch;
        let golden = Golden::load("tiny", "text");
        let reader = start_grpc(&cluster.endpoints, &golden);
        cluster.decoder(round % 2).signal(Signal::KILL);
        let observed = reader.finish();
        wait_next_epoch(&cluster, epoch);
        assert_cut_off_cleanly(&cluster.endpoints, &golden, &observed);
        assert_serves(&cluster.endpoints, "image_odd");
        assert_eq!(cluster.supervisor.descendants().len(), before, "round {round}");
    }
}

#[test]
fn both_decoders_killed_at_once_come_back() {
    let cluster = cluster();
    let epoch = cluster.grpc().group().epoch;
    let streams = start_streams(&cluster);
    let victims = [cluster.decoder(0), cluster.decoder(1)];
    victims.iter().for_each(|victim| victim.signal(Signal::KILL));
    let observed: Vec<_> =
        streams.into_iter().map(|(golden, reader)| (golden, reader.finish())).collect();
    wait_next_epoch(&cluster, epoch);
    for (golden, observed) in &observed {
        assert_cut_off_cleanly(&cluster.endpoints, golden, observed);
    }
    assert_serves(&cluster.endpoints, "images");
}

/// The embedding of a running request is already with the decoder, so its stream goes on; a picture
/// that was not encoded yet needs the next encoder.
#[test]
fn a_killed_encoder_is_restarted_and_running_answers_go_on() {
    let cluster = cluster();
    let epoch = cluster.grpc().group().epoch;
    let golden = Golden::load("tiny", "image_odd");
    let running = start_http(&cluster.endpoints, &golden, 400);
    let victim = cluster.processes("encoder").remove(0);
    victim.signal(Signal::KILL);
    tree::assert_gone(std::slice::from_ref(&victim));
    assert!(running.is_running(), "the answer ended before the encoder did");
    let restarted = || cluster.processes("encoder").iter().any(|process| *process != victim);
    wait::until("the encoder is restarted", restarted);
    wait::until("the cluster is ready", || cluster.endpoints.is_ready());
    assert_serves(&cluster.endpoints, "images");
    assert_eq!(cluster.grpc().group().epoch, epoch, "the group had no part in it");
    let observed = running.finish();
    assert!(matches!(observed.end, crate::observed::End::Finished), "{:?}", observed.end);
    assert_undisturbed(&cluster.endpoints, &golden, &observed);
}

#[test]
fn a_killed_router_is_restarted_and_its_sequences_end() {
    let cluster = cluster();
    let epoch = cluster.grpc().group().epoch;
    let golden = Golden::load("tiny", "text");
    let mut events = cluster
        .http()
        .chat_stream(&chat::with(golden.http_body(), serde_json::json!({"max_tokens": LONG})));
    assert_eq!(events.by_ref().take(5).count(), 5);
    let victim = cluster.processes("router").remove(0);
    victim.signal(Signal::KILL);
    tree::assert_gone(std::slice::from_ref(&victim));
    assert_eq!(events.by_ref().find(|event| event.get("error").is_some()), None);
    assert!(!events.is_done(), "a broken stream does not look complete");
    wait::until("a router serves again", || cluster.endpoints.is_ready());
    assert_ne!(cluster.processes("router").remove(0), victim);
    wait::until("the orphaned sequence ends", || cluster.grpc().group().running == 0);
    assert_serves(&cluster.endpoints, "image_odd");
    assert_eq!(cluster.grpc().group().epoch, epoch, "the group had no part in it");
}
