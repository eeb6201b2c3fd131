//! Outside of any epoch: joining what others proposed, or proposing.

use std::time::Duration;

use tessera_types::{Epoch, InstanceId};

use super::candidates::{Obstacle, Unusable};
use super::{Action, Compare, Formation, TxnOutcome};
use crate::records::{EpochRecord, SlotAssignment};

impl Formation {
    pub(super) fn advance_outside(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.retired {
            self.phase = super::Phase::Retired;
            return;
        }
        if !self.mirror.synced {
            self.obstacle = Some(Obstacle::NotSynced);
            return;
        }
        if let Some((spec, revision)) = self.joinable() {
            let spec = spec.clone();
            return self.join(spec, revision, now, actions);
        }
        if self.mirror.may_run_active(self.me.instance) {
            self.obstacle = Some(Obstacle::NotPublished);
            return self.publish(now, actions);
        }
        self.consider_proposing(now, actions);
        self.probe(now, actions);
    }

    fn consider_proposing(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let Some((_, until)) = self.in_flight {
            if now < until {
                return self.wake_at(until);
            }
            self.in_flight = None;
        }
        match self.next_record(now) {
            Ok(record) => {
                self.obstacle = None;
                self.propose_when_due(record, now, actions);
            }
            Err(obstacle) => {
                self.eligible_since = None;
                self.obstacle = Some(obstacle);
            }
        }
    }

    pub(super) fn on_proposed(&mut self, epoch: Epoch, outcome: TxnOutcome, now: Duration) {
        if self.in_flight.is_none_or(|(proposed, _)| proposed != epoch) {
            return;
        }
        match outcome {
            // Committed: the watch will bring the record. Unknown: it may.
            TxnOutcome::Committed | TxnOutcome::Unknown => {}
            TxnOutcome::Conflict => {
                self.in_flight = None;
                self.eligible_since = None;
                self.not_before = self.not_before.max(now + self.config.min_backoff);
            }
        }
    }

    fn publish(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if now >= self.publish_again_at {
            self.publish_again_at = now + self.config.txn_timeout;
            let epoch = self.last_joined.max(self.mirror.active_epoch());
            actions.push(Action::PublishLastEpoch { epoch });
        }
        self.wake_at(self.publish_again_at);
    }

    /// Emits the proposal when this member's turn has come.
    fn propose_when_due(&mut self, record: EpochRecord, now: Duration, actions: &mut Vec<Action>) {
        let since = *self.eligible_since.get_or_insert(now);
        let stagger = self.config.stagger_per_rank * self.place.first_rank.0;
        let due = (since + stagger).max(self.not_before);
        if now < due {
            return self.wake_at(due);
        }
        self.in_flight = Some((record.counter, now + self.config.txn_timeout));
        self.wake_at(now + self.config.txn_timeout);
        let compares = self.compares(&record);
        actions.push(Action::Propose { record: Box::new(record), compares });
    }

    /// The proposal rests on the epoch record, the active record and every chosen member.
    fn compares(&self, record: &EpochRecord) -> Vec<Compare> {
        let group = &self.place.group;
        let compare = |key, mod_revision| Compare { key, mod_revision };
        let epoch_revision = self.mirror.epoch.as_ref().map_or(0, |entry| entry.mod_revision);
        let active_revision = self.mirror.active.as_ref().map_or(0, |entry| entry.mod_revision);
        let slots = record.spec.iter().flat_map(|spec| &spec.slots);
        let members =
            slots.map(|slot| compare(self.keys.member(slot.instance), slot.member_revision));
        let mut compares = vec![
            compare(self.keys.epoch(group), epoch_revision),
            compare(self.keys.active(group), active_revision),
        ];
        compares.extend(members);
        compares
    }

    /// The record this member would propose now.
    fn next_record(&mut self, now: Duration) -> Result<EpochRecord, Obstacle> {
        let me = self.me.instance;
        if !self.mirror.members.contains_key(&me) {
            return Err(Obstacle::NotRegistered);
        }
        if self.excluded().contains(&me) {
            return Err(Obstacle::Excluded);
        }
        if let Some((epoch, until)) = self.pending_proposal()
            && now < until
        {
            self.wake_at(until);
            return Err(Obstacle::ProposalPending { epoch });
        }
        let counter = self.next_counter();
        match self.choose() {
            Ok(slots) if !self.covers_world(&slots) => {
                let unusable = slots.iter().map(|s| (s.instance, Unusable::Layout)).collect();
                Err(Obstacle::SlotsMissing { slots: Vec::new(), unusable })
            }
            Ok(slots) if !self.may_succeed_active(&slots, now) => {
                Err(Obstacle::NoSharedMember { epoch: self.mirror.active_epoch() })
            }
            Ok(slots) => {
                let chosen = |instance: &InstanceId| slots.iter().any(|s| s.instance == *instance);
                let excluded = self.standing_exclusions().filter(|i| !chosen(i)).collect();
                let spec = Some(self.spec_of(counter, slots.clone()));
                Ok(EpochRecord { counter, spec, excluded })
            }
            Err(obstacle) => self.accusation(counter, &obstacle).ok_or(obstacle),
        }
    }

    /// A record that takes a number only to exclude members found frozen, so that a supervisor can end
    /// them and they themselves know. `None` if it would say nothing new.
    fn accusation(&self, counter: Epoch, obstacle: &Obstacle) -> Option<EpochRecord> {
        let Obstacle::SlotsMissing { unusable, .. } = obstacle else { return None };
        let known = self.excluded();
        let frozen = unusable.iter().map(|&(instance, _)| instance);
        let new: Vec<InstanceId> =
            frozen.filter(|i| self.probes.is_frozen(*i) && !known.contains(i)).collect();
        if new.is_empty() {
            return None;
        }
        let excluded = self.standing_exclusions().chain(new).collect();
        Some(EpochRecord { counter, spec: None, excluded })
    }

    fn excluded(&self) -> &[InstanceId] {
        self.mirror.epoch.as_ref().map_or(&[], |entry| &entry.value.excluded)
    }

    /// Exclusions that still have a listed member who has not passed its probes.
    fn standing_exclusions(&self) -> impl Iterator<Item = InstanceId> {
        let excluded = self.excluded().iter().copied();
        excluded.filter(|&i| self.mirror.members.contains_key(&i) && self.probes.is_suspect(i))
    }

    /// One more than everything that the store or a candidate remembers: a store restored from a
    /// backup may have forgotten numbers that processes have used.
    fn next_counter(&self) -> Epoch {
        let stored = self.mirror.epoch.as_ref().map_or(Epoch(0), |entry| entry.value.counter);
        let in_group = self.mirror.members.values().filter_map(|entry| entry.value.decoder());
        let remembered =
            in_group.filter(|place| place.group == self.place.group).map(|place| place.last_epoch);
        let own = [stored, self.mirror.active_epoch(), self.last_joined];
        own.into_iter().chain(remembered).max().unwrap_or(Epoch(0)).next()
    }

    /// A proposal that does not concern us and may still become active, with the time until which it is
    /// given a chance.
    fn pending_proposal(&self) -> Option<(Epoch, Duration)> {
        let entry = self.mirror.epoch.as_ref()?;
        let spec = entry.value.spec.as_ref()?;
        let formed = self.mirror.active_epoch() >= spec.epoch;
        // If it named us and could form, we would have joined it.
        let names_us = spec.slot_of(self.me.instance).is_some();
        let broken = spec.slots.iter().any(|slot| !self.mirror.is_unchanged(slot));
        let until = entry.observed_at + self.config.forming_timeout;
        (!formed && !names_us && !broken).then_some((spec.epoch, until))
    }

    /// The rule that keeps two epochs of a group from serving together.
    fn may_succeed_active(&mut self, slots: &[SlotAssignment], now: Duration) -> bool {
        let members: Vec<InstanceId> =
            self.mirror.active_slots().iter().map(|slot| slot.instance).collect();
        let shared = slots.iter().any(|slot| members.contains(&slot.instance));
        if members.is_empty() || shared || self.forced {
            return true;
        }
        let validity = self.config.probe_validity;
        let mut gone = true;
        for instance in members {
            gone &= match self.mirror.members.get(&instance) {
                // A lease outlives its process; the slot's lock does not.
                Some(entry) => {
                    let place = entry.value.decoder();
                    place.is_some_and(|place| self.is_replaced(entry, place))
                }
                None => self.probes.is_gone(instance, validity, now),
            };
        }
        gone
    }

    /// Sends the probes that are due.
    fn probe(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let mirror = &self.mirror;
        let in_active = |i| mirror.active_slots().iter().any(|slot| slot.instance == i);
        let listed = |i| mirror.members.contains_key(&i);
        // A frozen member that lost its lease and registers again must prove itself all the same.
        let excluded = |i| mirror.epoch.as_ref().is_some_and(|e| e.value.excluded.contains(&i));
        self.probes.retain(|i| listed(i) || excluded(i), |i| in_active(i) && !listed(i));
        for instance in self.probes.due(now) {
            let listed = self.mirror.members.get(&instance).map(|entry| &entry.value.address);
            let in_active = self.mirror.active_slots().iter().find(|s| s.instance == instance);
            if let Some(address) = listed.or(in_active.map(|slot| &slot.address)) {
                actions.push(Action::Probe { instance, address: address.clone() });
            }
        }
        if let Some(at) = self.probes.deadline() {
            self.wake_at(at);
        }
    }
}
