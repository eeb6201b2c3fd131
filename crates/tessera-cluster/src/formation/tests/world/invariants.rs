//! What must hold after every event.

use super::*;

impl World {
    /// Whether the proposal shares a member with the active epoch, or nobody of that can be running it.
    pub(super) fn may_succeed(&self, record: &EpochRecord) -> bool {
        let (Some(spec), Some(active)) = (&record.spec, self.active()) else { return true };
        let shared = active.slots.iter().any(|slot| spec.slot_of(slot.instance).is_some());
        let may_run = |slot: &crate::records::SlotAssignment| {
            let process = self.processes.iter().find(|p| p.instance == slot.instance);
            process.is_some_and(|p| {
                p.alive && p.joined.as_ref().is_some_and(|(e, _)| *e == active.epoch)
            })
        };
        shared || !active.slots.iter().any(may_run)
    }

    pub(super) fn judge(&mut self) {
        let active = self.active_epoch();
        assert!(active >= self.highest_active.0, "the active epoch went back");
        self.highest_active = Epoch(active);
        let mut complete: BTreeMap<Epoch, usize> = BTreeMap::new();
        for process in self.processes.iter().filter(|p| p.alive && p.comm_ready) {
            if let Some((epoch, _)) = process.joined {
                *complete.entry(epoch).or_default() += 1;
            }
        }
        let serving = |epoch: &Epoch| {
            self.processes.iter().any(|p| p.machine.state() == State::Serving(*epoch) && p.alive)
        };
        let serving: Vec<Epoch> = complete
            .into_iter()
            .filter(|(epoch, members)| *members == self.num_slots && serving(epoch))
            .map(|(epoch, _)| epoch)
            .collect();
        assert!(serving.len() <= 1, "two epochs serve: {serving:?}");
    }
}
