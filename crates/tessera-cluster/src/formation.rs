//! How the members of a group agree on their next epoch (CLUSTER §1).
//!
//! Each decoder process runs one machine. It mirrors what the store says, proposes an epoch when every
//! slot has a usable member, joins the proposal that won, and lets the leader make it active.
//!
//! Invariants
//! - A member is in at most one epoch, joins none twice, and joins the next only after the driver said
//!   that it has left the last.
//! - A mere proposal ends nothing: a serving member stays until its plan stream ends or a later epoch is
//!   active.
//! - A proposal shares a member with the active epoch, unless all members of that are gone from the
//!   store and unreachable, or an operator forces it.
//! - A proposal names only members whose own record says that they have left the active epoch.

use std::mem::{self, Discriminant};
use std::time::Duration;

use tessera_types::Epoch;

use crate::config::FormationConfig;
use crate::epoch_end::EndReason;
use crate::error::ClusterError;
use crate::keys::{GroupName, Keys};
use crate::records::{
    ActiveRecord, ActiveState, DecoderMember, EpochSpec, IdRecord, MemberInfo, ModelIdentity,
    ReadyRecord, Record,
};

mod candidates;
mod messages;
mod mirror;
mod probes;
mod proposing;

pub use candidates::{Obstacle, Unusable};
pub use messages::{Action, Compare, Event, TxnOutcome};
use mirror::Mirror;
use probes::Probes;

/// The machine.
#[derive(Debug)]
pub struct Formation {
    config: FormationConfig,
    keys: Keys,
    me: MemberInfo,
    place: DecoderMember,
    model: ModelIdentity,
    mirror: Mirror,
    probes: Probes,
    phase: Phase,
    /// Highest epoch this process ever joined.
    last_joined: Epoch,
    failures: u32,
    not_before: Duration,
    eligible_since: Option<Duration>,
    /// A proposal without an answer, and when to stop waiting for one.
    in_flight: Option<(Epoch, Duration)>,
    publish_again_at: Duration,
    forced: bool,
    retired: bool,
    obstacle: Option<Obstacle>,
    wake: Option<Duration>,
}

#[derive(Debug)]
enum Phase {
    Outside,
    Forming(Box<Forming>),
    Serving(Box<EpochSpec>),
    Leaving { epoch: Epoch },
    Retired,
}

#[derive(Debug)]
struct Forming {
    spec: EpochSpec,
    /// Revision of the epoch record that proposed it.
    revision: i64,
    deadline: Duration,
    step: Step,
    /// The id we made (rank 0).
    id: Option<Vec<u8>>,
    /// The write last sent to the store, and when to send it again if it is still owed.
    written: Option<Discriminant<Action>>,
    resend_at: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    AwaitId,
    Initialising,
    Canary,
    AwaitReady,
    Activating,
}

/// Where the machine stands, for status pages and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Outside,
    Forming(Epoch),
    Serving(Epoch),
    Leaving(Epoch),
    Retired,
}

impl Formation {
    /// A machine for the decoder that `me` describes. Refuses members of other roles.
    pub fn new(config: FormationConfig, keys: Keys, me: MemberInfo) -> Result<Self, ClusterError> {
        config.validate()?;
        me.check()?;
        let (Some(place), Some(model)) = (me.decoder().cloned(), me.model.clone()) else {
            let detail = "only decoders with a model form groups".to_owned();
            return Err(ClusterError::InconsistentRecord { record: MemberInfo::NAME, detail });
        };
        Ok(Self {
            config,
            keys,
            last_joined: place.last_epoch,
            me,
            place,
            model,
            mirror: Mirror::default(),
            probes: Probes::default(),
            phase: Phase::Outside,
            failures: 0,
            not_before: Duration::ZERO,
            eligible_since: None,
            in_flight: None,
            publish_again_at: Duration::ZERO,
            forced: false,
            retired: false,
            obstacle: None,
            wake: None,
        })
    }

    /// Where the machine stands.
    pub fn state(&self) -> State {
        match &self.phase {
            Phase::Outside => State::Outside,
            Phase::Forming(forming) => State::Forming(forming.spec.epoch),
            Phase::Serving(spec) => State::Serving(spec.epoch),
            Phase::Leaving { epoch } => State::Leaving(*epoch),
            Phase::Retired => State::Retired,
        }
    }

    /// What keeps this member from proposing, while it is outside.
    pub fn obstacle(&self) -> Option<&Obstacle> {
        self.obstacle.as_ref()
    }

    /// The spec of the epoch that this member is in.
    pub fn spec(&self) -> Option<&EpochSpec> {
        match &self.phase {
            Phase::Forming(forming) => Some(&forming.spec),
            Phase::Serving(spec) => Some(spec),
            _ => None,
        }
    }

    /// The active record as last seen, with the revision of its last change.
    pub fn active(&self) -> Option<(&ActiveRecord, i64)> {
        self.mirror.active.as_ref().map(|entry| (&entry.value, entry.mod_revision))
    }

    /// The group.
    pub fn group(&self) -> &GroupName {
        &self.place.group
    }

    /// When `Tick` is wanted at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        self.wake
    }

    /// Advances the machine.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        self.wake = None;
        self.apply(event, now, &mut actions);
        if matches!(self.phase, Phase::Outside) {
            self.advance_outside(now, &mut actions);
        }
        match self.phase {
            Phase::Forming(_) => self.advance_forming(now, &mut actions),
            Phase::Serving(_) => self.advance_serving(now, &mut actions),
            _ => {}
        }
        actions
    }

    fn apply(&mut self, event: Event, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::Proposed { epoch, outcome } => self.on_proposed(epoch, outcome, now),
            Event::Activated { epoch, outcome } => self.on_activated(epoch, outcome, now, actions),
            Event::IdMade { epoch, id } => self.on_id_made(epoch, id),
            Event::CommunicatorReady { epoch } => self.on_communicator_ready(epoch, actions),
            Event::CanaryPassed { epoch } => self.set_step(epoch, Step::Canary, Step::AwaitReady),
            Event::CommunicatorFailed { epoch, detail } => {
                self.end_if(epoch, EndReason::CommunicatorFailed { detail }, now, actions);
            }
            Event::CanaryFailed { epoch, detail } => {
                self.end_if(epoch, EndReason::CanaryFailed { detail }, now, actions);
            }
            Event::Ended(end) => self.end_if(end.epoch, end.reason, now, actions),
            Event::Left { epoch } => self.on_left(epoch),
            Event::ProbeResult { instance, reachable } => {
                self.probes.on_result(instance, reachable, now);
            }
            Event::Force => self.forced = true,
            Event::Retire => self.on_retire(now, actions),
            Event::Tick => {}
            Event::EpochPut { .. } => {
                self.eligible_since = None;
                self.mirror.apply(event, now);
                self.on_epoch_record(now);
            }
            store => self.mirror.apply(store, now),
        }
    }

    fn on_epoch_record(&mut self, now: Duration) {
        let Some(entry) = &self.mirror.epoch else { return };
        if self.in_flight.is_some_and(|(epoch, _)| entry.value.counter >= epoch) {
            self.in_flight = None;
        }
        let me = self.me.instance;
        for &instance in entry.value.excluded.iter().filter(|&&instance| instance != me) {
            self.probes.suspect(instance, true, now);
        }
    }

    fn on_left(&mut self, left: Epoch) {
        if matches!(self.phase, Phase::Leaving { epoch } if epoch == left) {
            self.phase = if self.retired { Phase::Retired } else { Phase::Outside };
            self.eligible_since = None;
        }
    }

    fn on_retire(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.retired = true;
        match self.phase {
            Phase::Outside => self.phase = Phase::Retired,
            Phase::Forming(_) | Phase::Serving(_) => self.leave(EndReason::Drained, now, actions),
            Phase::Leaving { .. } | Phase::Retired => {}
        }
    }

    fn end_if(&mut self, epoch: Epoch, reason: EndReason, now: Duration, out: &mut Vec<Action>) {
        if self.spec().is_some_and(|spec| spec.epoch == epoch) {
            self.leave(reason, now, out);
        }
    }

    /// Leaves the epoch we are in and remembers what the reason teaches.
    fn leave(&mut self, reason: EndReason, now: Duration, actions: &mut Vec<Action>) {
        let Some(spec) = self.spec() else { return };
        let epoch = spec.epoch;
        let leads = spec.leader().instance == self.me.instance;
        for accused in reason.accused() {
            if accused != self.me.instance {
                self.probes.suspect(accused, reason.is_frozen(), now);
            }
        }
        let burned = matches!(self.phase, Phase::Forming(_));
        if burned && !matches!(reason, EndReason::Superseded { .. }) {
            let backoff = self.config.min_backoff * 2u32.pow(self.failures.min(10));
            self.failures += 1;
            self.not_before = now + backoff.min(self.config.max_backoff);
        }
        let mut keys = vec![self.keys.ready(&self.place.group, epoch, self.me.instance)];
        if leads {
            keys.push(self.keys.id(&self.place.group, epoch));
        }
        actions.push(Action::Leave { epoch, reason });
        actions.push(Action::Forget { keys });
        self.phase = Phase::Leaving { epoch };
    }

    /// The current proposal, if it names us, we never joined it, and it can still become active. Saying
    /// that we left the active epoch comes first: it changes our key, on which a proposal rests.
    fn joinable(&self) -> Option<(&EpochSpec, i64)> {
        if self.mirror.may_run_active(self.me.instance) {
            return None;
        }
        let entry = self.mirror.epoch.as_ref()?;
        let spec = entry.value.spec.as_ref()?;
        let slot = spec.slot_of(self.me.instance)?;
        let own_revision = self.mirror.members.get(&self.me.instance)?.mod_revision;
        let fresh = spec.epoch > self.last_joined
            && slot.slot == self.place.slot
            && slot.member_revision == own_revision
            && spec.world_size == self.place.world_size;
        fresh.then_some((spec, entry.mod_revision))
    }

    fn join(&mut self, spec: EpochSpec, revision: i64, now: Duration, actions: &mut Vec<Action>) {
        self.last_joined = spec.epoch;
        self.obstacle = None;
        if spec.leader().instance == self.me.instance {
            actions.push(Action::MakeId { epoch: spec.epoch });
        }
        self.phase = Phase::Forming(Box::new(Forming {
            spec,
            revision,
            deadline: now + self.config.forming_timeout,
            step: Step::AwaitId,
            id: None,
            written: None,
            resend_at: now,
        }));
    }

    fn on_id_made(&mut self, epoch: Epoch, id: Vec<u8>) {
        if let Phase::Forming(forming) = &mut self.phase
            && forming.spec.epoch == epoch
            && forming.step == Step::AwaitId
        {
            forming.id = Some(id);
        }
    }

    fn on_communicator_ready(&mut self, epoch: Epoch, actions: &mut Vec<Action>) {
        let leads = self.spec().is_some_and(|spec| spec.leader().instance == self.me.instance);
        let next = if leads { Step::Canary } else { Step::AwaitReady };
        let before = self.forming_step();
        self.set_step(epoch, Step::Initialising, next);
        if before != self.forming_step() && leads {
            actions.push(Action::RunCanary { epoch });
        }
    }

    fn forming_step(&self) -> Option<Step> {
        match &self.phase {
            Phase::Forming(forming) => Some(forming.step),
            _ => None,
        }
    }

    fn set_step(&mut self, epoch: Epoch, from: Step, to: Step) {
        if let Phase::Forming(forming) = &mut self.phase
            && forming.spec.epoch == epoch
            && forming.step == from
        {
            forming.step = to;
        }
    }

    fn advance_serving(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Serving(spec) = &self.phase else { return };
        if let Some(by) = self.mirror.active_beyond(spec.epoch) {
            self.leave(EndReason::Fenced { by }, now, actions);
        }
    }

    fn advance_forming(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let Some(reason) = self.forming_failure(now) {
            return self.leave(reason, now, actions);
        }
        let Phase::Forming(forming) = &mut self.phase else { return };
        let epoch = forming.spec.epoch;
        if self.mirror.active_epoch() == epoch {
            return self.serve(actions);
        }
        if forming.step == Step::AwaitId {
            let id = match &forming.id {
                Some(id) => Some(id.clone()),
                None if forming.spec.leader().instance == self.me.instance => None,
                None => self.mirror.id_of(epoch),
            };
            if let Some(id) = id {
                forming.step = Step::Initialising;
                let (spec, deadline) = (Box::new(forming.spec.clone()), forming.deadline);
                actions.push(Action::InitCommunicator { spec, id, deadline });
            }
        }
        self.write_forming(now, actions);
    }

    /// Why the epoch being formed can no longer become active.
    fn forming_failure(&self, now: Duration) -> Option<EndReason> {
        let Phase::Forming(forming) = &self.phase else { return None };
        let spec = &forming.spec;
        if let Some(by) = self.mirror.active_beyond(spec.epoch) {
            return Some(EndReason::Fenced { by });
        }
        if self.mirror.active_epoch() == spec.epoch {
            return None;
        }
        let record = self.mirror.epoch.as_ref()?;
        if record.mod_revision != forming.revision {
            return Some(EndReason::Superseded { by: record.value.counter });
        }
        if let Some(slot) = spec.slots.iter().find(|slot| !self.mirror.is_unchanged(slot)) {
            return Some(EndReason::MemberChanged { member: slot.instance });
        }
        if now >= forming.deadline {
            let not_ready = |slot: &&_| !self.mirror.is_ready(spec, slot);
            let missing = spec.slots.iter().filter(not_ready).map(|slot| slot.instance).collect();
            return Some(EndReason::FormingTimeout { missing });
        }
        None
    }

    /// Writes what this step owes to the store, again and again until it is seen there.
    fn write_forming(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Forming(forming) = &self.phase else { return };
        let deadline = forming.deadline;
        let Some(write) = self.owed_write(forming) else {
            return self.wake_at(deadline);
        };
        let Phase::Forming(forming) = &mut self.phase else { return };
        let kind = Some(mem::discriminant(&write));
        if forming.written != kind || now >= forming.resend_at {
            if matches!(write, Action::Activate { .. }) {
                forming.step = Step::Activating;
            }
            forming.written = kind;
            forming.resend_at = now + self.config.txn_timeout;
            actions.push(write);
        }
        let resend_at = forming.resend_at;
        self.wake_at(deadline.min(resend_at));
    }

    fn owed_write(&self, forming: &Forming) -> Option<Action> {
        let (spec, me) = (&forming.spec, self.me.instance);
        let epoch = spec.epoch;
        if let Some(id) = &forming.id
            && self.mirror.id_of(epoch).is_none()
        {
            return Some(Action::PutId { record: IdRecord { epoch, id: id.clone() } });
        }
        if !matches!(forming.step, Step::AwaitReady | Step::Activating) {
            return None;
        }
        let own = spec.slot_of(me)?;
        if !self.mirror.is_ready(spec, own) {
            let num_kv_blocks = spec.num_kv_blocks;
            return Some(Action::PutReady {
                record: ReadyRecord { instance: me, epoch, num_kv_blocks },
            });
        }
        let complete = spec.slots.iter().all(|slot| self.mirror.is_ready(spec, slot));
        (spec.leader().instance == me && complete).then(|| self.activation(forming))
    }

    fn activation(&self, forming: &Forming) -> Action {
        let (spec, group) = (&forming.spec, &self.place.group);
        let compare = |key, mod_revision| Compare { key, mod_revision };
        let mut compares = vec![compare(self.keys.epoch(group), forming.revision)];
        for slot in &spec.slots {
            compares.push(compare(self.keys.member(slot.instance), slot.member_revision));
            let key = self.keys.ready(group, spec.epoch, slot.instance);
            compares.push(compare(key, self.mirror.ready_revision(spec, slot)));
        }
        let record = ActiveRecord {
            epoch: spec.epoch,
            state: ActiveState::Serving,
            instance: self.me.instance,
            address: self.me.address.clone(),
            spec_digest: spec.digest(),
            slots: spec.slots.clone(),
            model: self.model.clone(),
            world_size: spec.world_size,
            capacity: self.mirror.joint_capacity(spec, self.place.capacity),
        };
        Action::Activate { record: Box::new(record), compares }
    }

    fn on_activated(
        &mut self,
        epoch: Epoch,
        outcome: TxnOutcome,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Phase::Forming(forming) = &mut self.phase else { return };
        if forming.spec.epoch != epoch || forming.step != Step::Activating {
            return;
        }
        match outcome {
            TxnOutcome::Committed => self.serve(actions),
            TxnOutcome::Conflict => self.leave(EndReason::ActivationRefused, now, actions),
            TxnOutcome::Unknown => forming.resend_at = now + self.config.min_backoff,
        }
    }

    fn serve(&mut self, actions: &mut Vec<Action>) {
        let Phase::Forming(forming) = &self.phase else { return };
        let spec = forming.spec.clone();
        actions.push(Action::Serve { epoch: spec.epoch });
        self.failures = 0;
        self.not_before = Duration::ZERO;
        self.forced = false;
        self.probes.clear();
        self.phase = Phase::Serving(Box::new(spec));
    }

    fn wake_at(&mut self, at: Duration) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

#[cfg(test)]
mod tests;
