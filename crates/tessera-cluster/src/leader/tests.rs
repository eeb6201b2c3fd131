use tessera_types::Rank;

use super::*;
use crate::keys::{ClusterName, GroupName};
use crate::records::SlotAssignment;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn spec(num_slots: u32) -> EpochSpec {
    let slots = (0..num_slots).map(|slot| SlotAssignment {
        slot,
        first_rank: Rank(slot),
        num_ranks: 1,
        instance: InstanceId::random(),
        address: String::new(),
        member_revision: 1,
    });
    let slots: Vec<_> = slots.collect();
    let proposer = slots[0].instance;
    EpochSpec { epoch: Epoch(7), slots, world_size: num_slots, num_kv_blocks: 1, proposer }
}

fn leader(spec: &EpochSpec) -> Leader {
    let fence = Fence {
        cluster: ClusterName::new("c").unwrap(),
        group: GroupName::new("g").unwrap(),
        epoch: Epoch(0),
    };
    Leader::new(StreamConfig::default(), fence, spec.clone(), ms(0))
}

fn join(spec: &EpochSpec, slot: usize) -> Event {
    Event::Join {
        cluster: "c".into(),
        group: "g".into(),
        epoch: spec.epoch,
        instance: spec.slots[slot].instance,
        slot: slot as u32,
    }
}

fn ack(spec: &EpochSpec, slot: usize, received: u64, completed: u64, progress: u64) -> Event {
    Event::Ack {
        instance: spec.slots[slot].instance,
        received: StepId(received),
        completed: StepId(completed),
        report: Report { progress, layer_time: ms(1) },
    }
}

fn local(progress: u64) -> Event {
    Event::LocalReport { report: Report { progress, layer_time: ms(1) } }
}

fn end_of(actions: &[Action]) -> Option<&EndReason> {
    actions.iter().find_map(|action| match action {
        Action::End(end) => Some(&end.reason),
        _ => None,
    })
}

#[test]
fn steps_begin_when_every_follower_is_connected() {
    let spec = spec(3);
    let mut leader = leader(&spec);
    let first = leader.on(join(&spec, 1), ms(1));
    assert_eq!(first, [Action::Accept { instance: spec.slots[1].instance }]);
    let second = leader.on(join(&spec, 2), ms(2));
    assert!(second.contains(&Action::AllConnected));
    let plan = leader.on(Event::Plan { step: StepId(1) }, ms(3));
    assert_eq!(plan, [Action::SendPlan { step: StepId(1) }]);
}

#[test]
fn strangers_and_second_streams_are_refused_without_harm() {
    let spec = spec(2);
    let mut leader = leader(&spec);
    leader.on(join(&spec, 1), ms(1));
    let again = leader.on(join(&spec, 1), ms(2));
    assert!(matches!(again[..], [Action::Refuse { refusal: Refusal::AlreadyOpened { .. }, .. }]));
    let stale = Event::Join {
        cluster: "c".into(),
        group: "g".into(),
        epoch: Epoch(6),
        instance: spec.slots[1].instance,
        slot: 1,
    };
    assert!(matches!(
        leader.on(stale, ms(3))[..],
        [Action::Refuse { refusal: Refusal::StaleEpoch { .. }, .. }]
    ));
    let stranger = Event::Join {
        cluster: "c".into(),
        group: "g".into(),
        epoch: Epoch(7),
        instance: InstanceId::random(),
        slot: 1,
    };
    assert!(matches!(
        leader.on(stranger, ms(4))[..],
        [Action::Refuse { refusal: Refusal::NotAMember { .. }, .. }]
    ));
    assert!(!leader.has_ended());
}

#[test]
fn a_beat_goes_out_when_no_plan_does() {
    let spec = spec(1);
    let mut leader = leader(&spec);
    for round in 1..=10 {
        let now = leader.deadline().unwrap();
        assert_eq!(now, ms(400 * round));
        assert_eq!(leader.on(Event::Tick, now), [Action::SendBeat { step: StepId(0) }]);
    }
    leader.on(Event::Plan { step: StepId(1) }, ms(4300));
    assert!(leader.on(local(0), ms(4500)).is_empty(), "the plan was as good as a beat");
    assert_eq!(leader.on(Event::Tick, ms(4700)), [Action::SendBeat { step: StepId(1) }]);
}

#[test]
fn a_broken_stream_ends_the_epoch_once_for_all() {
    let spec = spec(3);
    let mut leader = leader(&spec);
    leader.on(join(&spec, 1), ms(1));
    leader.on(join(&spec, 2), ms(1));
    let closed = Event::Closed { instance: spec.slots[2].instance, detail: "reset".into() };
    let actions = leader.on(closed.clone(), ms(5));
    assert!(matches!(actions[0], Action::SendAbort { .. }));
    assert!(matches!(end_of(&actions), Some(EndReason::StreamBroken { .. })));
    assert!(leader.on(closed, ms(6)).is_empty());
    let late = leader.on(join(&spec, 1), ms(7));
    assert!(matches!(late[..], [Action::Refuse { refusal: Refusal::Ended, .. }]));
}

#[test]
fn a_silent_follower_is_frozen_within_the_timeout() {
    let spec = spec(3);
    let mut leader = leader(&spec);
    leader.on(join(&spec, 1), ms(0));
    leader.on(join(&spec, 2), ms(0));
    for t in (0..2900).step_by(100) {
        leader.on(ack(&spec, 1, 0, 0, 0), ms(t));
        let actions = leader.on(local(0), ms(t));
        assert_eq!(end_of(&actions), None, "at {t}");
    }
    leader.on(ack(&spec, 1, 0, 0, 0), ms(2950));
    let actions = leader.on(Event::Tick, ms(3000));
    assert_eq!(end_of(&actions), Some(&EndReason::Frozen { member: spec.slots[2].instance }));
}

#[test]
fn of_ranks_that_stand_still_the_one_that_computed_least_is_stuck() {
    let spec = spec(3);
    let mut leader = leader(&spec);
    leader.on(join(&spec, 1), ms(0));
    leader.on(join(&spec, 2), ms(0));
    leader.on(Event::Plan { step: StepId(1) }, ms(0));
    let mut reason = None;
    for t in (0..4000).step_by(250) {
        let events = [ack(&spec, 1, 1, 0, 10), ack(&spec, 2, 1, 0, 9), local(10)];
        for event in events {
            reason = reason.or(end_of(&leader.on(event, ms(t))).cloned());
        }
    }
    assert_eq!(reason, Some(EndReason::Stuck { member: spec.slots[2].instance }));
}

#[test]
fn ranks_that_stand_still_together_accuse_nobody() {
    let spec = spec(2);
    let mut leader = leader(&spec);
    leader.on(join(&spec, 1), ms(0));
    leader.on(Event::Plan { step: StepId(1) }, ms(0));
    let mut reason = None;
    for t in (0..4000).step_by(250) {
        for event in [ack(&spec, 1, 1, 0, 4), local(4)] {
            reason = reason.or(end_of(&leader.on(event, ms(t))).cloned());
        }
    }
    assert_eq!(reason, Some(EndReason::AllStuck));
}

#[test]
fn idle_hours_and_own_pauses_end_nothing() {
    let spec = spec(2);
    let mut leader = leader(&spec);
    leader.on(join(&spec, 1), ms(0));
    leader.on(Event::Plan { step: StepId(1) }, ms(0));
    leader.on(ack(&spec, 1, 1, 1, 3), ms(10));
    leader.on(Event::Completed { step: StepId(1) }, ms(10));
    let mut now = 0;
    for round in 0..400 {
        // Every twentieth round this process itself sleeps for ten seconds.
        now += if round % 20 == 19 { 10_000 } else { 250 };
        for event in [Event::Tick, ack(&spec, 1, 1, 1, 3), local(3)] {
            assert_eq!(end_of(&leader.on(event, ms(now))), None, "at {now}");
        }
    }
}

#[test]
fn impossible_acknowledgements_end_the_epoch() {
    let bad: [(u64, u64, u64); 4] = [(2, 0, 0), (1, 2, 0), (0, 0, 5), (1, 1, 4)];
    for (i, &(received, completed, progress)) in bad.iter().enumerate() {
        let spec = spec(2);
        let mut leader = leader(&spec);
        leader.on(join(&spec, 1), ms(0));
        leader.on(Event::Plan { step: StepId(1) }, ms(0));
        leader.on(ack(&spec, 1, 1, 1, 5), ms(1));
        let actions = leader.on(ack(&spec, 1, received, completed, progress), ms(2));
        assert!(
            matches!(end_of(&actions), Some(EndReason::ProtocolViolation { .. })),
            "case {i}: {actions:?}"
        );
    }
}

#[test]
fn a_plan_out_of_order_ends_the_epoch() {
    let spec = spec(1);
    for step in [0, 1, 3] {
        let mut leader = leader(&spec);
        leader.on(Event::Plan { step: StepId(1) }, ms(0));
        let actions = leader.on(Event::Plan { step: StepId(step) }, ms(1));
        assert!(matches!(end_of(&actions), Some(EndReason::StepGap { .. })), "step {step}");
    }
}
