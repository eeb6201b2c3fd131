use proptest::prelude::*;
use tessera_types::{Hash256, InstanceId, NumericsId};

use super::*;

mod model;

const MS: Duration = Duration::from_millis(1);

fn target(group: &str, epoch: u64) -> Target {
    Target {
        group: GroupName::new(group).unwrap(),
        epoch: Epoch(epoch),
        instance: InstanceId::random(),
        address: format!("{group}:1"),
        numerics: NumericsId(Hash256::default()),
        deterministic: true,
    }
}

fn key(i: u8) -> EmbeddingKey {
    EmbeddingKey(Hash256([i; 32]))
}

fn session(max_moves: u32, num_choices: u32, num_items: u8) -> RequestSession {
    let media = (0..num_items).map(|i| MediaItem { embedding_key: key(i), eager: false }).collect();
    let spec = SessionSpec { num_choices, seed: 7, deadline: None, media, resumed: vec![] };
    RequestSession::new(SessionConfig { max_moves, ..SessionConfig::default() }, spec)
}

/// A session whose choices all run in their first attempt.
fn running(max_moves: u32, num_choices: u32, num_items: u8) -> RequestSession {
    let mut session = session(max_moves, num_choices, num_items);
    assert_eq!(session.on(Event::Start, MS).len(), num_choices as usize);
    for choice in 0..num_choices {
        session.on(Event::Placed { choice, target: target("g0", 1) }, MS);
        session.on(Event::Accepted { choice, attempt: Attempt(1) }, MS);
    }
    session
}

fn token(choice: u32, attempt: u32, index: u32, token: TokenId) -> Event {
    let record = TokenRecord { token, logprobs: None };
    Event::Token { choice, attempt: Attempt(attempt), index, record }
}

fn lost(choice: u32, attempt: u32) -> Event {
    let failure = AttemptFailure::Lost { detail: "reset".into() };
    Event::AttemptFailed { choice, attempt: Attempt(attempt), failure }
}

fn needed(attempt: u32, items: &[u32]) -> Event {
    Event::MediaNeeded { choice: 0, attempt: Attempt(attempt), items: items.to_vec() }
}

fn encoded(item: u32, endpoint: &str) -> Event {
    Event::Encoded { item, endpoint: endpoint.into(), key: key(item as u8) }
}

fn error_of(actions: &[Action]) -> Option<&SessionError> {
    actions.iter().find_map(|action| match action {
        Action::Fail { error } => Some(error),
        _ => None,
    })
}

#[test]
fn a_loss_without_moves_is_a_typed_retryable_error() {
    let mut session = running(0, 2, 0);
    session.on(token(0, 1, 0, 5), MS);
    let actions = session.on(lost(0, 1), MS);
    let error = error_of(&actions).expect("the request fails");
    assert_eq!(error.reason(), "GROUP_LOST");
    assert!(error.retry_after().is_some());
    let closed = Action::CloseAttempt { choice: 1, attempt: Attempt(1) };
    assert!(actions.contains(&closed), "the other choice stops");
    assert!(session.is_over());
    assert!(session.on(token(1, 1, 0, 5), MS).is_empty());
}

#[test]
fn a_move_forces_what_was_delivered_and_closes_the_old_attempt() {
    let mut session = running(1, 1, 0);
    session.on(token(0, 1, 0, 5), MS);
    session.on(token(0, 1, 1, 6), MS);
    let actions = session.on(lost(0, 1), MS);
    let [Action::Place { avoid, prefer: Some(_), .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(avoid[..], [(GroupName::new("g0").unwrap(), Epoch(1))]);
    let actions = session.on(Event::Placed { choice: 0, target: target("g1", 4) }, MS);
    let [Action::OpenAttempt { attempt, output, seed, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!((*attempt, &output[..], *seed), (Attempt(2), &[5, 6][..], choice_seed(7, 0)));
    assert!(session.on(token(0, 1, 2, 9), MS).is_empty(), "a token of the closed attempt");
    assert!(session.on(lost(0, 1), MS).is_empty(), "its failure as well");
    let actions = session.on(token(0, 2, 2, 7), MS);
    assert!(matches!(actions[..], [Action::Deliver { index: 2, .. }]));
    assert_eq!(session.output(0), [5, 6, 7]);
    assert_eq!(session.continuation(0), Continuation::Exact);
    assert!(error_of(&session.on(lost(0, 2), MS)).is_some(), "the budget is one move");
}

#[test]
fn moving_to_other_numerics_is_said() {
    let mut session = running(1, 1, 0);
    session.on(token(0, 1, 0, 5), MS);
    session.on(lost(0, 1), MS);
    let other = Target { numerics: NumericsId(Hash256([9; 32])), ..target("g1", 4) };
    session.on(Event::Placed { choice: 0, target: other }, MS);
    assert_eq!(session.continuation(0), Continuation::Undisturbed);
    session.on(token(0, 2, 1, 6), MS);
    assert_eq!(session.continuation(0), Continuation::Resampled);
}

#[test]
fn only_unfinished_choices_move() {
    let mut session = running(3, 2, 0);
    session.on(token(0, 1, 0, 5), MS);
    let finished = Event::Finished {
        choice: 0,
        attempt: Attempt(1),
        num_output_tokens: 1,
        reason: FinishReason::Length,
    };
    session.on(finished, MS);
    assert!(session.on(lost(0, 1), MS).is_empty());
    let actions = session.on(lost(1, 1), MS);
    assert!(matches!(actions[..], [Action::Place { choice: 1, .. }]));
}

#[test]
fn refusals_before_admission_do_not_spend_moves() {
    let mut session = session(0, 1, 0);
    session.on(Event::Start, MS);
    for attempt in 1..=8 {
        session.on(Event::Placed { choice: 0, target: target("g0", attempt) }, MS);
        let failure = AttemptFailure::Refused { detail: "stale epoch".into() };
        let attempt = Attempt(attempt as u32);
        let actions = session.on(Event::AttemptFailed { choice: 0, attempt, failure }, MS);
        assert!(matches!(actions[..], [Action::Place { .. }]), "{actions:?}");
    }
    let detail = "none left".to_owned();
    let actions = session.on(Event::NoPlace { choice: 0, detail, retry_after: None }, MS);
    assert_eq!(error_of(&actions).unwrap().reason(), "NO_GROUP_READY");
}

#[test]
fn when_every_group_is_full_the_client_is_told_when_to_return() {
    let mut session = session(2, 1, 0);
    session.on(Event::Start, MS);
    session.on(Event::Placed { choice: 0, target: target("g0", 1) }, MS);
    let failure = AttemptFailure::Overloaded { retry_after: Some(Duration::from_secs(9)) };
    let attempt = Attempt(1);
    let actions = session.on(Event::AttemptFailed { choice: 0, attempt, failure }, MS);
    assert!(matches!(&actions[..], [Action::Place { avoid, .. }] if avoid.len() == 1));
    let no_place = Event::NoPlace { choice: 0, detail: String::new(), retry_after: None };
    let actions = session.on(no_place, MS);
    let error = error_of(&actions).unwrap();
    assert_eq!((error.reason(), error.retry_after()), ("OVERLOADED", Some(Duration::from_secs(9))));
}

#[test]
fn a_request_that_ran_waits_for_the_next_epoch() {
    let mut session = running(1, 1, 0);
    session.on(token(0, 1, 0, 5), MS);
    session.on(lost(0, 1), MS);
    let no_place = Event::NoPlace { choice: 0, detail: "none".into(), retry_after: None };
    let mut now = MS;
    for _ in 0..20 {
        assert!(session.on(no_place.clone(), now).is_empty());
        now = session.deadline().expect("it asks again");
        assert!(matches!(session.on(Event::Tick, now)[..], [Action::Place { .. }]));
    }
    let late = now + SessionConfig::default().max_place_wait;
    assert_eq!(error_of(&session.on(no_place, late)).unwrap().reason(), "GROUP_LOST");
}

#[test]
fn a_bad_request_fails_at_once_and_is_not_moved() {
    let mut session = session(5, 1, 0);
    session.on(Event::Start, MS);
    session.on(Event::Placed { choice: 0, target: target("g0", 1) }, MS);
    let failure = AttemptFailure::Rejected {
        reason: "PROMPT_TOO_LONG".into(),
        field: "messages".into(),
        detail: "too long".into(),
    };
    let attempt = Attempt(1);
    let actions = session.on(Event::AttemptFailed { choice: 0, attempt, failure }, MS);
    let error = error_of(&actions).unwrap();
    assert_eq!((error.reason(), error.retry_after()), ("PROMPT_TOO_LONG", None));
}

#[test]
fn gaps_and_short_finishes_end_the_attempt() {
    let breaches = [
        token(0, 1, 1, 5),
        Event::Finished {
            choice: 0,
            attempt: Attempt(1),
            num_output_tokens: 3,
            reason: FinishReason::Length,
        },
    ];
    for breach in breaches {
        let mut session = running(1, 1, 0);
        let actions = session.on(breach, MS);
        assert!(
            matches!(actions[..], [Action::CloseAttempt { .. }, Action::Place { .. }]),
            "{actions:?}"
        );
    }
}

#[test]
fn media_are_encoded_once_and_told_to_every_choice() {
    let mut session = running(0, 2, 2);
    let actions = session.on(needed(1, &[1]), MS);
    assert!(matches!(actions[..], [Action::Encode { item: 1, .. }]));
    let other = Event::MediaNeeded { choice: 1, attempt: Attempt(1), items: vec![1] };
    assert!(session.on(other, MS).is_empty(), "already being encoded");
    let actions = session.on(encoded(1, "e0"), MS);
    let told: Vec<u32> = actions
        .iter()
        .map(|action| match action {
            Action::SendMediaAt { choice, item: 1, .. } => *choice,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told, [0, 1]);
    let stale = Event::MediaNeeded { choice: 0, attempt: Attempt(0), items: vec![0] };
    assert!(session.on(stale, MS).is_empty());
}

#[test]
fn a_lost_embedding_is_encoded_elsewhere_a_bounded_number_of_times() {
    let mut session = running(0, 1, 1);
    session.on(needed(1, &[0]), MS);
    session.on(encoded(0, "e0"), MS);
    let actions = session.on(needed(1, &[0]), MS);
    assert_eq!(actions, [Action::Encode { item: 0, avoid: vec!["e0".into()] }]);
    let failed = |endpoint: &str| Event::EncodeFailed {
        item: 0,
        endpoint: Some(endpoint.into()),
        retryable: true,
        detail: "gone".into(),
    };
    let actions = session.on(failed("e1"), MS);
    assert!(matches!(&actions[..], [Action::Encode { avoid, .. }] if avoid.len() == 2));
    let actions = session.on(failed("e2"), MS);
    assert_eq!(error_of(&actions).unwrap().reason(), "ENCODER_UNAVAILABLE");
}

#[test]
fn an_embedding_under_a_foreign_key_is_not_used() {
    let mut session = running(0, 1, 1);
    session.on(needed(1, &[0]), MS);
    let foreign = Event::Encoded { item: 0, endpoint: "e0".into(), key: key(99) };
    let actions = session.on(foreign, MS);
    assert_eq!(actions, [Action::Encode { item: 0, avoid: vec!["e0".into()] }]);
}

#[test]
fn a_bad_image_fails_its_request_for_good() {
    let mut session = running(0, 1, 1);
    session.on(needed(1, &[0]), MS);
    let failed = Event::EncodeFailed {
        item: 0,
        endpoint: None,
        retryable: false,
        detail: "not an image".into(),
    };
    let actions = session.on(failed, MS);
    let error = error_of(&actions).unwrap();
    assert_eq!((error.reason(), error.retry_after()), ("MEDIA_REJECTED", None));
}

#[test]
fn a_new_attempt_is_told_again_where_its_media_are() {
    let mut session = running(1, 1, 1);
    session.on(needed(1, &[0]), MS);
    session.on(encoded(0, "e0"), MS);
    session.on(lost(0, 1), MS);
    session.on(Event::Placed { choice: 0, target: target("g1", 1) }, MS);
    let actions = session.on(needed(2, &[0]), MS);
    assert!(matches!(
        &actions[..],
        [Action::SendMediaAt { attempt: Attempt(2), endpoint, .. }] if endpoint == "e0"
    ));
}

#[test]
fn eager_items_are_encoded_before_anyone_asks() {
    let media = vec![
        MediaItem { embedding_key: key(0), eager: true },
        MediaItem { embedding_key: key(1), eager: false },
    ];
    let spec = SessionSpec { num_choices: 1, seed: 0, deadline: None, media, resumed: vec![] };
    let mut session = RequestSession::new(SessionConfig::default(), spec);
    let actions = session.on(Event::Start, MS);
    assert!(matches!(
        actions[..],
        [Action::Encode { item: 0, .. }, Action::Place { choice: 0, .. }]
    ));
}

#[test]
fn the_deadline_ends_what_runs_and_fails_what_never_began() {
    let with_deadline = || {
        let deadline = Some(Duration::from_secs(1));
        let spec =
            SessionSpec { num_choices: 1, seed: 0, deadline, media: vec![], resumed: vec![] };
        let mut session = RequestSession::new(SessionConfig::default(), spec);
        session.on(Event::Start, MS);
        session.on(Event::Placed { choice: 0, target: target("g0", 1) }, MS);
        session
    };
    let mut silent = with_deadline();
    assert_eq!(silent.deadline(), Some(Duration::from_secs(1)));
    let actions = silent.on(Event::Tick, Duration::from_secs(1));
    assert_eq!(error_of(&actions), Some(&SessionError::DeadlineExceeded));
    let mut speaking = with_deadline();
    speaking.on(token(0, 1, 0, 5), MS);
    let actions = speaking.on(Event::Tick, Duration::from_secs(1));
    assert_eq!(
        actions[1..],
        [Action::Finish { choice: 0, reason: FinishReason::DeadlineExceeded }, Action::Complete]
    );
}

#[test]
fn cancel_and_stop_strings_close_the_stream() {
    let mut session = running(0, 2, 0);
    let actions = session.on(Event::StopChoice { choice: 0, reason: FinishReason::StopString }, MS);
    assert_eq!(
        actions,
        [
            Action::CloseAttempt { choice: 0, attempt: Attempt(1) },
            Action::Finish { choice: 0, reason: FinishReason::StopString },
        ]
    );
    assert!(session.on(token(0, 1, 0, 5), MS).is_empty(), "what follows a stop is dropped");
    let actions = session.on(Event::Cancel, MS);
    assert_eq!(actions.last(), Some(&Action::Complete));
    assert!(actions.contains(&Action::Finish { choice: 1, reason: FinishReason::Cancelled }));
}

#[test]
fn a_resumed_choice_goes_on_where_the_client_is() {
    let resumed = vec![vec![4, 5]];
    let spec = SessionSpec { num_choices: 1, seed: 0, deadline: None, media: vec![], resumed };
    let mut session = RequestSession::new(SessionConfig::default(), spec);
    session.on(Event::Start, MS);
    let actions = session.on(Event::Placed { choice: 0, target: target("g0", 1) }, MS);
    assert!(matches!(&actions[..], [Action::OpenAttempt { output, .. }] if output[..] == [4, 5]));
    let actions = session.on(token(0, 1, 2, 6), MS);
    assert!(matches!(actions[..], [Action::Deliver { index: 2, .. }]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is delivered late, twice, out of order or never, from whichever attempt.
    #[test]
    fn no_token_is_lost_repeated_reordered_or_stale(
        moves in proptest::collection::vec(model::move_strategy(), 0..120),
    ) {
        model::Model::new(false).run(&moves)?;
    }
}

#[test]
fn the_property_catches_a_session_that_accepts_an_old_attempt() {
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let strategy = proptest::collection::vec(model::move_strategy(), 0..120);
    let caught = runner.run(&strategy, |moves| model::Model::new(true).run(&moves));
    assert!(caught.is_err(), "the planted bug went unnoticed");
}
