//! Which instance may hold which slot of the next epoch.

use tessera_types::{Epoch, InstanceId};

use super::Formation;
use super::mirror::Entry;
use crate::records::{DecoderMember, EpochSpec, MemberInfo, SlotAssignment};

/// Why no epoch is proposed at the moment. For status pages and logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// The store has not been read yet.
    NotSynced,
    /// Our own member key is not in the store.
    NotRegistered,
    /// Our own record does not say yet that we left the last active epoch.
    NotPublished,
    /// Others found this member frozen.
    Excluded,
    /// Another proposal may still form.
    ProposalPending { epoch: Epoch },
    /// No usable member in these slots; instances that are listed but not usable, with the cause.
    SlotsMissing { slots: Vec<u32>, unusable: Vec<(InstanceId, Unusable)> },
    /// No member of the active epoch would take part, and it may still be running.
    NoSharedMember { epoch: Epoch },
}

/// Why a listed member cannot be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// Its slot, ranks or world differ from ours.
    Layout,
    /// Its weights differ from ours.
    Fingerprint,
    /// Its numerics differ from ours.
    Numerics,
    /// Its KV blocks have another size.
    BlockSize,
    /// It broke or froze and has not answered probes since.
    Suspect,
    /// It may still be running the active epoch.
    InActiveEpoch,
    /// A later instance holds its slot's lock.
    Replaced,
}

impl Formation {
    /// One usable instance per slot, or what is missing.
    pub(super) fn choose(&self) -> Result<Vec<SlotAssignment>, Obstacle> {
        let mut slots = Vec::new();
        let mut missing = Vec::new();
        let mut unusable = Vec::new();
        for slot in 0..self.place.num_slots {
            match self.choose_for(slot, &mut unusable) {
                Some((entry, place)) => slots.push(SlotAssignment {
                    slot,
                    first_rank: place.first_rank,
                    num_ranks: place.num_ranks,
                    instance: entry.value.instance,
                    address: entry.value.address.clone(),
                    member_revision: entry.mod_revision,
                }),
                None => missing.push(slot),
            }
        }
        match missing.is_empty() {
            true => Ok(slots),
            false => Err(Obstacle::SlotsMissing { slots: missing, unusable }),
        }
    }

    /// KV blocks that every chosen member can hold.
    pub(super) fn least_kv_blocks(&self, slots: &[SlotAssignment]) -> u32 {
        let members = slots.iter().filter_map(|slot| self.mirror.members.get(&slot.instance));
        let blocks = members.filter_map(|e| e.value.decoder()).map(|p| p.capacity.num_kv_blocks);
        blocks.min().unwrap_or(0)
    }

    fn choose_for(
        &self,
        slot: u32,
        unusable: &mut Vec<(InstanceId, Unusable)>,
    ) -> Option<(&Entry<MemberInfo>, &DecoderMember)> {
        let mut usable: Vec<(&Entry<MemberInfo>, &DecoderMember)> = Vec::new();
        for (entry, place) in self.members_of(slot) {
            match self.why_unusable(entry, place) {
                Some(cause) => unusable.push((entry.value.instance, cause)),
                None => usable.push((entry, place)),
            }
        }
        // A survivor of the active epoch has a warm device, and shares a member; then the longest there.
        let survivor = |instance| self.mirror.active_slots().iter().any(|s| s.instance == instance);
        usable.sort_by_key(|(entry, _)| {
            (!survivor(entry.value.instance), entry.create_revision, entry.value.instance)
        });
        usable.into_iter().next()
    }

    fn members_of(&self, slot: u32) -> impl Iterator<Item = (&Entry<MemberInfo>, &DecoderMember)> {
        let members = self.mirror.members.values();
        members.filter_map(move |entry| {
            let place = entry.value.decoder()?;
            (place.group == self.place.group && place.slot == slot).then_some((entry, place))
        })
    }

    fn why_unusable(&self, entry: &Entry<MemberInfo>, place: &DecoderMember) -> Option<Unusable> {
        let instance = entry.value.instance;
        let own_slot = place.slot == self.place.slot;
        if own_slot && instance != self.me.instance {
            // This machine speaks for its own slot; a rival for it proposes for itself.
            return Some(Unusable::Replaced);
        }
        if place.world_size != self.place.world_size || place.num_slots != self.place.num_slots {
            return Some(Unusable::Layout);
        }
        if place.capacity.block_size != self.place.capacity.block_size {
            return Some(Unusable::BlockSize);
        }
        let model = entry.value.model.as_ref()?;
        if model.language_fingerprint != self.model.language_fingerprint
            || model.vision_fingerprint != self.model.vision_fingerprint
        {
            return Some(Unusable::Fingerprint);
        }
        if model.language_numerics != self.model.language_numerics
            || model.vision_numerics != self.model.vision_numerics
        {
            return Some(Unusable::Numerics);
        }
        if self.is_replaced(entry, place) {
            return Some(Unusable::Replaced);
        }
        if self.mirror.may_run_active(instance) {
            return Some(Unusable::InActiveEpoch);
        }
        self.probes.is_suspect(instance).then_some(Unusable::Suspect)
    }

    /// Of two instances with one slot and one host, the later holds the slot's lock, so the earlier is
    /// dead even while its lease lives.
    pub(super) fn is_replaced(&self, entry: &Entry<MemberInfo>, place: &DecoderMember) -> bool {
        let Some(host) = &place.slot_lock_host else { return false };
        self.members_of(place.slot).any(|(other, other_place)| {
            other_place.slot_lock_host.as_ref() == Some(host)
                && other.create_revision > entry.create_revision
        })
    }

    /// Whether the members fit together as ranks of one world.
    pub(super) fn covers_world(&self, slots: &[SlotAssignment]) -> bool {
        let mut next_rank = 0;
        slots.iter().all(|slot| {
            let fits = slot.first_rank.0 == next_rank;
            next_rank += slot.num_ranks;
            fits
        }) && next_rank == self.place.world_size
    }

    /// The spec of a proposal from these slots.
    pub(super) fn spec_of(&self, epoch: Epoch, slots: Vec<SlotAssignment>) -> EpochSpec {
        EpochSpec {
            epoch,
            num_kv_blocks: self.least_kv_blocks(&slots),
            slots,
            world_size: self.place.world_size,
            proposer: self.me.instance,
        }
    }
}
