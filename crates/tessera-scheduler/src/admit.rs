//! Who gets a slot: waiting sequences, one at a time, as their turn comes.

use std::sync::Arc;

use tessera_types::{AdmittedSequence, SequenceId, SequenceSlot};

use crate::prefix::PrefixHit;
use crate::schedule::Draft;
use crate::scheduler::{Place, Scheduler, SequenceEvent};
use crate::sequence::Sequence;

impl Scheduler {
    /// Admits the canary, if one waits and its slot is free.
    pub(crate) fn admit_to_reserve(&mut self, draft: &mut Draft) {
        let slot = SequenceSlot(self.config.max_running);
        if draft.budget == 0 || self.slots.get(slot.index()).is_none_or(Option::is_some) {
            return;
        }
        if let Some(id) = self.queue.next_of_reserve() {
            self.try_admit(id, slot, draft);
        }
    }

    /// Admits the sequence whose turn it is, or parks it if something of its own is missing. Without room
    /// for it nobody is admitted in this step: others must not take what it waits for.
    pub(crate) fn admit_next(&mut self, id: SequenceId, draft: &mut Draft) {
        match self.free_slots.last() {
            Some(&slot) => self.try_admit(id, slot, draft),
            None => draft.closed = true,
        }
    }

    /// Admits a waiting sequence if all its known tokens find a place beside what running sequences
    /// still lack, and schedules its first tokens.
    fn try_admit(&mut self, id: SequenceId, slot: SequenceSlot, draft: &mut Draft) {
        if self.waiting(id).held {
            return;
        }
        let hit = self.shared_prefix(id, draft);
        if draft.budget == 0 || draft.closed {
            return;
        }
        let num_computed = hit.blocks.len() * self.config.block_size as usize;
        // What covered an embedding may be gone since the sequence was queued.
        self.ask_for_media(id, num_computed);
        let sequence = self.waiting(id);
        let (gap, num_wanted) = (sequence.gap_from(num_computed), sequence.num_wanted());
        let use_reserve = sequence.request.use_reserve;
        if gap == 0 {
            self.queue.update(id, |sequence| sequence.parked = true);
            return;
        }
        // A hit on a free block takes it off the free list too.
        let revived = hit.blocks.iter().filter(|&&block| self.pool.is_free(block)).count();
        let needed = self.config.blocks_for(num_wanted) - hit.blocks.len() + revived;
        let promised = if use_reserve { 0 } else { self.promised_blocks(draft) };
        if self.free_blocks(use_reserve) < needed + promised {
            draft.closed |= !use_reserve;
            return;
        }
        self.admit(id, slot, hit, draft);
        self.schedule_tokens(slot, gap.min(draft.budget), draft);
    }

    /// Blocks that hold the beginning of a waiting sequence. What it shares with a running sequence that
    /// has not scheduled it yet is computed there, now: the turn is spent on the same tokens, once.
    fn shared_prefix(&mut self, id: SequenceId, draft: &mut Draft) -> PrefixHit {
        let hit = self.prefix_hit(self.waiting(id));
        let Some(source) = hit.source.filter(|source| source.num_blocks > hit.blocks.len()) else {
            return hit;
        };
        let owner = self.at(source.slot);
        let gap = owner.gap();
        if gap == 0 || owner.last_step == draft.plan.step {
            return hit;
        }
        self.schedule_tokens(source.slot, gap.min(draft.budget), draft);
        self.prefix_hit(self.waiting(id))
    }

    /// Moves a waiting sequence into a slot, with the blocks of its prefix hit.
    fn admit(&mut self, id: SequenceId, slot: SequenceSlot, hit: PrefixHit, draft: &mut Draft) {
        let mut sequence = self.queue.remove(id).expect("its turn came");
        self.queue.tenants.note_admission(sequence.account);
        sequence.parked = false;
        hit.blocks.iter().for_each(|&block| self.pool.share(block));
        sequence.num_computed = hit.blocks.len() * self.config.block_size as usize;
        sequence.num_registered_blocks = hit.blocks.len();
        if sequence.seniority.is_none() {
            self.note_first_admission(&mut sequence);
        }
        let request = &sequence.request;
        draft.plan.admitted.push(AdmittedSequence {
            slot,
            sequence: id,
            prompt: Arc::clone(&request.prompt),
            output: sequence.output.clone(),
            sampling: Arc::clone(&request.sampling),
            eos_token_ids: Arc::clone(&request.eos_token_ids),
            seed: request.seed,
            num_computed_tokens: sequence.num_computed as u32,
            block_table: hit.blocks.clone(),
        });
        sequence.blocks = hit.blocks;
        let order = sequence.order();
        let place = self.running.partition_point(|&running| self.at(running).order() < order);
        self.running.insert(place, slot);
        if slot.0 < self.config.max_running {
            self.free_slots.pop();
        }
        self.places.insert(id, Place::Slot(slot));
        self.slots[slot.index()] = Some(sequence);
        self.enter_frontier(slot);
        if let Some(promised) = &mut draft.promised {
            *promised += self.lacking_blocks(slot);
        }
    }

    fn note_first_admission(&mut self, sequence: &mut Sequence) {
        let num_cached_tokens = sequence.num_computed;
        sequence.seniority = Some(self.counters.num_admitted);
        sequence.num_cached_tokens = Some(num_cached_tokens);
        self.counters.num_admitted += 1;
        let request = &sequence.request;
        if !request.block_keys.is_empty() && request.sampling.prompt_logprobs.is_none() {
            self.counters.num_queried_tokens += request.prompt.tokens.len() as u64;
            self.counters.num_hit_tokens += num_cached_tokens as u64;
        }
        let sequence = request.sequence;
        self.events.push(SequenceEvent::Admitted { sequence, num_cached_tokens });
    }

    fn waiting(&self, id: SequenceId) -> &Sequence {
        self.queue.get(id).expect("a sequence whose turn it is waits")
    }

    /// Blocks that running sequences lack for the tokens they have. Counted once per step, then kept.
    fn promised_blocks(&self, draft: &mut Draft) -> usize {
        let count = || self.running.iter().map(|&slot| self.lacking_blocks(slot)).sum();
        *draft.promised.get_or_insert_with(count)
    }

    /// Blocks that a running sequence lacks for the tokens it has.
    pub(crate) fn lacking_blocks(&self, slot: SequenceSlot) -> usize {
        let sequence = self.at(slot);
        let needed = self.config.blocks_for(sequence.num_wanted());
        needed.saturating_sub(sequence.blocks.len())
    }
}
