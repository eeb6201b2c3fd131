use proptest::prelude::*;

mod world;

use world::{Fault, World};

/// Three slots that agree at once: the common case, step by step.
#[test]
fn a_fresh_group_forms_its_first_epoch_and_the_leader_proposes_it() {
    let mut world = World::new(3, 1);
    world.run_for_ms(2_000);
    world.assert_serving();
    assert_eq!(world.active_epoch(), 1);
    assert_eq!(world.proposals(), 1, "one proposer, one proposal");
}

#[test]
fn a_group_of_one_needs_nobody() {
    let mut world = World::new(1, 2);
    world.run_for_ms(1_000);
    world.assert_serving();
}

#[test]
fn a_killed_follower_is_replaced_and_survivors_go_on_in_the_next_epoch() {
    let mut world = World::new(2, 3);
    world.run_for_ms(2_000);
    let survivor = world.instance(0);
    world.inject(Fault::Kill { slot: 1, restart_ms: 500 });
    world.run_for_ms(3_000);
    world.assert_serving();
    assert_eq!(world.instance(0), survivor);
    assert!(world.active_epoch() > 1);
}

#[test]
fn a_killed_leader_is_replaced_without_waiting_for_its_lease() {
    let mut world = World::new(2, 4);
    world.run_for_ms(2_000);
    world.inject(Fault::Kill { slot: 0, restart_ms: 500 });
    world.run_for_ms(3_000);
    world.assert_serving();
}

#[test]
fn a_killed_group_forms_again_although_no_member_is_shared() {
    let mut world = World::new(2, 5);
    world.run_for_ms(2_000);
    world.inject(Fault::Kill { slot: 0, restart_ms: 500 });
    world.inject(Fault::Kill { slot: 1, restart_ms: 500 });
    // The dead members' keys stand until their leases end, but the slots' locks say that they are dead.
    world.run_for_ms(3_000);
    world.assert_serving();
}

#[test]
fn losing_every_lease_ends_nothing() {
    let mut world = World::new(2, 6);
    world.run_for_ms(2_000);
    let epoch = world.active_epoch();
    for slot in 0..2 {
        world.inject(Fault::LoseLease { slot, for_ms: 4_000 });
    }
    world.run_for_ms(20_000);
    world.assert_serving();
    assert_eq!(world.active_epoch(), epoch, "absence from the store is no evidence");
}

#[test]
fn a_frozen_member_is_excluded_and_returns_when_it_answers_again() {
    let mut world = World::new(2, 7);
    world.run_for_ms(2_000);
    world.inject(Fault::Freeze { slot: 1, for_ms: 6_000 });
    world.run_for_ms(5_000);
    assert_eq!(world.excluded(), [world.instance(1)]);
    world.run_for_ms(20_000);
    world.assert_serving();
    assert!(world.excluded().is_empty());
}

#[test]
fn a_frozen_member_that_registers_again_must_still_pass_its_probes() {
    let mut world = World::new(2, 11);
    world.run_for_ms(2_000);
    // Longer than the lease: it comes back as a key that was never there before.
    world.inject(Fault::Freeze { slot: 1, for_ms: 14_000 });
    world.run_for_ms(14_000);
    let probes = world.probes();
    world.reregister(1);
    world.run_for_ms(20_000);
    world.assert_serving();
    assert!(world.probes() >= probes + 2, "{} probes after its return", world.probes() - probes);
}

#[test]
fn a_mere_proposal_ends_nothing() {
    let mut world = World::new(2, 8);
    world.run_for_ms(2_000);
    let epoch = world.active_epoch();
    world.forge_proposal();
    world.run_for_ms(10_000);
    world.assert_serving();
    assert_eq!(world.active_epoch(), epoch);
    world.inject(Fault::Kill { slot: 1, restart_ms: 500 });
    world.run_for_ms(5_000);
    world.assert_serving();
    assert!(world.active_epoch() > epoch + 1, "the forged number is burned");
}

#[test]
fn members_with_other_weights_are_not_chosen() {
    let mut world = World::with_foreign_weights(2, 9);
    world.run_for_ms(20_000);
    assert_eq!(world.proposals(), 0);
    assert!(matches!(
        world.obstacle(0),
        Some(super::Obstacle::SlotsMissing { slots, unusable })
            if slots[..] == [1] && unusable[0].1 == super::candidates::Unusable::Fingerprint
    ));
}

#[test]
fn a_store_restored_from_a_backup_does_not_reuse_numbers() {
    let mut world = World::new(2, 10);
    world.run_for_ms(2_000);
    for _ in 0..4 {
        world.inject(Fault::Kill { slot: 1, restart_ms: 300 });
        world.run_for_ms(5_000);
    }
    let used = world.active_epoch();
    world.restore_first_backup();
    world.inject(Fault::Kill { slot: 1, restart_ms: 300 });
    world.run_for_ms(30_000);
    world.assert_serving();
    assert!(world.active_epoch() > used, "{} after {used}", world.active_epoch());
}

fn fault_strategy(num_slots: usize) -> impl Strategy<Value = Fault> {
    let slot = 0..num_slots;
    prop_oneof![
        3 => (slot.clone(), 100..4_000u64)
            .prop_map(|(slot, restart_ms)| Fault::Kill { slot, restart_ms }),
        2 => (slot.clone(), 100..9_000u64)
            .prop_map(|(slot, for_ms)| Fault::Freeze { slot, for_ms }),
        2 => (slot.clone(), 100..9_000u64)
            .prop_map(|(slot, for_ms)| Fault::LoseLease { slot, for_ms }),
        2 => (slot.clone(), 100..9_000u64)
            .prop_map(|(slot, for_ms)| Fault::CutStore { slot, for_ms }),
        1 => slot.prop_map(|slot| Fault::BreakStream { slot }),
        1 => Just(Fault::LoseAnswer),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Invariants are judged inside the world after every event; here that it ends well.
    #[test]
    fn whatever_happens_one_epoch_serves_and_calm_brings_it_back(
        seed in any::<u64>(),
        num_slots in 1usize..4,
        faults in proptest::collection::vec((0..3_000u64, fault_strategy(3)), 0..12),
    ) {
        let mut world = World::new(num_slots, seed);
        for (pause_ms, fault) in faults {
            world.run_for_ms(pause_ms);
            world.inject(fault.within(num_slots));
        }
        world.run_for_ms(150_000);
        world.assert_serving();
    }
}
