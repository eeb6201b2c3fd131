use tessera_types::Rank;

use super::*;
use crate::records::SlotAssignment;

const EPOCH: Epoch = Epoch(7);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn follower() -> (Follower, Vec<Action>) {
    let slot = |slot: u32| SlotAssignment {
        slot,
        first_rank: Rank(slot),
        num_ranks: 1,
        instance: InstanceId::random(),
        address: format!("127.0.0.1:{slot}"),
        member_revision: 1,
    };
    let slots = vec![slot(0), slot(1)];
    let proposer = slots[0].instance;
    let spec = EpochSpec { epoch: EPOCH, slots, world_size: 2, num_kv_blocks: 1, proposer };
    Follower::start(StreamConfig::default(), spec, 1, ms(0))
}

fn plan(step: u64) -> Event {
    Event::Plan { epoch: EPOCH, step: StepId(step) }
}

fn beat(step: u64) -> Event {
    Event::Beat { epoch: EPOCH, step: StepId(step) }
}

fn report(progress: u64) -> Event {
    Event::LocalReport { report: Report { progress, layer_time: ms(1) } }
}

fn end_of(actions: &[Action]) -> Option<&EndReason> {
    actions.iter().find_map(|action| match action {
        Action::End(end) => Some(&end.reason),
        _ => None,
    })
}

#[test]
fn the_leader_is_dialled_once_and_plans_run_in_order() {
    let (mut follower, dial) = follower();
    assert!(
        matches!(&dial[..], [Action::Dial { address, slot: 1, .. }] if address == "127.0.0.1:0")
    );
    follower.on(Event::Opened, ms(1));
    for step in 1..=3 {
        let actions = follower.on(plan(step), ms(10 * step));
        assert_eq!(actions[0], Action::Execute { step: StepId(step) });
        assert!(matches!(actions[1], Action::SendAck { received, .. } if received == StepId(step)));
    }
    let actions = follower.on(Event::Completed { step: StepId(2) }, ms(50));
    assert!(matches!(
        actions[..],
        [Action::SendAck { received: StepId(3), completed: StepId(2), .. }]
    ));
    assert_eq!(end_of(&follower.on(beat(3), ms(60))), None);
}

#[test]
fn gaps_repeats_and_foreign_epochs_end_the_epoch_once() {
    let bad = [
        plan(1),
        plan(3),
        plan(0),
        beat(2),
        beat(0),
        Event::Plan { epoch: Epoch(6), step: StepId(2) },
        Event::Beat { epoch: Epoch(8), step: StepId(1) },
        Event::Closed { detail: "reset".into() },
        Event::PeerAbort { epoch: EPOCH, detail: "bye".into() },
    ];
    for event in bad {
        let (mut follower, _) = follower();
        follower.on(Event::Opened, ms(1));
        follower.on(plan(1), ms(2));
        let actions = follower.on(event.clone(), ms(3));
        assert!(end_of(&actions).is_some(), "{event:?}");
        assert!(!actions.iter().any(|a| matches!(a, Action::Execute { .. })), "{event:?}");
        assert!(follower.on(plan(2), ms(4)).is_empty(), "{event:?}");
        assert_eq!(follower.deadline(), None);
    }
}

#[test]
fn an_abort_of_another_epoch_is_ignored() {
    let (mut follower, _) = follower();
    follower.on(Event::Opened, ms(1));
    let actions = follower.on(Event::PeerAbort { epoch: Epoch(6), detail: "late".into() }, ms(2));
    assert_eq!(end_of(&actions), None);
}

#[test]
fn three_silent_seconds_end_the_epoch_and_beats_prevent_it() {
    let (mut follower, _) = follower();
    follower.on(Event::Opened, ms(0));
    for t in (400..8000).step_by(400) {
        assert_eq!(end_of(&follower.on(beat(0), ms(t))), None);
        assert!(follower.hears_leader(ms(t)));
    }
    let mut now = ms(7600);
    let mut reason = None;
    while reason.is_none() && now < ms(20_000) {
        now = follower.deadline().expect("runs until it ends");
        reason = end_of(&follower.on(Event::Tick, now)).cloned();
    }
    assert!(matches!(reason, Some(EndReason::Frozen { .. })));
    assert_eq!(now, ms(7600 + 3000));
    assert!(!follower.hears_leader(now));
}

#[test]
fn reports_flow_while_nothing_else_does() {
    let (mut follower, _) = follower();
    follower.on(Event::Opened, ms(0));
    let mut acks = 0;
    let mut now = ms(0);
    while now < ms(2500) {
        now = follower.deadline().unwrap();
        let actions = follower.on(Event::Tick, now);
        acks += actions.iter().filter(|a| matches!(a, Action::SendAck { .. })).count();
    }
    assert!(acks >= 10, "{acks} acks in 2.5 s");
}

#[test]
fn a_standstill_that_nobody_judged_ends_the_epoch_at_last() {
    let (mut follower, _) = follower();
    follower.on(Event::Opened, ms(0));
    follower.on(plan(1), ms(0));
    let mut ended_at = None;
    for t in (0..12_000).step_by(250) {
        let mut actions = follower.on(beat(1), ms(t));
        actions.extend(follower.on(report(5), ms(t)));
        if end_of(&actions) == Some(&EndReason::AllStuck) {
            ended_at = Some(t);
            break;
        }
    }
    assert_eq!(ended_at, Some(9000));
}
