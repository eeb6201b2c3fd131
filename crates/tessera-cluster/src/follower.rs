//! A follower's side of an epoch's plan stream.
//!
//! Invariants
//! - The leader is dialled once per epoch. Any break, gap, repeat or foreign epoch ends the epoch.
//! - While plans or beats arrive the follower stays; after the silence time-out it leaves.
//! - The epoch ends exactly once, with one reason.

use std::time::Duration;

use tessera_types::{Epoch, InstanceId, StepId};

use crate::config::StreamConfig;
use crate::epoch_end::{EndReason, EpochEnd};
use crate::progress::{Condition, PauseDetector, ProgressWatch, Report};
use crate::records::EpochSpec;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The stream is open and the leader accepted us.
    Opened,
    /// The leader sent a plan.
    Plan { epoch: Epoch, step: StepId },
    /// The leader sent a beat naming the last step it sent.
    Beat { epoch: Epoch, step: StepId },
    /// The leader gave the epoch up.
    PeerAbort { epoch: Epoch, detail: String },
    /// The stream could not be opened, closed or broke.
    Closed { detail: String },
    /// All our ranks completed this step.
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
    /// Open the plan stream to the leader and introduce ourselves. Emitted once, by `start`.
    Dial { address: String, instance: InstanceId, slot: u32 },
    /// Hand the plan just received to the ranks.
    Execute { step: StepId },
    /// Acknowledge.
    SendAck { received: StepId, completed: StepId, report: Report },
    /// Tell the leader that we give up, then close the stream.
    SendAbort { detail: String },
    /// The epoch is over. Emitted once; nothing follows.
    End(EpochEnd),
}

/// The machine. One per epoch, on every process but the leader's.
#[derive(Debug)]
pub struct Follower {
    config: StreamConfig,
    spec: EpochSpec,
    slot: u32,
    received: StepId,
    completed: StepId,
    heard_at: Duration,
    acked_at: Duration,
    /// Something worth telling at once happened since the last acknowledgement.
    ack_due: bool,
    report: Report,
    local: ProgressWatch,
    pause: PauseDetector,
    opened: bool,
    ended: bool,
}

impl Follower {
    /// Follows `spec` in `slot`, and the one dial of this epoch.
    pub fn start(
        config: StreamConfig,
        spec: EpochSpec,
        slot: u32,
        now: Duration,
    ) -> (Self, Vec<Action>) {
        let own = &spec.slots[slot as usize];
        let address = spec.leader().address.clone();
        let dial = Action::Dial { address, instance: own.instance, slot };
        let local = ProgressWatch::new(own.num_ranks, now);
        let follower = Self {
            config,
            slot,
            received: StepId(0),
            completed: StepId(0),
            heard_at: now,
            acked_at: now,
            ack_due: false,
            report: Report::default(),
            local,
            pause: PauseDetector::new(now),
            opened: false,
            ended: false,
            spec,
        };
        (follower, vec![dial])
    }

    /// Whether the epoch is over.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the leader was heard recently: while it is, this member refuses to leave for a mere
    /// proposal.
    pub fn hears_leader(&self, now: Duration) -> bool {
        !self.ended && now.saturating_sub(self.heard_at) < self.config.silence_timeout
    }

    /// When `Tick` is wanted at the latest; `None` after the end.
    pub fn deadline(&self) -> Option<Duration> {
        if self.ended {
            return None;
        }
        let silence = self.heard_at + self.config.silence_timeout;
        // Before the stream is open the silence alone counts, but the pause detector wants its calls.
        let from = if self.opened { self.acked_at } else { self.pause.last_call() };
        Some(silence.min(from + self.config.report_interval))
    }

    /// Advances the machine.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        if let Some(pause) = self.pause.on_call(&self.config, now) {
            self.heard_at += pause;
            self.local.forgive(pause);
        }
        let outcome = self.apply(event, now, &mut actions).and_then(|()| self.judge(now));
        match outcome {
            Ok(()) => self.acknowledge(now, &mut actions),
            Err(reason) => self.end(reason, &mut actions),
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
            Event::Opened => {
                self.opened = true;
                self.heard_at = now;
                self.ack_due = true;
                Ok(())
            }
            Event::Plan { epoch, step } => {
                self.on_message(epoch, now)?;
                self.on_step(step, self.received.next())?;
                self.received = step;
                self.local.set_has_work(true, now);
                self.ack_due = true;
                actions.push(Action::Execute { step });
                Ok(())
            }
            Event::Beat { epoch, step } => {
                self.on_message(epoch, now)?;
                self.on_step(step, self.received)
            }
            Event::PeerAbort { epoch, detail } if epoch == self.spec.epoch => {
                Err(EndReason::Aborted { by: self.leader(), detail })
            }
            Event::PeerAbort { .. } | Event::Tick => Ok(()),
            Event::Closed { detail } => {
                Err(EndReason::StreamBroken { member: self.leader(), detail })
            }
            Event::Completed { step } => {
                if step > self.completed {
                    self.completed = step.min(self.received);
                    self.ack_due = true;
                }
                self.local.set_has_work(self.completed < self.received, now);
                Ok(())
            }
            Event::LocalReport { report } => {
                self.report = report;
                // Our own counter is read in this process; it cannot run back.
                let _ = self.local.on_report(report, now);
                Ok(())
            }
            Event::LocalEnd { reason } => Err(reason),
        }
    }

    fn on_message(&mut self, epoch: Epoch, now: Duration) -> Result<(), EndReason> {
        if epoch != self.spec.epoch {
            let detail = format!("sent a message of epoch {epoch} in epoch {}", self.spec.epoch);
            return Err(EndReason::ProtocolViolation { member: self.leader(), detail });
        }
        self.heard_at = now;
        Ok(())
    }

    fn on_step(&self, got: StepId, expected: StepId) -> Result<(), EndReason> {
        match got == expected {
            true => Ok(()),
            false => Err(EndReason::StepGap { expected, got }),
        }
    }

    fn judge(&self, now: Duration) -> Result<(), EndReason> {
        if now.saturating_sub(self.heard_at) >= self.config.silence_timeout {
            return Err(EndReason::Frozen { member: self.leader() });
        }
        // Who is to blame for a standstill is the leader's to say: it sees all counters. We speak up
        // only when it does not, long after it should have.
        match self.local.condition(&self.config, now) {
            Condition::Stuck if self.stuck_long_enough(now) => Err(EndReason::AllStuck),
            _ => Ok(()),
        }
    }

    fn stuck_long_enough(&self, now: Duration) -> bool {
        let mut patient = self.config.clone();
        patient.stuck_timeout *= 3;
        patient.stuck_layers *= 3;
        self.local.condition(&patient, now) == Condition::Stuck
    }

    fn acknowledge(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let due = now.saturating_sub(self.acked_at) >= self.config.report_interval;
        if !self.opened || !(due || self.ack_due) {
            return;
        }
        self.acked_at = now;
        self.ack_due = false;
        let (received, completed) = (self.received, self.completed);
        actions.push(Action::SendAck { received, completed, report: self.report });
    }

    fn leader(&self) -> InstanceId {
        self.spec.leader().instance
    }

    fn end(&mut self, reason: EndReason, actions: &mut Vec<Action>) {
        self.ended = true;
        actions.push(Action::SendAbort { detail: reason.to_string() });
        actions.push(Action::End(EpochEnd { epoch: self.spec.epoch, reason }));
    }

    /// The slot that this member holds.
    pub fn slot(&self) -> u32 {
        self.slot
    }
}

#[cfg(test)]
mod tests;
