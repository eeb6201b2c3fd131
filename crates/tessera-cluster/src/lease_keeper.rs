//! The lease of one member: granted, kept alive, and won back after a certain loss (CLUSTER §4).
//!
//! Invariants
//! - *Unknown* is not *lost*. Errors, timeouts and a store that is down never produce
//!   [`LeaseState::Lost`]; only an answer of the store does (TTL ≤ 0, lease not found, a key that
//!   belongs to somebody else) or the member's own wish to leave.
//! - Age is counted from the moment the last answered grant or keepalive was *sent*, so that it
//!   never claims more life than the store grants.
//! - After a certain loss every own key is written again, in one transaction, before the state
//!   becomes [`LeaseState::Alive`] again.
//! - At most two calls are in flight: one about the lease, one about the keys. Each carries a
//!   [`CallId`]; answers to calls that are no longer awaited are ignored.
//!
//! The machine does no I/O and reads no clock: [`LeaseKeeper::on`] takes an event and the time since
//! an arbitrary start (the driver uses CLOCK_BOOTTIME) and returns what is to be done.

mod backoff;
mod keys;
mod messages;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

pub use backoff::Backoff;
pub use messages::{
    CallId, KeyOutcome, KeyRequestId, LeaseAction, LeaseEvent, LeaseKeeperConfig, LeaseState,
    LostReason, MAX_LEASED_KEY_BYTES, MAX_LEASED_KEYS, MAX_LEASED_VALUE_BYTES,
};

use keys::{KeyBook, KeyCall};

/// Most leases whose keys are still recognised as this member's own.
const MAX_HELD_LEASES: usize = 8;
/// How often a revocation is tried before the lease is left to expire by itself.
const MAX_REVOKE_CALLS: u32 = 3;

/// Where the lease is in its life.
#[derive(Debug)]
enum Stage {
    /// A grant is due at `at`, or in flight since `sent_at`.
    Granting { at: Duration, in_flight: Option<Sent> },
    /// The lease exists as far as we know.
    Held(HeldLease),
    /// The member leaves.
    Revoking { lease_id: i64, at: Duration, in_flight: Option<CallId>, calls: u32 },
    /// Nothing more is done.
    Ended,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    call: CallId,
    at: Duration,
}

#[derive(Debug)]
struct HeldLease {
    id: i64,
    ttl: Duration,
    /// When the last answered grant or keepalive was sent.
    alive_since: Duration,
    next_keepalive_at: Duration,
    in_flight: Option<Sent>,
    /// The last call about the lease was not answered.
    doubtful: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct LeaseKeeper {
    config: LeaseKeeperConfig,
    backoff: Backoff,
    stage: Stage,
    keys: KeyBook,
    /// Leases this member held, the newest last.
    held_leases: VecDeque<i64>,
    last_call: u64,
    /// When the last answered call about the lease was sent, or when the keeper began.
    last_heard: Duration,
    revoke_wanted: bool,
    published: Option<LeaseState>,
}

impl LeaseKeeper {
    /// A keeper that will register `member_key` with `member_value`. Nothing happens before the
    /// first event (a [`LeaseEvent::Tick`]).
    pub fn new(
        config: LeaseKeeperConfig,
        member_key: String,
        member_value: Vec<u8>,
        seed: u64,
        now: Duration,
    ) -> Self {
        Self {
            backoff: Backoff::new(config.retry_min, config.retry_max, seed),
            stage: Stage::Granting { at: now, in_flight: None },
            keys: KeyBook::new(member_key, member_value, &config, seed ^ 1),
            held_leases: VecDeque::new(),
            last_call: 0,
            last_heard: now,
            revoke_wanted: false,
            published: None,
            config,
        }
    }

    /// When the next [`LeaseEvent::Tick`] is due; `None` while only an answer can change anything.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.stage {
            Stage::Granting { at, in_flight } => in_flight.is_none().then_some(*at),
            Stage::Held(lease) => {
                let keepalive = lease.in_flight.is_none().then_some(lease.next_keepalive_at);
                keepalive.into_iter().chain(self.keys.due_at()).min()
            }
            Stage::Revoking { at, in_flight, .. } => in_flight.is_none().then_some(*at),
            Stage::Ended => None,
        }
    }

    /// Nothing more will be done; the driver may end.
    pub fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }

    /// Takes one event at time `now` and says what is to be done.
    pub fn on(&mut self, event: LeaseEvent, now: Duration) -> Vec<LeaseAction> {
        let mut actions = Vec::new();
        match event {
            LeaseEvent::Tick => {}
            LeaseEvent::Granted { call, lease_id, ttl } => {
                self.on_granted(call, lease_id, ttl, now)
            }
            LeaseEvent::KeptAlive { call, ttl } if ttl.is_zero() => {
                self.on_lease_gone(call, now, &mut actions)
            }
            LeaseEvent::KeptAlive { call, ttl } => self.on_kept_alive(call, ttl),
            LeaseEvent::KeysWritten { call, revision } => {
                self.keys.on_written(call, revision, &mut actions)
            }
            LeaseEvent::KeysRefused { call, key } => self.on_refused(call, key, &mut actions),
            LeaseEvent::KeysDeleted { call } => self.keys.on_deleted(call, &mut actions),
            LeaseEvent::LeaseGone { call } => self.on_lease_gone(call, now, &mut actions),
            LeaseEvent::Revoked { call } => self.on_revoked(call, &mut actions),
            LeaseEvent::Failed { call } => self.on_failed(call, now, &mut actions),
            LeaseEvent::Put { request, key, value } if !self.has_ended() => {
                self.keys.put(request, key, value, &mut actions)
            }
            LeaseEvent::Forget { request, key } if !self.has_ended() => {
                let may_stand = matches!(self.stage, Stage::Held(_));
                self.keys.forget(request, key, may_stand, &mut actions)
            }
            LeaseEvent::Put { request, .. } | LeaseEvent::Forget { request, .. } => {
                actions.push(LeaseAction::Answer { request, outcome: KeyOutcome::Lost })
            }
            LeaseEvent::Revoke => self.on_revoke_wanted(now, &mut actions),
        }
        self.issue_due_calls(now, &mut actions);
        self.publish_if_changed(now, &mut actions);
        actions
    }

    fn on_granted(&mut self, call: CallId, lease_id: i64, ttl: Duration, now: Duration) {
        let Stage::Granting { in_flight: Some(sent), .. } = self.stage else {
            return;
        };
        if sent.call != call {
            return;
        }
        self.backoff.reset();
        self.last_heard = sent.at;
        if self.held_leases.len() == MAX_HELD_LEASES {
            self.held_leases.pop_front();
        }
        self.held_leases.push_back(lease_id);
        self.stage = if self.revoke_wanted {
            revoking(lease_id, now)
        } else {
            Stage::Held(HeldLease {
                id: lease_id,
                ttl,
                alive_since: sent.at,
                next_keepalive_at: sent.at + ttl / 3,
                in_flight: None,
                doubtful: false,
            })
        };
    }

    fn on_kept_alive(&mut self, call: CallId, ttl: Duration) {
        let Stage::Held(lease) = &mut self.stage else {
            return;
        };
        let Some(sent) = lease.in_flight.filter(|sent| sent.call == call) else {
            return;
        };
        lease.in_flight = None;
        lease.doubtful = false;
        lease.ttl = ttl;
        lease.alive_since = sent.at;
        lease.next_keepalive_at = sent.at + ttl / 3;
        self.last_heard = sent.at;
        self.backoff.reset();
    }

    /// A call failed: nothing is known. The deadline rule: try again at half of the time that
    /// remains, and once none remains, with growing pauses.
    fn on_failed(&mut self, call: CallId, now: Duration, actions: &mut Vec<LeaseAction>) {
        self.keys.on_failed(call, now);
        let revoke_wanted = self.revoke_wanted;
        match &mut self.stage {
            Stage::Granting { at, in_flight } if in_flight.is_some_and(|s| s.call == call) => {
                *in_flight = None;
                *at = now + self.backoff.next_pause();
                if revoke_wanted {
                    self.end(LostReason::Revoked, actions);
                }
            }
            Stage::Held(lease) if lease.in_flight.is_some_and(|s| s.call == call) => {
                lease.in_flight = None;
                lease.doubtful = true;
                let remaining = (lease.alive_since + lease.ttl).saturating_sub(now);
                let pause = self.backoff.next_pause();
                lease.next_keepalive_at = now
                    + if remaining.is_zero() {
                        pause
                    } else {
                        pause.min(remaining / 2).max(self.config.retry_min)
                    };
            }
            Stage::Revoking { at, in_flight, calls, .. } if *in_flight == Some(call) => {
                *in_flight = None;
                *at = now + self.backoff.next_pause();
                if *calls >= MAX_REVOKE_CALLS {
                    self.end(LostReason::Revoked, actions);
                }
            }
            _ => {}
        }
    }

    /// The store does not know the lease: the keys are gone with it, and all are written again
    /// under a new one. The short random pause spreads a crowd that lost its leases together.
    fn on_lease_gone(&mut self, call: CallId, now: Duration, actions: &mut Vec<LeaseAction>) {
        match &self.stage {
            Stage::Held(lease)
                if lease.in_flight.is_some_and(|s| s.call == call) || self.keys.awaits(call) =>
            {
                self.keys.on_lease_gone(actions);
                self.backoff.reset();
                self.stage =
                    Stage::Granting { at: now + self.backoff.next_pause() / 2, in_flight: None };
                actions.push(self.publish(LeaseState::Lost { reason: LostReason::LeaseGone }));
            }
            Stage::Revoking { in_flight, .. } if *in_flight == Some(call) => {
                self.end(LostReason::Revoked, actions);
            }
            _ => {}
        }
    }

    fn on_refused(&mut self, call: CallId, key: String, actions: &mut Vec<LeaseAction>) {
        if !self.keys.awaits(call) {
            return;
        }
        if !self.keys.on_refused(&key, actions) {
            return;
        }
        // Somebody took a key that was ours. Nothing stands under a lease that is not yet
        // registered, and an established one must not outlive its member: give it back.
        if let Stage::Held(lease) = &self.stage {
            let lease_id = lease.id;
            let call = self.next_call();
            actions.push(LeaseAction::Revoke { call, lease_id, timeout: self.config.call_timeout });
        }
        self.end(LostReason::Fenced { key }, actions);
    }

    fn on_revoke_wanted(&mut self, now: Duration, actions: &mut Vec<LeaseAction>) {
        self.revoke_wanted = true;
        match &self.stage {
            Stage::Granting { in_flight: None, .. } => self.end(LostReason::Revoked, actions),
            // The grant's answer brings the lease that is to be revoked.
            Stage::Granting { .. } => {}
            Stage::Held(lease) => {
                self.backoff.reset();
                self.stage = revoking(lease.id, now);
            }
            Stage::Revoking { .. } | Stage::Ended => {}
        }
    }

    fn on_revoked(&mut self, call: CallId, actions: &mut Vec<LeaseAction>) {
        if matches!(self.stage, Stage::Revoking { in_flight, .. } if in_flight == Some(call)) {
            self.end(LostReason::Revoked, actions);
        }
    }

    fn end(&mut self, reason: LostReason, actions: &mut Vec<LeaseAction>) {
        self.keys.end(actions);
        self.stage = Stage::Ended;
        actions.push(self.publish(LeaseState::Lost { reason }));
    }

    fn issue_due_calls(&mut self, now: Duration, actions: &mut Vec<LeaseAction>) {
        let call = CallId(self.last_call + 1);
        let call_timeout = self.config.call_timeout;
        match &mut self.stage {
            Stage::Granting { at, in_flight } if in_flight.is_none() && *at <= now => {
                *in_flight = Some(Sent { call, at: now });
                self.last_call = call.0;
                actions.push(LeaseAction::Grant {
                    call,
                    ttl: self.config.ttl,
                    timeout: call_timeout,
                });
            }
            Stage::Held(lease) => {
                if lease.in_flight.is_none() && lease.next_keepalive_at <= now {
                    let remaining = (lease.alive_since + lease.ttl).saturating_sub(now);
                    lease.in_flight = Some(Sent { call, at: now });
                    self.last_call = call.0;
                    actions.push(LeaseAction::KeepAlive {
                        call,
                        lease_id: lease.id,
                        // Half of what remains, so that a second try still comes in time.
                        timeout: if remaining.is_zero() {
                            call_timeout
                        } else {
                            (remaining / 2).clamp(self.config.retry_min, call_timeout)
                        },
                    });
                }
                let lease_id = lease.id;
                self.issue_key_call(lease_id, now, actions);
            }
            Stage::Revoking { lease_id, at, in_flight, calls }
                if in_flight.is_none() && *at <= now =>
            {
                *in_flight = Some(call);
                *calls += 1;
                self.last_call = call.0;
                actions.push(LeaseAction::Revoke {
                    call,
                    lease_id: *lease_id,
                    timeout: call_timeout,
                });
            }
            _ => {}
        }
    }

    fn issue_key_call(&mut self, lease_id: i64, now: Duration, actions: &mut Vec<LeaseAction>) {
        if self.keys.due_at().is_none_or(|at| at > now) {
            return;
        }
        let call = self.next_call();
        let timeout = self.config.call_timeout;
        actions.push(match self.keys.begin_call(call) {
            KeyCall::Delete(keys) => LeaseAction::DeleteKeys { call, lease_id, keys, timeout },
            KeyCall::Write(keys) => LeaseAction::WriteKeys {
                call,
                lease_id,
                held_leases: self.held_leases.iter().copied().collect(),
                keys,
                timeout,
            },
        });
    }

    fn next_call(&mut self) -> CallId {
        self.last_call += 1;
        CallId(self.last_call)
    }

    /// The state follows from the stage; a loss is published where it is learned, because the
    /// search for a new lease begins in the same event.
    fn publish_if_changed(&mut self, now: Duration, actions: &mut Vec<LeaseAction>) {
        let state = match &self.stage {
            Stage::Held(lease) if !lease.doubtful => match self.keys.registered_at() {
                Some(revision) => LeaseState::Alive { lease_id: lease.id, revision },
                None => self.unknown(Some(lease.id), now),
            },
            Stage::Held(lease) => self.unknown(Some(lease.id), now),
            Stage::Granting { .. } => self.unknown(None, now),
            // Leaving is not a loss until it is done; the last state stands.
            Stage::Revoking { .. } | Stage::Ended => return,
        };
        let repeats_unknown = |published: &LeaseState| match (published, &state) {
            // While a certain loss is being repaired, it stays the news.
            (LeaseState::Lost { .. }, LeaseState::Unknown { .. }) => true,
            (
                LeaseState::Unknown { lease_id: old, age },
                LeaseState::Unknown { lease_id: new, age: newer },
            ) => old == new && *newer < *age + self.config.retry_min,
            (old, new) => old == new,
        };
        if !self.published.as_ref().is_some_and(repeats_unknown) {
            actions.push(self.publish(state));
        }
    }

    fn publish(&mut self, state: LeaseState) -> LeaseAction {
        self.published = Some(state.clone());
        LeaseAction::Publish(state)
    }

    fn unknown(&self, lease_id: Option<i64>, now: Duration) -> LeaseState {
        LeaseState::Unknown { lease_id, age: now.saturating_sub(self.last_heard) }
    }
}

fn revoking(lease_id: i64, now: Duration) -> Stage {
    Stage::Revoking { lease_id, at: now, in_flight: None, calls: 0 }
}
