//! Fair shares, bounds of the queue, and the budget that changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use tessera_scheduler::{AddError, SchedulerConfig, SequenceRequest};
use tessera_types::{SequenceId, StepPlan, TenantId};

use crate::support::{Driver, config, prompt, request};

fn request_of(tenant: u64, id: u64, num_tokens: u32, max_tokens: u32) -> SequenceRequest {
    let mut request = request(id, prompt(tenant as u32, num_tokens, &[]), max_tokens);
    Arc::make_mut(&mut request.sampling).ignore_eos = true;
    SequenceRequest { tenant: TenantId(tenant), ..request }
}

/// Tenants that always have sequences waiting, and what was computed for them.
struct Backlog {
    driver: Driver,
    next_id: u64,
    slots: BTreeMap<u32, u64>,
    served: BTreeMap<u64, usize>,
}

impl Backlog {
    fn new(config: SchedulerConfig) -> Self {
        let driver = Driver::new(config, 200);
        Self { driver, next_id: 1, slots: BTreeMap::new(), served: BTreeMap::new() }
    }

    fn add(&mut self, tenant: u64, num_tokens: u32, max_tokens: u32) -> Option<SequenceId> {
        let request = request_of(tenant, self.next_id, num_tokens, max_tokens);
        let added = self.driver.add(request).is_ok();
        self.next_id += u64::from(added);
        added.then_some(SequenceId(self.next_id - 1))
    }

    fn fill(&mut self, tenant: u64, num_tokens: u32, max_tokens: u32) {
        while self.add(tenant, num_tokens, max_tokens).is_some() {}
    }

    fn turn(&mut self) {
        if let Some(plan) = self.driver.turn() {
            self.count(&plan);
        }
    }

    fn count(&mut self, plan: &StepPlan) {
        for admitted in &plan.admitted {
            let tenant = self.driver.seen[&admitted.sequence].request.tenant.0;
            self.slots.insert(admitted.slot.0, tenant);
        }
        for scheduled in &plan.scheduled {
            let tenant = self.slots[&scheduled.slot.0];
            *self.served.entry(tenant).or_insert(0) += scheduled.num_tokens as usize;
        }
    }
}

fn limits() -> SchedulerConfig {
    SchedulerConfig { max_waiting: 24, max_waiting_per_tenant: 8, ..config() }
}

#[test]
fn tenants_are_served_equally_whatever_the_size_of_their_requests() {
    let mut backlog = Backlog::new(limits());
    for _ in 0..2000 {
        backlog.fill(1, 40, 4);
        backlog.fill(2, 3, 2);
        backlog.fill(3, 9, 15);
        backlog.turn();
    }
    let (least, most) =
        (backlog.served.values().min().unwrap(), backlog.served.values().max().unwrap());
    // What the sequences of one tenant can cost that hold every slot, and one admission more.
    let bound = (limits().max_running as usize + 1) * 44;
    assert!(*least > 3000 && most - least <= bound, "{:?}", backlog.served);
}

#[test]
fn a_short_budget_is_shared_between_running_prompts() {
    let mut backlog = Backlog::new(limits());
    backlog.add(1, 60, 1).expect("room");
    backlog.turn();
    backlog.add(2, 24, 1).expect("room");
    // Eight tokens a step. Alone, the first prompt would take seven more steps before the second begins.
    for _ in 0..6 {
        backlog.turn();
    }
    assert_eq!(backlog.served, BTreeMap::from([(1, 32), (2, 24)]));
}

#[test]
fn a_tenant_cannot_fill_the_queue() {
    let mut driver = Driver::new(limits(), 100);
    for id in 1..=8 {
        driver.add(request_of(7, id, 4, 1)).expect("its own share");
    }
    let refused = driver.add(request_of(7, 9, 4, 1));
    let tenant = TenantId(7);
    assert_eq!(refused, Err(AddError::TenantQueueFull { tenant, max_waiting_per_tenant: 8 }));
    for id in 10..18 {
        driver.add(request_of(0, id, 4, 1)).expect("the others' share");
    }
    assert!(matches!(
        driver.add(request_of(0, 20, 4, 1)),
        Err(AddError::TenantQueueFull { tenant: TenantId(0), .. })
    ));
    driver.run();
    driver.check_end();
    let config = SchedulerConfig { max_waiting: 9, max_waiting_per_tenant: 0, ..limits() };
    assert_eq!(config.max_waiting_of_tenant(), 7, "three quarters, rounded up");
}

#[test]
fn the_budget_changes_within_its_bounds() {
    let mut driver = Driver::new(SchedulerConfig { reserved_blocks: 1, ..config() }, 40);
    driver.add(request_of(1, 1, 30, 2)).expect("accepted");
    assert_eq!(driver.scheduler.set_token_budget(6), 6);
    assert_eq!(driver.turn().expect("work").num_tokens(), 6);
    assert_eq!(driver.scheduler.set_token_budget(0), 5, "a token for each slot, the reserve's too");
    assert_eq!(driver.turn().expect("work").num_tokens(), 5);
    assert_eq!(driver.scheduler.set_token_budget(100), 8, "never beyond the hard bound");
    assert_eq!(driver.turn().expect("work").num_tokens(), 8);
    driver.run();
    driver.check_end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A tenant that keeps its share of the queue full delays another's sequence by what its running
    /// sequences still had to do and no more than an equal share of the work after that.
    #[test]
    fn a_flood_delays_another_tenant_by_bounded_work(
        max_running in 1..5u32,
        extra_budget in 1..12u32,
        flood in (1..40u32, 1..20u32),
        own in (1..40u32, 1..20u32),
        warm_up in 0..60usize,
    ) {
        let config = SchedulerConfig {
            max_running,
            max_tokens_per_step: max_running + extra_budget,
            ..limits()
        };
        let mut backlog = Backlog::new(config);
        for _ in 0..warm_up {
            backlog.fill(1, flood.0, flood.1);
            backlog.turn();
        }
        backlog.fill(1, flood.0, flood.1);
        let own_work = (own.0 + own.1) as usize;
        let id = backlog.add(2, own.0, own.1).expect("room for another tenant");
        let before = backlog.served.get(&1).copied().unwrap_or(0);
        let step_before = backlog.driver.num_steps;
        while backlog.driver.seen[&id].finished.is_none() {
            backlog.turn();
            backlog.fill(1, flood.0, flood.1);
        }
        let delay = backlog.served[&1] - before;
        // Until a slot is free: what the running sequences lack. Then: one token per step and slot while
        // it decodes, and turn by turn a budget for each of its own while it is prefilled.
        let running = max_running as usize * (flood.0 + flood.1) as usize;
        let budget = (max_running + extra_budget) as usize;
        let steps_of_own = own_work.div_ceil(extra_budget as usize).max(own.1 as usize) + 1;
        let bound = running + 2 * own_work + budget * (own.1 as usize + 2 + steps_of_own.min(own.0 as usize));
        prop_assert!(delay <= bound, "{delay} tokens of work, bound {bound}, {} steps", backlog.driver.num_steps - step_before);
    }
}
