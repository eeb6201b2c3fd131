//! What the store said last, as far as one group needs it.

use std::collections::BTreeMap;
use std::time::Duration;

use tessera_types::{Epoch, InstanceId};

use super::Event;
use crate::records::{
    ActiveRecord, DecoderCapacity, EpochRecord, EpochSpec, IdRecord, MemberInfo, SlotAssignment,
};

/// A value with its place in the store's history.
#[derive(Debug, Clone)]
pub(super) struct Entry<T> {
    pub value: T,
    pub mod_revision: i64,
    pub create_revision: i64,
    /// When this process saw it.
    pub observed_at: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Ready {
    num_kv_blocks: u32,
    mod_revision: i64,
}

/// The mirror.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    pub synced: bool,
    pub members: BTreeMap<InstanceId, Entry<MemberInfo>>,
    pub epoch: Option<Entry<EpochRecord>>,
    pub active: Option<Entry<ActiveRecord>>,
    ready: BTreeMap<(Epoch, InstanceId), Ready>,
    id: Option<IdRecord>,
}

impl Mirror {
    /// Takes a store event; others are ignored.
    pub fn apply(&mut self, event: Event, now: Duration) {
        match event {
            Event::Synced => self.synced = true,
            Event::MemberPut { member, create_revision, mod_revision } => {
                let instance = member.instance;
                let entry =
                    Entry { value: *member, mod_revision, create_revision, observed_at: now };
                self.members.insert(instance, entry);
            }
            Event::MemberDeleted { instance } => {
                self.members.remove(&instance);
            }
            Event::EpochPut { record, mod_revision } => {
                let counter = record.counter;
                self.ready.retain(|&(epoch, _), _| epoch >= counter);
                self.epoch = Some(entry(*record, mod_revision, now));
            }
            Event::ActivePut { record, mod_revision } => {
                self.active = Some(entry(*record, mod_revision, now));
            }
            Event::ActiveDeleted => self.active = None,
            Event::ReadyPut { record, mod_revision } => {
                let ready = Ready { num_kv_blocks: record.num_kv_blocks, mod_revision };
                self.ready.insert((record.epoch, record.instance), ready);
            }
            Event::ReadyDeleted { epoch, instance } => {
                self.ready.remove(&(epoch, instance));
            }
            Event::IdPut { record } => self.id = Some(record),
            _ => {}
        }
    }

    /// Epoch of the active record; 0 if there is none.
    pub fn active_epoch(&self) -> Epoch {
        self.active.as_ref().map_or(Epoch(0), |entry| entry.value.epoch)
    }

    /// The active epoch, if it is later than `epoch`.
    pub fn active_beyond(&self, epoch: Epoch) -> Option<Epoch> {
        Some(self.active_epoch()).filter(|&active| active > epoch)
    }

    /// Members of the active epoch.
    pub fn active_slots(&self) -> &[SlotAssignment] {
        self.active.as_ref().map_or(&[], |entry| &entry.value.slots)
    }

    /// Whether `instance` may still be running the active epoch: it belongs to it, and its own record
    /// does not say that it has left.
    pub fn may_run_active(&self, instance: InstanceId) -> bool {
        let belongs = self.active_slots().iter().any(|slot| slot.instance == instance);
        belongs && self.published_last_epoch(instance) < Some(self.active_epoch())
    }

    /// `last_epoch` of the member's record.
    pub fn published_last_epoch(&self, instance: InstanceId) -> Option<Epoch> {
        self.members.get(&instance)?.value.decoder().map(|place| place.last_epoch)
    }

    /// Whether the member's key stands at the revision it was chosen at.
    pub fn is_unchanged(&self, slot: &SlotAssignment) -> bool {
        let entry = self.members.get(&slot.instance);
        entry.is_some_and(|entry| entry.mod_revision == slot.member_revision)
    }

    /// Whether the member declared itself ready with the agreed number of blocks.
    pub fn is_ready(&self, spec: &EpochSpec, slot: &SlotAssignment) -> bool {
        let ready = self.ready.get(&(spec.epoch, slot.instance));
        ready.is_some_and(|ready| ready.num_kv_blocks == spec.num_kv_blocks)
    }

    /// Revision of the member's ready key; 0 if there is none.
    pub fn ready_revision(&self, spec: &EpochSpec, slot: &SlotAssignment) -> i64 {
        self.ready.get(&(spec.epoch, slot.instance)).map_or(0, |ready| ready.mod_revision)
    }

    /// The communicator id of `epoch`.
    pub fn id_of(&self, epoch: Epoch) -> Option<Vec<u8>> {
        self.id.as_ref().filter(|record| record.epoch == epoch).map(|record| record.id.clone())
    }

    /// What the members of `spec` can hold together: the agreed blocks, and the least of all else.
    pub fn joint_capacity(&self, spec: &EpochSpec, own: DecoderCapacity) -> DecoderCapacity {
        let members = spec.slots.iter().filter_map(|slot| self.members.get(&slot.instance));
        let capacities = members.filter_map(|entry| entry.value.decoder()).map(|p| p.capacity);
        capacities.fold(
            DecoderCapacity { num_kv_blocks: spec.num_kv_blocks, ..own },
            |joint, capacity| DecoderCapacity {
                max_sequences: joint.max_sequences.min(capacity.max_sequences),
                max_model_len: joint.max_model_len.min(capacity.max_model_len),
                ..joint
            },
        )
    }
}

fn entry<T>(value: T, mod_revision: i64, observed_at: Duration) -> Entry<T> {
    Entry { value, mod_revision, create_revision: 0, observed_at }
}
