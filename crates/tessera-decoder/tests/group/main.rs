//! Decoder groups on one machine: an embedded store, processes with a runtime each, the tiny checkpoint.

mod group;
mod media;

use std::time::Duration;

use group::{Client, Group, TIMEOUT, start_of};
use tessera_proto::ErrorReason;
use tessera_proto::decoder::v1 as pb;

/// A prompt, and tokens after it that depend on all of it.
const PROMPT: [u32; 9] = [5, 903, 77, 1500, 12, 12, 640, 2, 31];

#[test]
fn two_processes_answer_like_one() {
    let one = Group::start(1, 1);
    let expected = one.client().complete(&PROMPT, 24);
    assert_eq!(expected.len(), 24);
    let two = Group::start(2, 1);
    assert_eq!(two.client().complete(&PROMPT, 24), expected, "two ranks in two processes");
    let mixed = Group::start(4, 2);
    assert_eq!(mixed.client().complete(&PROMPT, 24), expected, "four ranks in two processes");
}

#[test]
fn a_continued_attempt_goes_on_with_the_same_tokens() {
    let group = Group::start(2, 1);
    let client = group.client();
    let whole = client.complete(&PROMPT, 20);
    let mut start = start_of(&client.active(), &PROMPT, 20);
    start.output_token_ids = whole[..7].to_vec();
    let mut attempt = client.generate(start);
    let mut next = 7;
    loop {
        match attempt.next().expect("it finishes") {
            pb::generate_response::Message::Tokens(tokens) => {
                for record in tokens.records {
                    assert_eq!(
                        (record.output_index, record.token_id),
                        (next, whole[next as usize])
                    );
                    next += 1;
                }
            }
            pb::generate_response::Message::Finished(finished) => {
                assert_eq!(finished.num_output_tokens, 20);
                break;
            }
            _ => {}
        }
    }
    assert_eq!(next, 20);
}

#[test]
fn a_lost_follower_ends_running_attempts_with_a_retryable_error_and_the_next_epoch_serves() {
    let mut group = Group::start(2, 1);
    let client = group.client();
    let expected = client.complete(&PROMPT, 16);
    let before = client.active();
    let mut attempt = client.generate(start_of(&before, &PROMPT, 4000));
    attempt.wait_for_tokens(3);
    group.kill(1);
    let status = attempt.end().expect_err("the group is broken");
    let detail = tessera_proto::error_detail(&status).expect("a typed error");
    assert_eq!((detail.reason.as_str(), detail.retryable), (ErrorReason::GroupLost.name(), true));
    group.restart(1);
    let after = client.wait_for_epoch_after(before.epoch.0);
    assert_eq!(after.instance, before.instance, "the leader's process and weights survive");
    assert_ne!(after.slots[1].instance, before.slots[1].instance);
    assert_eq!(client.complete(&PROMPT, 16), expected);
}

#[test]
fn a_lost_leader_is_replaced_and_the_follower_survives() {
    let mut group = Group::start(2, 1);
    let client = group.client();
    let expected = client.complete(&PROMPT, 16);
    let before = client.active();
    group.kill(0);
    group.restart(0);
    let after = client.wait_for_epoch_after(before.epoch.0);
    assert_eq!(after.slots[1].instance, before.slots[1].instance);
    assert_eq!(client.complete(&PROMPT, 16), expected);
}

#[test]
fn attempts_for_another_epoch_group_or_cluster_are_refused() {
    let group = Group::start(1, 1);
    let client = group.client();
    let active = client.active();
    type Edit = fn(&mut pb::Fence);
    let edits: [(Edit, ErrorReason); 4] = [
        (|f| f.epoch -= 1, ErrorReason::StaleEpoch),
        (|f| f.epoch += 1, ErrorReason::StaleEpoch),
        (|f| f.group = "other".into(), ErrorReason::InvalidArgument),
        (|f| f.cluster = "other".into(), ErrorReason::InvalidArgument),
    ];
    for (i, (edit, reason)) in edits.into_iter().enumerate() {
        let mut start = start_of(&active, &PROMPT, 4);
        edit(start.fence.as_mut().expect("set"));
        let status = client.generate(start).end().expect_err("refused");
        let detail = tessera_proto::error_detail(&status).expect("a typed error");
        assert_eq!(detail.reason, reason.name(), "edit {i}: {status}");
    }
    assert_eq!(client.complete(&PROMPT, 4).len(), 4, "the group goes on");
}

#[test]
fn bad_attempts_fail_alone_and_by_name() {
    let group = Group::start(1, 1);
    let client = group.client();
    let active = client.active();
    type Edit = fn(&mut pb::Start);
    let edits: [(Edit, ErrorReason); 5] = [
        (|s| s.prompt = None, ErrorReason::InvalidArgument),
        (|s| s.prompt.as_mut().unwrap().token_ids[0] = u32::MAX, ErrorReason::InvalidArgument),
        (|s| s.sampling.as_mut().unwrap().temperature = f32::NAN, ErrorReason::InvalidArgument),
        (|s| s.sampling.as_mut().unwrap().max_tokens = 0, ErrorReason::InvalidArgument),
        (|s| s.sampling.as_mut().unwrap().max_tokens = 1 << 30, ErrorReason::PromptTooLong),
    ];
    for (i, (edit, reason)) in edits.into_iter().enumerate() {
        let mut start = start_of(&active, &PROMPT, 4);
        edit(&mut start);
        let status = client.generate(start).end().expect_err("refused");
        let detail = tessera_proto::error_detail(&status).expect("a typed error");
        assert_eq!(detail.reason, reason.name(), "edit {i}: {status}");
    }
    assert_eq!(client.complete(&PROMPT, 4).len(), 4, "the group goes on");
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let group = Group::start(1, 1);
    let client = group.client();
    let mut attempt = client.generate(start_of(&client.active(), &PROMPT, 4000));
    attempt.wait_for_tokens(2);
    drop(attempt);
    client.wait_until_idle();
}

#[test]
fn shutdown_of_any_member_drains_the_group_and_leaves_nothing_in_the_store() {
    for asked in [0, 1] {
        let mut group = Group::start(2, 1);
        let client = group.client();
        let mut attempt = client.generate(start_of(&client.active(), &PROMPT, 60));
        attempt.wait_for_tokens(1);
        group.shut_down(asked);
        let finished = attempt.end().expect("what runs is finished first");
        assert_eq!(finished.num_output_tokens, 60);
        group.join(0).expect("the leader leaves in good order");
        if asked == 0 {
            // The follower was not asked: it stays and would join a next epoch.
            group.shut_down(1);
        }
        group.join(1).expect("the follower leaves in good order");
        let keys = group.keys_in_store();
        let left: Vec<_> = keys
            .iter()
            .filter(|key| !key.ends_with("/epoch") && !key.contains("/canary/"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn what_runs_past_the_grace_is_given_up_for_others() {
    let mut group = Group::start_with(1, 1, |config| config.drain_ms = 800);
    let client = group.client();
    let mut attempt = client.generate(start_of(&client.active(), &PROMPT, 4000));
    attempt.wait_for_tokens(1);
    group.shut_down(0);
    let status = attempt.end().expect_err("the time is over");
    let detail = tessera_proto::error_detail(&status).expect("a typed error");
    assert_eq!((detail.reason.as_str(), detail.retryable), (ErrorReason::Draining.name(), true));
    group.join(0).expect("leaves in good order");
}

#[test]
fn health_names_the_epoch_and_the_instance() {
    let group = Group::start(2, 1);
    let client = group.client();
    let active = client.active();
    for slot in &active.slots {
        let report = Client::health(&slot.address);
        assert_eq!(report.epoch, active.epoch.0);
        assert_eq!(report.state(), pb::GroupState::Serving);
        assert_eq!(report.instance, slot.instance.to_string());
    }
    assert!(TIMEOUT > Duration::from_secs(1));
}
