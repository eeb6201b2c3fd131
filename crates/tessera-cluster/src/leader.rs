//! The leader's side of an epoch's plan streams.
//!
//! Invariants
//! - Each follower opens its stream once; a stream that closes ends the epoch and is never reopened.
//! - Steps go out numbered 1, 2, 3, …; no follower is silent or without work to show for longer than
//!   the rules of [`crate::progress`] allow.
//! - The epoch ends exactly once, with one reason, which is fanned out to all followers.

use std::collections::BTreeMap;
use std::time::Duration;

use tessera_types::{Epoch, InstanceId, StepId};

use crate::config::StreamConfig;
use crate::epoch_end::{EndReason, EpochEnd};
use crate::fence::{Fence, Refusal};
use crate::progress::{Condition, PauseDetector, ProgressWatch, Report};
use crate::records::EpochSpec;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A follower sent the first message of a stream. Answered with `Accept` or `Refuse`.
    Join { cluster: String, group: String, epoch: Epoch, instance: InstanceId, slot: u32 },
    /// An accepted stream closed or broke.
    Closed { instance: InstanceId, detail: String },
    /// An accepted follower acknowledged.
    Ack { instance: InstanceId, received: StepId, completed: StepId, report: Report },
    /// An accepted follower gave the epoch up.
    PeerAbort { instance: InstanceId, epoch: Epoch, detail: String },
    /// Our engine has the next plan. Allowed after `AllConnected`.
    Plan { step: StepId },
    /// Our own ranks completed steps up to this.
    Completed { step: StepId },
    /// Counters of our own ranks.
    LocalReport { report: Report },
    /// Our engine, communicator or formation gives the epoch up.
    LocalEnd { reason: EndReason },
    /// Time passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Keep the stream of this follower.
    Accept { instance: InstanceId },
    /// Close the stream that asked to join.
    Refuse { instance: InstanceId, refusal: Refusal },
    /// Every follower's stream is open: steps may begin.
    AllConnected,
    /// Send this plan on every open stream.
    SendPlan { step: StepId },
    /// Send a beat naming the last step sent on every open stream.
    SendBeat { step: StepId },
    /// Send an abort on every open stream, then close them.
    SendAbort { detail: String },
    /// The epoch is over. Emitted once; nothing follows.
    End(EpochEnd),
}

/// The machine. One per epoch, on the process that holds slot 0.
#[derive(Debug)]
pub struct Leader {
    config: StreamConfig,
    fence: Fence,
    spec: EpochSpec,
    followers: BTreeMap<InstanceId, FollowerState>,
    local: ProgressWatch,
    local_completed: StepId,
    sent: StepId,
    last_sent_at: Duration,
    pause: PauseDetector,
    ended: bool,
}

#[derive(Debug)]
struct FollowerState {
    received: StepId,
    completed: StepId,
    watch: ProgressWatch,
}

impl Leader {
    /// Leads `spec` from `now` on. `fence` carries the spec's epoch.
    pub fn new(config: StreamConfig, fence: Fence, spec: EpochSpec, now: Duration) -> Self {
        Self {
            local: ProgressWatch::new(spec.leader().num_ranks, now),
            config,
            fence: Fence { epoch: spec.epoch, ..fence },
            spec,
            followers: BTreeMap::new(),
            local_completed: StepId(0),
            sent: StepId(0),
            last_sent_at: now,
            pause: PauseDetector::new(now),
            ended: false,
        }
    }

    /// Whether every follower's stream is open.
    pub fn all_connected(&self) -> bool {
        self.followers.len() == self.spec.followers().len()
    }

    /// Whether the epoch is over.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// When `Tick` is wanted at the latest; `None` after the end.
    pub fn deadline(&self) -> Option<Duration> {
        if self.ended {
            return None;
        }
        let watches = self.followers.values().map(|f| f.watch.deadline(&self.config));
        watches.chain([self.last_sent_at + self.config.beat_interval]).min()
    }

    /// Advances the machine.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.ended {
            if let Event::Join { instance, .. } = event {
                actions.push(Action::Refuse { instance, refusal: Refusal::Ended });
            }
            return actions;
        }
        if let Some(pause) = self.pause.on_call(&self.config, now) {
            self.local.forgive(pause);
            self.followers.values_mut().for_each(|f| f.watch.forgive(pause));
        }
        if let Err(reason) = self.apply(event, now, &mut actions) {
            self.end(reason, &mut actions);
            return actions;
        }
        match self.judge(now) {
            Some(reason) => self.end(reason, &mut actions),
            None => self.beat(now, &mut actions),
        }
        actions
    }

    fn apply(
        &mut self,
        event: Event,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> Result<(), EndReason> {
        match event {
            Event::Join { cluster, group, epoch, instance, slot } => {
                match self.admit(&cluster, &group, epoch, instance, slot) {
                    Ok(num_ranks) => self.connect(instance, num_ranks, now, actions),
                    Err(refusal) => actions.push(Action::Refuse { instance, refusal }),
                }
                Ok(())
            }
            Event::Closed { instance, detail } => match self.followers.contains_key(&instance) {
                true => Err(EndReason::StreamBroken { member: instance, detail }),
                false => Ok(()),
            },
            Event::Ack { instance, received, completed, report } => {
                self.on_ack(instance, received, completed, report, now)
            }
            Event::PeerAbort { instance, epoch, detail } => {
                let ours = epoch == self.spec.epoch && self.followers.contains_key(&instance);
                match ours {
                    true => Err(EndReason::Aborted { by: instance, detail }),
                    false => Ok(()),
                }
            }
            Event::Plan { step } => self.on_plan(step, now, actions),
            Event::Completed { step } => {
                self.local_completed = self.local_completed.max(step);
                self.local.set_has_work(self.local_completed < self.sent, now);
                Ok(())
            }
            Event::LocalReport { report } => {
                // Our own counter is read in this process; it cannot run back.
                let _ = self.local.on_report(report, now);
                Ok(())
            }
            Event::LocalEnd { reason } => Err(reason),
            Event::Tick => Ok(()),
        }
    }

    fn admit(
        &self,
        cluster: &str,
        group: &str,
        epoch: Epoch,
        instance: InstanceId,
        slot: u32,
    ) -> Result<u32, Refusal> {
        self.fence.check(cluster, group, epoch)?;
        let assigned =
            self.spec.followers().iter().find(|s| s.instance == instance && s.slot == slot);
        let Some(assigned) = assigned else {
            return Err(Refusal::NotAMember { instance, slot });
        };
        match self.followers.contains_key(&instance) {
            true => Err(Refusal::AlreadyOpened { instance }),
            false => Ok(assigned.num_ranks),
        }
    }

    fn connect(
        &mut self,
        instance: InstanceId,
        num_ranks: u32,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let watch = ProgressWatch::new(num_ranks, now);
        let state = FollowerState { received: StepId(0), completed: StepId(0), watch };
        self.followers.insert(instance, state);
        actions.push(Action::Accept { instance });
        if self.all_connected() {
            actions.push(Action::AllConnected);
        }
    }

    fn on_ack(
        &mut self,
        instance: InstanceId,
        received: StepId,
        completed: StepId,
        report: Report,
        now: Duration,
    ) -> Result<(), EndReason> {
        let sent = self.sent;
        let Some(follower) = self.followers.get_mut(&instance) else {
            return Ok(());
        };
        let in_order = received >= follower.received && completed >= follower.completed;
        if !in_order || received > sent || completed > received {
            let detail = format!(
                "acknowledged received {received}, completed {completed} after {}, {} of {sent} sent",
                follower.received, follower.completed
            );
            return Err(EndReason::ProtocolViolation { member: instance, detail });
        }
        (follower.received, follower.completed) = (received, completed);
        follower.watch.set_has_work(completed < sent, now);
        match follower.watch.on_report(report, now) {
            true => Ok(()),
            false => {
                let detail = "its progress counter ran back".to_owned();
                Err(EndReason::ProtocolViolation { member: instance, detail })
            }
        }
    }

    fn on_plan(
        &mut self,
        step: StepId,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> Result<(), EndReason> {
        let expected = self.sent.next();
        if step != expected || !self.all_connected() {
            return Err(EndReason::StepGap { expected, got: step });
        }
        self.sent = step;
        self.last_sent_at = now;
        self.local.set_has_work(true, now);
        self.followers.values_mut().for_each(|f| f.watch.set_has_work(true, now));
        actions.push(Action::SendPlan { step });
        Ok(())
    }

    /// Whom the watches speak against. A rank that hangs holds up all others in the next collective,
    /// so when one is stuck all are: the one to blame is silent, or has computed the least.
    fn judge(&self, now: Duration) -> Option<EndReason> {
        let all = || {
            let own = (self.spec.leader().instance, &self.local);
            self.followers.iter().map(|(instance, f)| (*instance, &f.watch)).chain([own])
        };
        let condition = |watch: &ProgressWatch| watch.condition(&self.config, now);
        let followers = || all().filter(|(m, _)| *m != self.spec.leader().instance);
        if let Some((member, _)) = followers().find(|(_, w)| condition(w) == Condition::Frozen) {
            return Some(EndReason::Frozen { member });
        }
        if !all().any(|(_, watch)| condition(watch) == Condition::Stuck) {
            return None;
        }
        if let Some((member, _)) = followers().find(|(_, w)| w.is_late(&self.config, now)) {
            return Some(EndReason::Frozen { member });
        }
        let least = all().map(|(_, watch)| watch.layers_per_rank()).min()?;
        let most = all().map(|(_, watch)| watch.layers_per_rank()).max()?;
        let mut behind = all().filter(|(_, watch)| watch.layers_per_rank() == least);
        match (behind.next(), behind.next()) {
            (Some((member, _)), None) if least < most => Some(EndReason::Stuck { member }),
            _ => Some(EndReason::AllStuck),
        }
    }

    fn beat(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if now.saturating_sub(self.last_sent_at) >= self.config.beat_interval {
            self.last_sent_at = now;
            actions.push(Action::SendBeat { step: self.sent });
        }
    }

    fn end(&mut self, reason: EndReason, actions: &mut Vec<Action>) {
        self.ended = true;
        actions.push(Action::SendAbort { detail: reason.to_string() });
        actions.push(Action::End(EpochEnd { epoch: self.spec.epoch, reason }));
    }
}

#[cfg(test)]
mod tests;
