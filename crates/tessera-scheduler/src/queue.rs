//! Sequences that wait for a slot. Those that could be admitted stand in the order of turns (see
//! `tenants`); the others are parked until something happens to them, so that making a plan never walks
//! the queue.

use std::collections::{HashMap, VecDeque};

use tessera_types::{SequenceId, TenantId};

use crate::sequence::Sequence;
use crate::tenants::{Tenants, Turn};

/// The queue, with the accounts that order it.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    pub tenants: Tenants,
    sequences: HashMap<SequenceId, Sequence>,
    /// Sequences in the queue by tenant; no entry is 0.
    num_by_tenant: HashMap<TenantId, u32>,
    /// Sequences that may use the reserve have their own slot, so they wait for no one else.
    reserve: VecDeque<SequenceId>,
}

impl WaitingQueue {
    /// Sequences that wait, parked ones and those of the reserve included.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Sequences that wait for the reserve's slot.
    pub fn num_reserve(&self) -> usize {
        self.reserve.len()
    }

    /// Sequences of a tenant that wait.
    pub fn num_of(&self, tenant: TenantId) -> u32 {
        self.num_by_tenant.get(&tenant).copied().unwrap_or(0)
    }

    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id)
    }

    /// Queues a sequence, ready unless it is held or parked.
    pub fn push(&mut self, sequence: Sequence) {
        let id = sequence.id();
        if sequence.request.use_reserve {
            self.reserve.push_back(id);
        } else {
            *self.num_by_tenant.entry(sequence.request.tenant).or_insert(0) += 1;
        }
        self.sequences.insert(id, sequence);
        self.update(id, |_| ());
    }

    /// Takes a sequence out.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        self.update(id, |sequence| sequence.parked = true);
        let sequence = self.sequences.remove(&id)?;
        if sequence.request.use_reserve {
            self.reserve.retain(|&waiting| waiting != id);
        } else {
            let tenant = sequence.request.tenant;
            let num = self.num_by_tenant.get_mut(&tenant).expect("counted when it was queued");
            *num -= 1;
            if *num == 0 {
                self.num_by_tenant.remove(&tenant);
            }
        }
        Some(sequence)
    }

    /// Changes what decides whether a sequence is ready (`held`, `parked`).
    pub fn update(&mut self, id: SequenceId, change: impl FnOnce(&mut Sequence)) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        change(sequence);
        if sequence.request.use_reserve {
            return;
        }
        let (account, arrival) = (sequence.account, sequence.request.arrival);
        match sequence.held || sequence.parked {
            true => self.tenants.clear_ready(account, arrival, id),
            false => self.tenants.set_ready(account, arrival, id),
        }
    }

    /// The ready sequence whose turn it is.
    pub fn next(&mut self) -> Option<(Turn, SequenceId)> {
        self.tenants.next()
    }

    /// The sequence that takes the reserve's slot next.
    pub fn next_of_reserve(&self) -> Option<SequenceId> {
        self.reserve.front().copied()
    }

    /// Drops everything, the accounts too.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
