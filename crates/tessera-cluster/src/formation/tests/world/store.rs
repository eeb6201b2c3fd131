//! The store of the model world: records with revisions, transactions, and watches that keep order.

use super::*;

impl World {
    pub(super) fn reaches_store(&self, process: usize) -> bool {
        self.processes[process].cut_until <= self.now
    }

    pub(super) fn register(&mut self, process: usize) {
        let key = self.keys.member(self.processes[process].instance);
        let value = Value::Member(self.processes[process].info.clone());
        self.put(key, value);
    }

    /// Answer of a transaction, and whether it was applied.
    pub(super) fn txn(
        &mut self,
        process: usize,
        compares: &[Compare],
        key: String,
        value: Value,
    ) -> (TxnOutcome, bool) {
        if !self.reaches_store(process) {
            return (TxnOutcome::Unknown, false);
        }
        let revision = |key: &str| self.store.get(key).map_or(0, |stored| stored.mod_revision);
        if compares.iter().any(|compare| revision(&compare.key) != compare.mod_revision) {
            return (TxnOutcome::Conflict, false);
        }
        self.put(key, value);
        match std::mem::take(&mut self.lose_answer) {
            true => (TxnOutcome::Unknown, true),
            false => (TxnOutcome::Committed, true),
        }
    }

    pub(super) fn put(&mut self, key: String, value: Value) {
        self.revision += 1;
        let mod_revision = self.revision;
        let create_revision = self.store.get(&key).map_or(mod_revision, |s| s.create_revision);
        let stored = Stored { value, create_revision, mod_revision };
        let event = self.event_of(&stored);
        self.store.insert(key, stored);
        self.broadcast(event);
    }

    pub(super) fn delete(&mut self, key: &str) {
        if self.store.remove(key).is_none() {
            return;
        }
        self.revision += 1;
        match self.keys.parse(key) {
            Some(StoreKey::Member(instance)) => self.broadcast(Event::MemberDeleted { instance }),
            Some(StoreKey::Ready { epoch, instance, .. }) => {
                self.broadcast(Event::ReadyDeleted { epoch, instance });
            }
            _ => {}
        }
    }

    pub(super) fn delete_leased(&mut self, process: usize) {
        let instance = self.processes[process].instance;
        let owned = |key: &&String| key.ends_with(&instance.to_string());
        let keys: Vec<String> = self.store.keys().filter(owned).cloned().collect();
        keys.iter().for_each(|key| self.delete(key));
    }

    pub(super) fn event_of(&self, stored: &Stored) -> Event {
        let mod_revision = stored.mod_revision;
        match stored.value.clone() {
            Value::Member(member) => Event::MemberPut {
                member: Box::new(member),
                create_revision: stored.create_revision,
                mod_revision,
            },
            Value::Epoch(record) => Event::EpochPut { record: Box::new(record), mod_revision },
            Value::Ready(record) => Event::ReadyPut { record, mod_revision },
            Value::Id(record) => Event::IdPut { record },
            Value::Active(record) => Event::ActivePut { record: Box::new(record), mod_revision },
        }
    }

    pub(super) fn broadcast(&mut self, event: Event) {
        for process in 0..self.processes.len() {
            if self.processes[process].alive {
                self.deliver_by_watch(process, event.clone());
            }
        }
    }

    pub(super) fn deliver_by_watch(&mut self, process: usize, event: Event) {
        let from = self.now.max(self.processes[process].cut_until);
        let at = from + 1 + self.random() % 20;
        self.processes[process].watch.push_back(event);
        self.push(process, at, Due::Watch);
    }
}
