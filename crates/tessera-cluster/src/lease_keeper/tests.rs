//! The machine against a simulated store and network, in simulated time.

mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use world::{Fate, MEMBER, StoredKey, World, ms};

#[test]
fn a_member_registers_and_keeps_its_lease_at_a_third_of_the_ttl() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(60));
    assert!(world.is_alive());
    assert!(world.store.keys.contains_key(MEMBER));
    assert_eq!(world.store.granted, 1, "one lease serves the whole minute");
    let times = world.keepalive_times();
    assert_eq!(times.len(), 18, "60 s at 10 s / 3");
    assert_eq!(times[0], Duration::from_secs(10) / 3);
}

#[test]
fn the_granted_ttl_counts_not_the_one_asked_for() {
    let mut world = World::healthy();
    let actions = world.keeper.on(LeaseEvent::Tick, Duration::ZERO);
    let call = actions.iter().find_map(|action| match action {
        LeaseAction::Grant { call, .. } => Some(*call),
        _ => None,
    });
    world.feed(LeaseEvent::Granted {
        call: call.unwrap(),
        lease_id: 9,
        ttl: Duration::from_secs(60),
    });
    let Some(LeaseAction::WriteKeys { call, .. }) = world.calls.first().map(|(_, c)| c.clone())
    else {
        panic!("the keys are written at once: {:?}", world.calls);
    };
    world.feed(LeaseEvent::KeysWritten { call, revision: 3 });
    assert_eq!(world.keeper.deadline(), Some(Duration::from_secs(20)));
}

#[test]
fn after_a_failed_keepalive_the_next_comes_within_half_of_what_remains() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(1));
    world.fates = Box::new(|| Fate::RequestLost);
    world.run_until(Duration::from_millis(9_500));
    let times = world.keepalive_times();
    assert!(times.len() >= 3, "{times:?}");
    for pair in times.windows(2) {
        let remaining = Duration::from_secs(10).saturating_sub(pair[0]);
        assert!(
            pair[1] - pair[0] <= remaining,
            "{times:?}: the call's time-out and the pause are each at most half of the rest"
        );
    }
    assert!(!world.was_lost());
    let Some(LeaseState::Unknown { age, .. }) = world.states.last() else {
        panic!("{:?}", world.states.last());
    };
    assert!(*age > Duration::from_secs(6), "age counts from the grant");
}

#[test]
fn an_outage_of_any_length_is_unknown_and_ends_alive() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(5));
    world.store.expires = false;
    world.fates = Box::new(|| Fate::RequestLost);
    world.run_until(Duration::from_secs(3600));
    assert!(matches!(world.states.last(), Some(LeaseState::Unknown { lease_id: Some(1), .. })));
    world.fates = Box::new(|| Fate::Answered { latency_ms: 1 });
    world.run_until(Duration::from_secs(3620));
    assert!(world.is_alive());
    assert!(!world.was_lost());
}

#[test]
fn a_certain_loss_brings_a_new_lease_with_all_keys() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.put(1, "ready/3/a", b"r");
    world.put(2, "id/3", b"nccl");
    world.run_until(Duration::from_secs(2));
    assert_eq!(world.store.keys.len(), 3);
    world.lose_all_leases();
    world.run_until(Duration::from_secs(8));
    assert!(world.is_alive());
    assert_eq!(world.store.keys.len(), 3);
    assert!(world.store.keys.values().all(|key| key.lease == 2));
    let lost = LeaseState::Lost { reason: LostReason::LeaseGone };
    assert!(world.states.contains(&lost));
    let rewrites = world
        .calls
        .iter()
        .filter(|(_, call)| matches!(call, LeaseAction::WriteKeys { lease_id: 2, keys, .. } if keys.len() == 3));
    assert_eq!(rewrites.count(), 1, "one transaction puts all keys back");
}

#[test]
fn a_member_key_of_somebody_else_fences() {
    let mut world = World::healthy();
    world.store.keys.insert(MEMBER.into(), StoredKey { value: b"other".to_vec(), lease: 0 });
    world.put(1, "ready/1/a", b"r");
    world.run_until(Duration::from_secs(3));
    let reason = LostReason::Fenced { key: MEMBER.into() };
    assert_eq!(world.states.last(), Some(&LeaseState::Lost { reason }));
    assert!(world.keeper.has_ended());
    assert!(world.store.leases.is_empty(), "the useless lease is given back");
    assert_eq!(world.answers, [(KeyRequestId(1), KeyOutcome::Lost)]);
    world.put(2, "ready/2/a", b"r");
    assert_eq!(world.answers[1], (KeyRequestId(2), KeyOutcome::Lost));
}

#[test]
fn a_key_taken_during_a_certain_loss_fences() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.put(1, "id/3", b"nccl");
    world.run_until(Duration::from_secs(2));
    world.lose_all_leases();
    let other = StoredKey { value: b"another".to_vec(), lease: 0 };
    world.store.keys.insert("id/3".into(), other);
    world.run_until(Duration::from_secs(8));
    let reason = LostReason::Fenced { key: "id/3".into() };
    assert_eq!(world.states.last(), Some(&LeaseState::Lost { reason }));
}

#[test]
fn a_new_key_of_somebody_else_is_a_conflict_and_nothing_more() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(1));
    let other = StoredKey { value: b"b".to_vec(), lease: 0 };
    world.store.keys.insert("id/4".into(), other);
    world.put(1, "id/4", b"a");
    world.put(2, "ready/4/a", b"a");
    world.run_until(Duration::from_secs(2));
    assert!(world.answers.contains(&(KeyRequestId(1), KeyOutcome::Conflict)));
    assert!(matches!(world.answers.last(), Some((KeyRequestId(2), KeyOutcome::Written { .. }))));
    assert!(world.is_alive());
}

#[test]
fn a_value_changes_and_a_forgotten_key_goes() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(1));
    world.put(1, MEMBER, b"draining");
    world.put(2, "ready/1/a", b"r");
    world.run_until(Duration::from_secs(2));
    assert_eq!(world.store.keys[MEMBER].value, b"draining");
    world.forget(3, "ready/1/a");
    world.forget(4, "never/put");
    world.run_until(Duration::from_secs(3));
    assert!(!world.store.keys.contains_key("ready/1/a"));
    assert!(world.answers.contains(&(KeyRequestId(3), KeyOutcome::Forgotten)));
    assert!(world.answers.contains(&(KeyRequestId(4), KeyOutcome::Forgotten)));
    world.lose_all_leases();
    world.run_until(Duration::from_secs(9));
    assert!(!world.store.keys.contains_key("ready/1/a"));
    assert_eq!(world.store.keys[MEMBER].value, b"draining");
}

#[test]
fn a_key_whose_write_was_never_answered_is_still_deleted_when_forgotten() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(1));
    world.fates = Box::new(|| Fate::AnswerLost);
    world.put(1, "ready/1/a", b"r");
    assert!(world.store.keys.contains_key("ready/1/a"));
    world.fates = Box::new(|| Fate::Answered { latency_ms: 1 });
    world.forget(2, "ready/1/a");
    world.run_until(Duration::from_secs(20));
    assert!(!world.store.keys.contains_key("ready/1/a"));
    assert!(world.answers.contains(&(KeyRequestId(2), KeyOutcome::Forgotten)));
}

#[test]
fn a_key_that_leaves_and_comes_again_while_it_is_written_stands_in_the_end() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(1));
    world.put(1, "ready/1/a", b"r");
    world.forget(2, "ready/1/a");
    world.put(3, "ready/1/a", b"r");
    world.run_until(Duration::from_secs(2));
    assert_eq!(world.store.keys["ready/1/a"].value, b"r");
    let answered: Vec<KeyRequestId> = world.answers.iter().map(|(request, _)| *request).collect();
    assert_eq!(answered, [1, 2, 3].map(KeyRequestId));
}

#[test]
fn bounds_are_kept() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.put(1, "big", &vec![0; MAX_LEASED_VALUE_BYTES + 1]);
    world.put(2, &"k".repeat(MAX_LEASED_KEY_BYTES + 1), b"");
    world.forget(3, MEMBER);
    for i in 0..MAX_LEASED_KEYS as u64 {
        world.put(10 + i, &format!("k{i}"), b"");
    }
    let refused = |id| (KeyRequestId(id), KeyOutcome::OutOfBounds);
    let last = 9 + MAX_LEASED_KEYS as u64;
    assert_eq!(world.answers, [refused(1), refused(2), refused(3), refused(last)]);
    world.run_until(Duration::from_secs(1));
    assert_eq!(world.store.keys.len(), MAX_LEASED_KEYS);
}

#[test]
fn revoking_removes_everything_and_ends() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.put(1, "ready/1/a", b"r");
    world.run_until(Duration::from_secs(1));
    world.feed(LeaseEvent::Revoke);
    world.run_until(Duration::from_secs(2));
    assert!(world.store.keys.is_empty() && world.store.leases.is_empty());
    let reason = LostReason::Revoked;
    assert_eq!(world.states.last(), Some(&LeaseState::Lost { reason }));
    assert!(world.keeper.has_ended());
    assert_eq!(world.keeper.deadline(), None);
}

#[test]
fn revoking_ends_even_when_the_store_is_down_or_a_grant_is_in_flight() {
    let mut down = World::healthy();
    down.feed(LeaseEvent::Tick);
    down.run_until(Duration::from_secs(1));
    down.fates = Box::new(|| Fate::RequestLost);
    down.feed(LeaseEvent::Revoke);
    down.run_until(Duration::from_secs(60));
    assert!(down.keeper.has_ended());

    let mut granting = World::healthy();
    granting.feed(LeaseEvent::Tick);
    granting.feed(LeaseEvent::Revoke);
    assert!(!granting.keeper.has_ended(), "the grant may still arrive");
    granting.run_until(Duration::from_secs(5));
    assert!(granting.keeper.has_ended());
    assert!(granting.store.leases.is_empty());
}

#[test]
fn late_answers_are_ignored() {
    let mut world = World::healthy();
    world.feed(LeaseEvent::Tick);
    world.run_until(Duration::from_secs(1));
    let before = world.states.len();
    for call in [CallId(1), CallId(2), CallId(999)] {
        world.feed(LeaseEvent::LeaseGone { call });
        world.feed(LeaseEvent::KeysRefused { call, key: MEMBER.into() });
        world.feed(LeaseEvent::KeptAlive { call, ttl: Duration::ZERO });
        world.feed(LeaseEvent::Failed { call });
    }
    assert_eq!(world.states.len(), before, "{:?}", &world.states[before..]);
    assert!(world.is_alive());
}

#[test]
fn pauses_double_within_their_bounds() {
    let mut backoff = Backoff::new(ms(100), ms(1000), 3);
    let pauses: Vec<Duration> = (0..8).map(|_| backoff.next_pause()).collect();
    for (i, pause) in pauses.iter().enumerate() {
        let middle = ms((100 << i).min(1000));
        assert!(*pause >= middle.mul_f64(0.8) && *pause <= middle.mul_f64(1.2), "{pauses:?}");
    }
    backoff.reset();
    assert!(backoff.next_pause() <= ms(120));
    let other: Vec<Duration> = {
        let mut other = Backoff::new(ms(100), ms(1000), 4);
        (0..8).map(|_| other.next_pause()).collect()
    };
    assert_ne!(pauses, other, "another seed, other pauses");
}

#[test]
fn settings_that_cannot_keep_a_lease_are_refused() {
    let base = LeaseKeeperConfig::default;
    let bad = [
        LeaseKeeperConfig { ttl: ms(500), ..base() },
        LeaseKeeperConfig { call_timeout: Duration::ZERO, ..base() },
        LeaseKeeperConfig { retry_min: Duration::ZERO, ..base() },
        LeaseKeeperConfig { retry_min: Duration::from_secs(9), ..base() },
        LeaseKeeperConfig { retry_max: ms(1), ..base() },
    ];
    for config in bad {
        assert!(config.validate().is_err(), "{config:?}");
    }
}

/// What happens to the member during a run.
#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    Put(u8, u8),
    Forget(u8),
    LoseLeases,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        4 => (0u64..3_000).prop_map(|latency_ms| Fate::Answered { latency_ms }),
        1 => Just(Fate::RequestLost),
        1 => Just(Fate::AnswerLost),
    ]
}

fn failure() -> impl Strategy<Value = Fate> {
    prop_oneof![Just(Fate::RequestLost), Just(Fate::AnswerLost)]
}

/// A step in which the store loses nothing.
fn harmless_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1u64..20_000).prop_map(Step::Wait),
        2 => (0u8..4, 0u8..3).prop_map(|(key, value)| Step::Put(key, value)),
        1 => (0u8..4).prop_map(Step::Forget),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![6 => harmless_step(), 1 => Just(Step::LoseLeases)]
}

/// Runs the steps under the given fates, then lets the network heal; returns what must stand.
fn play(world: &mut World, steps: &[Step], fates: Vec<Fate>) -> BTreeMap<String, Vec<u8>> {
    let mut fates = fates.into_iter().cycle();
    world.fates = Box::new(move || fates.next().unwrap());
    let mut wanted = BTreeMap::from([(MEMBER.to_owned(), b"a".to_vec())]);
    world.feed(LeaseEvent::Tick);
    for (i, step) in steps.iter().enumerate() {
        let request = 100 + i as u64;
        match step {
            Step::Wait(wait_ms) => world.run_until(world.now + ms(*wait_ms)),
            Step::Put(key, value) => {
                let key = format!("k{key}");
                world.put(request, &key, &[*value]);
                wanted.insert(key, vec![*value]);
            }
            Step::Forget(key) => {
                let key = format!("k{key}");
                world.forget(request, &key);
                wanted.remove(&key);
            }
            Step::LoseLeases => world.lose_all_leases(),
        }
    }
    world.fates = Box::new(|| Fate::Answered { latency_ms: 1 });
    world.run_until(world.now + Duration::from_secs(40));
    wanted
}

proptest! {
    /// While the store never says that the lease is gone, nothing that the network does, and no
    /// outage of any length, is a loss.
    #[test]
    fn errors_and_timeouts_alone_are_never_a_loss(
        steps in prop::collection::vec(harmless_step(), 1..30),
        fates in prop_oneof![
            prop::collection::vec(fate(), 1..40),
            prop::collection::vec(failure(), 1..4),
        ],
    ) {
        let mut world = World::healthy();
        world.store.expires = false;
        play(&mut world, &steps, fates);
        prop_assert!(!world.was_lost(), "{:?}", world.states);
        prop_assert!(world.is_alive());
    }

    /// Whatever is lost, in the end all wanted keys, and no others, stand under one lease.
    #[test]
    fn after_any_losses_all_keys_stand_again(
        steps in prop::collection::vec(step(), 1..30),
        fates in prop::collection::vec(fate(), 1..40),
    ) {
        let mut world = World::healthy();
        let wanted = play(&mut world, &steps, fates);
        prop_assert!(world.is_alive(), "{:?}", world.states.last());
        let Some(LeaseState::Alive { lease_id, .. }) = world.states.last() else {
            unreachable!("it is alive");
        };
        let standing: BTreeMap<_, _> = world.store.keys.iter()
            .filter(|(_, key)| key.lease == *lease_id)
            .map(|(name, key)| (name.clone(), key.value.clone()))
            .collect();
        prop_assert_eq!(&standing, &wanted);
        // Every request was answered exactly once.
        let mut answered: Vec<_> = world.answers.iter().map(|(request, _)| *request).collect();
        answered.sort();
        let requests = steps.iter().enumerate()
            .filter(|(_, step)| matches!(step, Step::Put(..) | Step::Forget(_)))
            .map(|(i, _)| KeyRequestId(100 + i as u64));
        prop_assert!(answered.into_iter().eq(requests));
    }
}
