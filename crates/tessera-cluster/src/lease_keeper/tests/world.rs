//! A simulated store and network around one keeper.

use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use super::super::*;

pub const MEMBER: &str = "/tessera/c/members/a";

pub fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What the network does with one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fate {
    Answered { latency_ms: u64 },
    RequestLost,
    AnswerLost,
}

#[derive(Debug, Clone)]
pub struct StoredKey {
    pub value: Vec<u8>,
    pub lease: i64,
}

/// Leases and keys with a clock of their own; expiry can be switched off, as it is while etcd is down.
#[derive(Debug, Default)]
pub struct FakeStore {
    pub leases: BTreeMap<i64, (Duration, Duration)>,
    pub keys: BTreeMap<String, StoredKey>,
    revision: i64,
    pub granted: i64,
    pub expires: bool,
}

impl FakeStore {
    fn advance(&mut self, now: Duration) {
        if self.expires {
            self.leases.retain(|_, (deadline, _)| *deadline > now);
            let leases = &self.leases;
            self.keys.retain(|_, key| key.lease == 0 || leases.contains_key(&key.lease));
        }
    }

    fn apply(&mut self, action: &LeaseAction, now: Duration) -> LeaseEvent {
        self.advance(now);
        match action {
            LeaseAction::Grant { call, ttl, .. } => {
                self.granted += 1;
                self.leases.insert(self.granted, (now + *ttl, *ttl));
                LeaseEvent::Granted { call: *call, lease_id: self.granted, ttl: *ttl }
            }
            LeaseAction::KeepAlive { call, lease_id, .. } => match self.leases.get_mut(lease_id) {
                Some((deadline, ttl)) => {
                    *deadline = now + *ttl;
                    LeaseEvent::KeptAlive { call: *call, ttl: *ttl }
                }
                None => LeaseEvent::KeptAlive { call: *call, ttl: Duration::ZERO },
            },
            LeaseAction::WriteKeys { call, lease_id, held_leases, keys, .. } => {
                self.write(*call, *lease_id, held_leases, keys)
            }
            LeaseAction::DeleteKeys { call, lease_id, keys, .. } => {
                self.keys.retain(|name, key| !(keys.contains(name) && key.lease == *lease_id));
                LeaseEvent::KeysDeleted { call: *call }
            }
            LeaseAction::Revoke { call, lease_id, .. } => {
                let existed = self.leases.remove(lease_id).is_some();
                self.keys.retain(|_, key| key.lease != *lease_id);
                match existed {
                    true => LeaseEvent::Revoked { call: *call },
                    false => LeaseEvent::LeaseGone { call: *call },
                }
            }
            LeaseAction::Publish(_) | LeaseAction::Answer { .. } => unreachable!("not a call"),
        }
    }

    fn write(
        &mut self,
        call: CallId,
        lease: i64,
        held: &[i64],
        keys: &[(String, Vec<u8>)],
    ) -> LeaseEvent {
        if !self.leases.contains_key(&lease) {
            return LeaseEvent::LeaseGone { call };
        }
        for (name, value) in keys {
            if let Some(stored) = self.keys.get(name)
                && !held.contains(&stored.lease)
                && stored.value != *value
            {
                return LeaseEvent::KeysRefused { call, key: name.clone() };
            }
        }
        self.revision += 1;
        for (name, value) in keys {
            let value = value.clone();
            self.keys.insert(name.clone(), StoredKey { value, lease });
        }
        LeaseEvent::KeysWritten { call, revision: self.revision }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Arrival {
    at: Duration,
    order: u64,
    what: What,
}

#[derive(Debug, PartialEq, Eq)]
enum What {
    Request(LeaseAction),
    Event(LeaseEvent),
}

impl PartialOrd for Arrival {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Arrival {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// One keeper, its store and the network between them.
pub struct World {
    pub now: Duration,
    pub keeper: LeaseKeeper,
    pub store: FakeStore,
    arrivals: BinaryHeap<Arrival>,
    order: u64,
    pub states: Vec<LeaseState>,
    pub answers: Vec<(KeyRequestId, KeyOutcome)>,
    pub calls: Vec<(Duration, LeaseAction)>,
    pub fates: Box<dyn FnMut() -> Fate>,
}

impl World {
    fn new(fates: impl FnMut() -> Fate + 'static) -> Self {
        let config = LeaseKeeperConfig::default();
        config.validate().unwrap();
        Self {
            now: Duration::ZERO,
            keeper: LeaseKeeper::new(config, MEMBER.into(), b"a".to_vec(), 7, Duration::ZERO),
            store: FakeStore { expires: true, ..FakeStore::default() },
            arrivals: BinaryHeap::new(),
            order: 0,
            states: Vec::new(),
            answers: Vec::new(),
            calls: Vec::new(),
            fates: Box::new(fates),
        }
    }

    pub fn healthy() -> Self {
        Self::new(|| Fate::Answered { latency_ms: 1 })
    }

    fn schedule(&mut self, at: Duration, what: What) {
        self.order += 1;
        let order = self.order;
        self.arrivals.push(Arrival { at, order, what });
    }

    pub fn feed(&mut self, event: LeaseEvent) {
        for action in self.keeper.on(event, self.now) {
            match action {
                LeaseAction::Publish(state) => self.states.push(state),
                LeaseAction::Answer { request, outcome } => self.answers.push((request, outcome)),
                call => self.send(call),
            }
        }
    }

    fn send(&mut self, action: LeaseAction) {
        self.calls.push((self.now, action.clone()));
        let timeout = match &action {
            LeaseAction::Grant { timeout, .. }
            | LeaseAction::KeepAlive { timeout, .. }
            | LeaseAction::WriteKeys { timeout, .. }
            | LeaseAction::DeleteKeys { timeout, .. }
            | LeaseAction::Revoke { timeout, .. } => *timeout,
            LeaseAction::Publish(_) | LeaseAction::Answer { .. } => unreachable!("not a call"),
        };
        let failed = LeaseEvent::Failed { call: call_of(&action) };
        match (self.fates)() {
            Fate::Answered { latency_ms } => {
                self.schedule(self.now + ms(latency_ms), What::Request(action))
            }
            Fate::RequestLost => self.schedule(self.now + timeout, What::Event(failed)),
            Fate::AnswerLost => {
                // It takes effect, but nobody hears of it.
                self.store.apply(&action, self.now);
                self.schedule(self.now + timeout, What::Event(failed));
            }
        }
    }

    /// Runs until `until`, letting `act` do something before each turn.
    pub fn run_until(&mut self, until: Duration) {
        for _ in 0..1_000_000 {
            let arrival = self.arrivals.peek().map(|arrival| arrival.at);
            let deadline = self.keeper.deadline().map(|at| at.max(self.now));
            let Some(next) = arrival.into_iter().chain(deadline).min() else {
                break;
            };
            if next > until {
                break;
            }
            self.now = next;
            match self.arrivals.pop() {
                Some(arrival) if arrival.at <= next => match arrival.what {
                    What::Request(action) => {
                        let event = self.store.apply(&action, self.now);
                        self.feed(event);
                    }
                    What::Event(event) => self.feed(event),
                },
                early => {
                    self.arrivals.extend(early);
                    self.feed(LeaseEvent::Tick);
                }
            }
        }
        self.now = until;
        self.store.advance(until);
    }

    pub fn put(&mut self, request: u64, key: &str, value: &[u8]) {
        self.feed(LeaseEvent::Put {
            request: KeyRequestId(request),
            key: key.into(),
            value: value.to_vec(),
        });
    }

    pub fn forget(&mut self, request: u64, key: &str) {
        self.feed(LeaseEvent::Forget { request: KeyRequestId(request), key: key.into() });
    }

    pub fn lose_all_leases(&mut self) {
        self.store.leases.clear();
        self.store.advance(self.now);
        assert!(self.store.keys.is_empty() || !self.store.expires);
    }

    pub fn is_alive(&self) -> bool {
        matches!(self.states.last(), Some(LeaseState::Alive { .. }))
    }

    pub fn was_lost(&self) -> bool {
        self.states.iter().any(|state| matches!(state, LeaseState::Lost { .. }))
    }

    pub fn keepalive_times(&self) -> Vec<Duration> {
        self.calls
            .iter()
            .filter(|(_, call)| matches!(call, LeaseAction::KeepAlive { .. }))
            .map(|(at, _)| *at)
            .collect()
    }
}

fn call_of(action: &LeaseAction) -> CallId {
    match action {
        LeaseAction::Grant { call, .. }
        | LeaseAction::KeepAlive { call, .. }
        | LeaseAction::WriteKeys { call, .. }
        | LeaseAction::DeleteKeys { call, .. }
        | LeaseAction::Revoke { call, .. } => *call,
        LeaseAction::Publish(_) | LeaseAction::Answer { .. } => unreachable!("not a call"),
    }
}
