//! The keys that hang on a lease: what must stand in the store, and what of it does.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{
    Backoff, CallId, KeyOutcome, KeyRequestId, LeaseAction, LeaseKeeperConfig,
    MAX_LEASED_KEY_BYTES, MAX_LEASED_KEYS, MAX_LEASED_VALUE_BYTES,
};

/// The next call about keys.
pub(super) enum KeyCall {
    Delete(Vec<String>),
    Write(Vec<(String, Vec<u8>)>),
}

/// One key that must stand.
#[derive(Debug)]
struct OwnKey {
    value: Vec<u8>,
    /// Names this value among all that any key was ever given, so that the answer to a write of a
    /// key that was forgotten and came again is not taken for the new one's.
    edition: u64,
    /// The edition that stands in the store under the current lease, and the revision it has.
    standing: Option<(u64, i64)>,
    /// A write was sent under the current lease, so that the key may stand even unanswered.
    was_sent: bool,
    /// Some edition stood in the store once, under whichever lease.
    was_ours: bool,
    waiters: Vec<(KeyRequestId, u64)>,
}

impl OwnKey {
    fn is_dirty(&self) -> bool {
        self.standing.is_none_or(|(edition, _)| edition != self.edition)
    }
}

#[derive(Debug)]
enum InFlight {
    Write(Vec<(String, u64)>),
    Delete(Vec<String>),
}

/// All keys of one member, and the call about them that is in flight (at most one).
#[derive(Debug)]
pub(super) struct KeyBook {
    member_key: String,
    keys: BTreeMap<String, OwnKey>,
    last_edition: u64,
    /// Keys that may stand in the store and must go, with those who wait for it.
    leaving: BTreeMap<String, Vec<KeyRequestId>>,
    in_flight: Option<(CallId, InFlight)>,
    retry_at: Duration,
    backoff: Backoff,
    /// Revision of the last write under the current lease; `None` until all keys stand under it.
    registered_at: Option<i64>,
}

impl KeyBook {
    pub(super) fn new(
        member_key: String,
        member_value: Vec<u8>,
        config: &LeaseKeeperConfig,
        seed: u64,
    ) -> Self {
        let member = OwnKey {
            value: member_value,
            edition: 1,
            standing: None,
            was_sent: false,
            was_ours: false,
            waiters: Vec::new(),
        };
        Self {
            keys: BTreeMap::from([(member_key.clone(), member)]),
            last_edition: 1,
            member_key,
            leaving: BTreeMap::new(),
            in_flight: None,
            retry_at: Duration::ZERO,
            backoff: Backoff::new(config.retry_min, config.retry_max, seed),
            registered_at: None,
        }
    }

    pub(super) fn registered_at(&self) -> Option<i64> {
        self.registered_at
    }

    pub(super) fn awaits(&self, call: CallId) -> bool {
        self.in_flight.as_ref().is_some_and(|(id, _)| *id == call)
    }

    /// When the next call about keys may be made; `None` if there is nothing to do or a call is in
    /// flight.
    pub(super) fn due_at(&self) -> Option<Duration> {
        let has_work = !self.leaving.is_empty() || self.keys.values().any(OwnKey::is_dirty);
        (self.in_flight.is_none() && has_work).then_some(self.retry_at)
    }

    /// Takes the work that is due: deletions first, since a key may leave and come again.
    pub(super) fn begin_call(&mut self, call: CallId) -> KeyCall {
        if !self.leaving.is_empty() {
            let keys: Vec<String> = self.leaving.keys().cloned().collect();
            self.in_flight = Some((call, InFlight::Delete(keys.clone())));
            return KeyCall::Delete(keys);
        }
        let mut editions = Vec::new();
        let mut writes = Vec::new();
        for (key, own) in self.keys.iter_mut().filter(|(_, own)| own.is_dirty()) {
            own.was_sent = true;
            editions.push((key.clone(), own.edition));
            writes.push((key.clone(), own.value.clone()));
        }
        self.in_flight = Some((call, InFlight::Write(editions)));
        KeyCall::Write(writes)
    }

    pub(super) fn put(
        &mut self,
        request: KeyRequestId,
        key: String,
        value: Vec<u8>,
        actions: &mut Vec<LeaseAction>,
    ) {
        let is_new = !self.keys.contains_key(&key);
        let has_room = !is_new || self.keys.len() < MAX_LEASED_KEYS;
        let fits = key.len() <= MAX_LEASED_KEY_BYTES && value.len() <= MAX_LEASED_VALUE_BYTES;
        if key.is_empty() || !has_room || !fits {
            actions.push(answer(request, KeyOutcome::OutOfBounds));
            return;
        }
        let own = self.keys.entry(key).or_insert_with(|| OwnKey {
            value: Vec::new(),
            edition: 0,
            standing: None,
            was_sent: false,
            was_ours: false,
            waiters: Vec::new(),
        });
        if is_new || own.value != value {
            own.value = value;
            self.last_edition += 1;
            own.edition = self.last_edition;
        }
        match own.standing {
            Some((edition, revision)) if edition == own.edition => {
                actions.push(answer(request, KeyOutcome::Written { revision }));
            }
            _ => own.waiters.push((request, own.edition)),
        }
    }

    /// `may_stand`: there is a lease that the key may hang on.
    pub(super) fn forget(
        &mut self,
        request: KeyRequestId,
        key: String,
        may_stand: bool,
        actions: &mut Vec<LeaseAction>,
    ) {
        if key == self.member_key {
            actions.push(answer(request, KeyOutcome::OutOfBounds));
            return;
        }
        let mut stands = self.leaving.contains_key(&key);
        if let Some(own) = self.keys.remove(&key) {
            stands |= own.was_sent;
            for (waiter, _) in own.waiters {
                actions.push(answer(waiter, KeyOutcome::Forgotten));
            }
        }
        if stands && may_stand {
            self.leaving.entry(key).or_default().push(request);
        } else {
            actions.push(answer(request, KeyOutcome::Forgotten));
        }
    }

    pub(super) fn on_written(
        &mut self,
        call: CallId,
        revision: i64,
        actions: &mut Vec<LeaseAction>,
    ) {
        if !self.awaits(call) {
            return;
        }
        let Some((_, InFlight::Write(written))) = self.in_flight.take() else {
            return;
        };
        self.backoff.reset();
        self.registered_at = Some(revision);
        for (key, edition) in written {
            let Some(own) = self.keys.get_mut(&key) else {
                continue;
            };
            own.was_ours = true;
            own.standing = Some((edition, revision));
            own.waiters.retain(|(request, wanted)| {
                let is_waiting = *wanted > edition;
                if !is_waiting {
                    actions.push(answer(*request, KeyOutcome::Written { revision }));
                }
                is_waiting
            });
        }
    }

    pub(super) fn on_deleted(&mut self, call: CallId, actions: &mut Vec<LeaseAction>) {
        if !self.awaits(call) {
            return;
        }
        let Some((_, InFlight::Delete(deleted))) = self.in_flight.take() else {
            return;
        };
        self.backoff.reset();
        for key in deleted {
            for request in self.leaving.remove(&key).unwrap_or_default() {
                actions.push(answer(request, KeyOutcome::Forgotten));
            }
        }
    }

    pub(super) fn on_failed(&mut self, call: CallId, now: Duration) {
        if self.awaits(call) {
            self.in_flight = None;
            self.retry_at = now + self.backoff.next_pause();
        }
    }

    /// The awaited write was refused because of `key`. True if that key was ours before, or is the
    /// member's own: the member is fenced. Otherwise the newcomer is dropped and the rest goes on.
    pub(super) fn on_refused(&mut self, key: &str, actions: &mut Vec<LeaseAction>) -> bool {
        self.in_flight = None;
        let is_fenced =
            self.keys.get(key).is_some_and(|own| own.was_ours || key == self.member_key);
        if !is_fenced && let Some(own) = self.keys.remove(key) {
            for (request, _) in own.waiters {
                actions.push(answer(request, KeyOutcome::Conflict));
            }
        }
        is_fenced
    }

    /// The lease is gone and with it all keys; they must be written again under the next one.
    pub(super) fn on_lease_gone(&mut self, actions: &mut Vec<LeaseAction>) {
        self.in_flight = None;
        self.registered_at = None;
        self.retry_at = Duration::ZERO;
        self.backoff.reset();
        for own in self.keys.values_mut() {
            own.standing = None;
            own.was_sent = false;
        }
        for request in std::mem::take(&mut self.leaving).into_values().flatten() {
            actions.push(answer(request, KeyOutcome::Forgotten));
        }
    }

    /// The lease is over for good.
    pub(super) fn end(&mut self, actions: &mut Vec<LeaseAction>) {
        self.in_flight = None;
        let waiting = std::mem::take(&mut self.keys).into_values();
        let waiting = waiting.flat_map(|own| own.waiters.into_iter().map(|(request, _)| request));
        let leaving = std::mem::take(&mut self.leaving).into_values().flatten();
        actions.extend(waiting.chain(leaving).map(|request| answer(request, KeyOutcome::Lost)));
    }
}

fn answer(request: KeyRequestId, outcome: KeyOutcome) -> LeaseAction {
    LeaseAction::Answer { request, outcome }
}
