use tessera_types::{Hash256, ModelFingerprint, NumericsId, Rank};

use super::*;
use crate::records::{DecoderCapacity, ModelIdentity, SlotAssignment};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn model() -> ModelIdentity {
    let zero = Hash256::default();
    ModelIdentity {
        name: "qwen".into(),
        language_fingerprint: ModelFingerprint(zero),
        vision_fingerprint: ModelFingerprint(zero),
        language_numerics: NumericsId(zero),
        vision_numerics: NumericsId(zero),
    }
}

fn encoder() -> MemberInfo {
    let instance = InstanceId::random();
    MemberInfo {
        instance,
        address: format!("{instance}:1"),
        build: String::new(),
        model: Some(model()),
        role: MemberRole::Encoder(EncoderMember {
            device: "cpu".into(),
            max_queued_pixels: 1,
            max_item_pixels: 1,
            cache_bytes: 1,
        }),
    }
}

fn name(i: usize) -> GroupName {
    GroupName::new(format!("g{i}")).unwrap()
}

fn active(epoch: u64, instance: InstanceId) -> ActiveRecord {
    let slot = SlotAssignment {
        slot: 0,
        first_rank: Rank(0),
        num_ranks: 1,
        instance,
        address: "leader:1".into(),
        member_revision: 1,
    };
    ActiveRecord {
        epoch: Epoch(epoch),
        state: ActiveState::Serving,
        instance,
        address: "leader:1".into(),
        spec_digest: Hash256::default(),
        slots: vec![slot],
        model: model(),
        world_size: 1,
        capacity: DecoderCapacity {
            num_kv_blocks: 1,
            block_size: 16,
            max_sequences: 1,
            max_model_len: 1,
        },
    }
}

fn put(group: usize, record: ActiveRecord) -> Event {
    Event::ActivePut { group: name(group), record: Box::new(record) }
}

fn health(instance: InstanceId, epoch: u64, state: GroupState) -> Event {
    Event::GroupHealth { instance, epoch: Epoch(epoch), state, load: GroupLoad::default() }
}

fn only_group(view: &View, now: Duration) -> (Epoch, Verdict) {
    let statuses: Vec<_> = view.groups(now).collect();
    assert_eq!(statuses.len(), 1);
    (statuses[0].epoch, statuses[0].verdict)
}

#[test]
fn a_group_is_ready_when_record_and_leader_agree() {
    let mut view = View::new(ViewConfig::default());
    let leader = InstanceId::random();
    let actions = view.on(put(0, active(3, leader)), ms(0));
    assert!(matches!(&actions[..], [Action::OpenHealth { instance, .. }] if *instance == leader));
    assert_eq!(only_group(&view, ms(0)), (Epoch(3), Verdict::Suspect));
    view.on(health(leader, 3, GroupState::Serving), ms(10));
    assert_eq!(only_group(&view, ms(10)), (Epoch(3), Verdict::Ready));
    view.on(health(leader, 2, GroupState::Serving), ms(20));
    assert_eq!(only_group(&view, ms(20)), (Epoch(3), Verdict::Out), "an earlier epoch");
    view.on(health(leader, 3, GroupState::Draining), ms(30));
    assert_eq!(only_group(&view, ms(30)), (Epoch(3), Verdict::Draining));
}

#[test]
fn an_epoch_never_goes_back() {
    let mut view = View::new(ViewConfig::default());
    let (old, new) = (InstanceId::random(), InstanceId::random());
    view.on(put(0, active(3, old)), ms(0));
    let actions = view.on(put(0, active(5, new)), ms(1));
    assert!(actions.contains(&Action::Drop { instance: old }));
    view.on(put(0, active(4, old)), ms(2));
    view.on(health(new, 5, GroupState::Serving), ms(3));
    view.on(health(old, 9, GroupState::Serving), ms(4));
    assert_eq!(only_group(&view, ms(4)), (Epoch(5), Verdict::Ready));
    view.on(Event::Listing { members: vec![], actives: vec![(name(0), active(4, old))] }, ms(5));
    assert_eq!(only_group(&view, ms(5)), (Epoch(5), Verdict::Ready), "a restored backup");
}

#[test]
fn without_the_store_the_leader_brings_its_next_epoch() {
    let mut view = View::new(ViewConfig::default());
    let leader = InstanceId::random();
    view.on(put(0, active(3, leader)), ms(0));
    view.on(Event::Disconnected, ms(1));
    view.on(health(leader, 4, GroupState::Forming), ms(2));
    assert_eq!(only_group(&view, ms(2)), (Epoch(3), Verdict::Out));
    view.on(health(leader, 4, GroupState::Serving), ms(3));
    assert_eq!(only_group(&view, ms(3)), (Epoch(4), Verdict::Ready));
    assert_eq!(view.stale_since(), Some(ms(1)));
}

#[test]
fn deleted_endpoints_stay_while_they_are_healthy_and_go_when_they_are_not() {
    let mut view = View::new(ViewConfig::default());
    let members: Vec<_> = (0..4).map(|_| encoder()).collect();
    view.on(Event::Listing { members: members.clone(), actives: vec![] }, ms(0));
    let report = |i: usize| Event::EncoderHealth {
        instance: members[i].instance,
        report: SelfReport::Ready,
        load: EncoderLoad::default(),
    };
    for i in 0..4 {
        view.on(report(i), ms(0));
    }
    let gone = members[0].instance;
    let actions = view.on(Event::MemberDeleted { instance: gone }, ms(1));
    assert_eq!(actions, [], "one delete alarms nobody");
    assert_eq!(view.encoders(ms(1)).count(), 4);
    let actions = view.on(Event::HealthBroken { instance: gone }, ms(2));
    assert_eq!(actions, [Action::Drop { instance: gone }]);
    assert_eq!(view.encoders(ms(2)).count(), 3);
}

#[test]
fn a_mass_delete_is_doubted() {
    let mut view = View::new(ViewConfig::default());
    let members: Vec<_> = (0..4).map(|_| encoder()).collect();
    view.on(Event::Listing { members: members.clone(), actives: vec![] }, ms(0));
    let report_all = |view: &mut View, t: u64| {
        for member in &members {
            let report = SelfReport::Ready;
            let load = EncoderLoad::default();
            view.on(Event::EncoderHealth { instance: member.instance, report, load }, ms(t));
        }
    };
    report_all(&mut view, 0);
    let actions = view.on(Event::Listing { members: vec![], actives: vec![] }, ms(1));
    assert!(actions.iter().any(|action| matches!(action, Action::MassDelete { known: 4, .. })));
    (1..=60).for_each(|second| report_all(&mut view, second * 1000));
    let ready = view.encoders(ms(60_000)).filter(|e| e.verdict == Verdict::Ready).count();
    assert_eq!(ready, 4, "healthy endpoints outlive a store that lost its data");
}

#[test]
fn a_broken_health_stream_is_opened_again() {
    let mut view = View::new(ViewConfig::default());
    let leader = InstanceId::random();
    view.on(put(0, active(1, leader)), ms(0));
    view.on(Event::HealthBroken { instance: leader }, ms(10));
    assert_eq!(only_group(&view, ms(10)).1, Verdict::Out);
    let at = view.deadline(ms(10)).expect("it wants to reopen");
    let actions = view.on(Event::Tick, at);
    assert!(matches!(actions[..], [Action::OpenHealth { .. }]));
    assert_eq!(view.on(Event::Tick, at), [], "once");
    view.on(health(leader, 1, GroupState::Serving), at);
    assert_eq!(only_group(&view, at).1, Verdict::Ready);
}

#[test]
fn a_snapshot_restores_the_view_but_no_opinions() {
    let mut view = View::new(ViewConfig::default());
    let leader = InstanceId::random();
    view.on(put(0, active(7, leader)), ms(0));
    view.on(Event::MemberPut { member: Box::new(encoder()) }, ms(0));
    view.on(health(leader, 7, GroupState::Serving), ms(0));
    let snapshot = view.snapshot();
    let json = serde_json::to_string(&snapshot).unwrap();
    let snapshot: Snapshot = serde_json::from_str(&json).unwrap();
    let (restored, actions) = View::restore(ViewConfig::default(), snapshot, ms(5));
    assert_eq!(actions.len(), 2);
    assert_eq!(only_group(&restored, ms(5)), (Epoch(7), Verdict::Suspect));
    assert_eq!(restored.encoders(ms(5)).count(), 1);
    assert!(!restored.is_synced());
}
