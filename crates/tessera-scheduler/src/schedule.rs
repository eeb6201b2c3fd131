//! How a plan is made: running sequences first, then the queue, within one token budget.

use std::ops::Bound;
use std::sync::Arc;

use tessera_types::{AdmittedSequence, BlockId, ScheduledSequence, SequenceSlot, StepId, StepPlan};

use crate::scheduler::{InFlight, InFlightRow, Place, Scheduler, SequenceEvent};
use crate::sequence::{OrderKey, Sequence, Stage};
use crate::table::scored_tokens;

/// A plan in the making.
struct Draft {
    plan: StepPlan,
    rows: Vec<InFlightRow>,
    /// Tokens that may still be scheduled.
    budget: usize,
    /// First sequence, in order of admission, that did not get the blocks it needs. Those after it get
    /// none: they would take what it waits for.
    starved: Option<OrderKey>,
    /// Blocks are so short that a sequence was starved or preempted: nobody is admitted.
    short_of_blocks: bool,
}

/// What became of a waiting sequence.
enum Admission {
    Admitted,
    /// It cannot start yet for a reason of its own; others may pass.
    NotReady,
    /// Slots or blocks are missing; others must not pass.
    NoRoom,
}

impl Scheduler {
    /// The next step, or `None`: nothing can be computed or released now, there is no epoch, or
    /// `pipeline_depth` steps are in flight. A plan may hold releases only.
    pub fn schedule(&mut self) -> Option<StepPlan> {
        let epoch = self.epoch?;
        if self.in_flight.len() >= self.config.pipeline_depth as usize {
            return None;
        }
        let step = self.scheduled_step.next();
        let mut draft = Draft {
            plan: StepPlan { epoch, step, ..StepPlan::default() },
            rows: Vec::with_capacity(self.running.len() + 1),
            budget: self.config.max_tokens_per_step as usize,
            starved: None,
            short_of_blocks: false,
        };
        draft.plan.scheduled.reserve(self.running.len() + 1);
        self.schedule_running(&mut draft);
        self.admit_waiting(&mut draft);
        self.seal(draft, step)
    }

    /// Stamps the plan with the table's digest and puts the step in flight.
    fn seal(&mut self, draft: Draft, step: StepId) -> Option<StepPlan> {
        let Draft { mut plan, rows, .. } = draft;
        if plan.scheduled.is_empty() && self.released.is_empty() {
            return None;
        }
        plan.released = std::mem::take(&mut self.released);
        let digest = self.table.advance(&plan);
        plan.table_digest = digest.expect("the scheduler's own plan fits its table");
        self.scheduled_step = step;
        self.in_flight.push_back(InFlight { step, rows });
        Some(plan)
    }

    /// Sequences that lack one token (those in decode) go first: the longest prompt delays them by no more
    /// than the rest of the budget. Each has room for its token, as `max_running` is within the budget.
    fn schedule_running(&mut self, draft: &mut Draft) {
        for one_token in [true, false] {
            // Preemption removes sequences behind the current one only.
            let mut index = 0;
            while let Some(&slot) = self.running.get(index) {
                index += 1;
                let gap = self.at(slot).gap();
                if gap > 0 && (gap == 1) == one_token {
                    self.schedule_tokens(slot, gap.min(draft.budget), draft);
                }
            }
        }
    }

    /// Schedules up to `num_tokens` tokens of a running sequence, as many as find a place.
    fn schedule_tokens(&mut self, slot: SequenceSlot, num_tokens: usize, draft: &mut Draft) {
        let num_tokens = self.make_room(slot, num_tokens, draft);
        if num_tokens == 0 {
            return;
        }
        let missing = self.missing_blocks(slot, num_tokens);
        let mut appended_blocks = Vec::with_capacity(missing);
        for _ in 0..missing {
            appended_blocks.push(self.pool.take().expect("make_room counted the free blocks"));
        }
        draft.plan.zero_blocks.extend_from_slice(&appended_blocks);
        draft.budget -= num_tokens;
        let step = draft.plan.step;
        let sequence = self.at_mut(slot);
        sequence.blocks.extend_from_slice(&appended_blocks);
        sequence.num_computed += num_tokens;
        sequence.last_step = step;
        let sample = sequence.num_computed == sequence.num_wanted();
        sequence.num_pending += usize::from(sample);
        let num_computed = sequence.num_computed;
        let request = &sequence.request;
        let computed = num_computed - num_tokens..num_computed;
        let scored = scored_tokens(&request.sampling, &request.prompt, computed);
        draft.rows.push(InFlightRow { slot, num_computed, scored, sample });
        draft.plan.scheduled.push(ScheduledSequence {
            slot,
            num_tokens: num_tokens as u32,
            appended_blocks,
            sample,
        });
    }

    /// Frees blocks for `num_tokens` more tokens by preempting younger sequences, youngest first. Returns
    /// how many of the tokens find a place now.
    fn make_room(&mut self, slot: SequenceSlot, num_tokens: usize, draft: &mut Draft) -> usize {
        let missing = self.missing_blocks(slot, num_tokens);
        if missing == 0 {
            return num_tokens;
        }
        let (order, use_reserve) = (self.at(slot).order(), self.at(slot).request.use_reserve);
        let mut granted = 0;
        if use_reserve || draft.starved.is_none_or(|starved| order < starved) {
            while self.free_blocks(use_reserve) + self.leaving_blocks() < missing {
                let youngest = *self.running.last().expect("the sequence itself is running");
                if self.at(youngest).order() <= order {
                    break;
                }
                self.preempt(youngest);
                draft.short_of_blocks = true;
            }
            granted = self.free_blocks(use_reserve).min(missing);
        }
        if granted < missing {
            draft.starved = Some(draft.starved.map_or(order, |starved| starved.min(order)));
            draft.short_of_blocks = true;
        }
        let sequence = self.at(slot);
        let places = (sequence.blocks.len() + granted) * self.config.block_size as usize;
        num_tokens.min(places - sequence.num_computed)
    }

    fn preempt(&mut self, slot: SequenceSlot) {
        self.num_preemptions += 1;
        self.leave(slot, Stage::Preempting);
        self.empty_left_slots();
    }

    fn missing_blocks(&self, slot: SequenceSlot, num_tokens: usize) -> usize {
        let sequence = self.at(slot);
        let needed = self.config.blocks_for(sequence.num_computed + num_tokens);
        needed.saturating_sub(sequence.blocks.len())
    }

    /// Blocks that a sequence may take now: the unused reserve is for its owner alone.
    fn free_blocks(&self, use_reserve: bool) -> usize {
        let reserve_slot = self.slots.get(self.config.max_running as usize);
        let in_use = reserve_slot.and_then(Option::as_ref).map_or(0, |owner| owner.blocks.len());
        let reserve = match use_reserve {
            true => 0,
            false => (self.config.reserved_blocks as usize).saturating_sub(in_use),
        };
        self.pool.num_free().saturating_sub(reserve)
    }

    /// Blocks that come free when the steps in flight are done. Shared ones are counted too; whoever waits
    /// for them in vain preempts another sequence then.
    fn leaving_blocks(&self) -> usize {
        self.leaving.iter().map(|&slot| self.at(slot).blocks.len()).sum()
    }

    fn admit_waiting(&mut self, draft: &mut Draft) {
        if self.waiting.is_empty() {
            return;
        }
        let mut last: Option<OrderKey> = None;
        while draft.budget > 0 && !draft.short_of_blocks {
            let from = last.map_or(Bound::Unbounded, Bound::Excluded);
            let Some((&order, _)) = self.waiting.range((from, Bound::Unbounded)).next() else {
                return;
            };
            last = Some(order);
            match self.try_admit(order, draft) {
                Admission::Admitted | Admission::NotReady => {}
                Admission::NoRoom => return,
            }
        }
    }

    /// Admits a waiting sequence if all its known tokens find a place beside what running sequences
    /// still lack, and schedules its first tokens.
    fn try_admit(&mut self, order: OrderKey, draft: &mut Draft) -> Admission {
        let sequence = &self.waiting[&order];
        if sequence.held {
            return Admission::NotReady;
        }
        let use_reserve = sequence.request.use_reserve;
        let Some(slot) = self.free_slot(use_reserve) else {
            return if use_reserve { Admission::NotReady } else { Admission::NoRoom };
        };
        let hit = self.prefix_hit(sequence);
        let num_computed = hit.len() * self.config.block_size as usize;
        let (gap, num_wanted) = (sequence.gap_from(num_computed), sequence.num_wanted());
        let sequence = self.waiting.get_mut(&order).expect("the caller found it there");
        let items = sequence.take_needed_media(num_computed);
        if !items.is_empty() {
            // The blocks that covered them are gone since the sequence was queued.
            self.events.push(SequenceEvent::MediaNeeded { sequence: sequence.id(), items });
            return Admission::NotReady;
        }
        if gap == 0 {
            return Admission::NotReady;
        }
        // A hit on a free block takes it off the free list too.
        let revived = hit.iter().filter(|&&block| self.pool.is_free(block)).count();
        let needed = self.config.blocks_for(num_wanted) - hit.len() + revived;
        let promised = if use_reserve { 0 } else { self.promised_blocks() };
        if self.free_blocks(use_reserve) < needed + promised {
            return Admission::NoRoom;
        }
        self.admit(order, slot, hit, draft);
        self.schedule_tokens(slot, gap.min(draft.budget), draft);
        Admission::Admitted
    }

    /// Moves a waiting sequence into a slot, with the blocks of its prefix hit.
    fn admit(&mut self, order: OrderKey, slot: SequenceSlot, hit: Vec<BlockId>, draft: &mut Draft) {
        let mut sequence = self.waiting.remove(&order).expect("the caller found it there");
        hit.iter().for_each(|&block| self.pool.share(block));
        sequence.num_computed = hit.len() * self.config.block_size as usize;
        sequence.num_registered_blocks = hit.len();
        if sequence.num_cached_tokens.is_none() {
            let num_cached_tokens = sequence.num_computed;
            sequence.num_cached_tokens = Some(num_cached_tokens);
            let sequence = sequence.id();
            self.events.push(SequenceEvent::Admitted { sequence, num_cached_tokens });
        }
        let request = &sequence.request;
        draft.plan.admitted.push(AdmittedSequence {
            slot,
            sequence: request.sequence,
            prompt: Arc::clone(&request.prompt),
            output: sequence.output.clone(),
            sampling: Arc::clone(&request.sampling),
            eos_token_ids: Arc::clone(&request.eos_token_ids),
            seed: request.seed,
            num_computed_tokens: sequence.num_computed as u32,
            block_table: hit.clone(),
        });
        sequence.blocks = hit;
        let place = self.running.partition_point(|&running| self.at(running).order() < order);
        self.running.insert(place, slot);
        if slot.0 < self.config.max_running {
            self.free_slots.pop();
        }
        self.places.insert(sequence.id(), Place::Slot(slot));
        self.slots[slot.index()] = Some(sequence);
    }

    /// The slot an admission would take.
    fn free_slot(&self, use_reserve: bool) -> Option<SequenceSlot> {
        if !use_reserve {
            return self.free_slots.last().copied();
        }
        let slot = SequenceSlot(self.config.max_running);
        self.slots.get(slot.index()).is_some_and(Option::is_none).then_some(slot)
    }

    /// Cached blocks that hold the beginning of the sequence. At least one token is left to compute, as a
    /// step must have a row to draw from, and every row whose log probability is still to be reported.
    pub(crate) fn prefix_hit(&self, sequence: &Sequence) -> Vec<BlockId> {
        let num_tokens = (sequence.len() - 1).min(sequence.first_unreported_row());
        let longest = num_tokens / self.config.block_size as usize;
        let keys = sequence.request.block_keys.iter().take(longest);
        keys.map_while(|key| self.pool.lookup(key)).collect()
    }

    /// Blocks that running sequences lack for the tokens they have.
    fn promised_blocks(&self) -> usize {
        let lacking = |&slot: &SequenceSlot| {
            let sequence = self.at(slot);
            let needed = self.config.blocks_for(sequence.num_wanted());
            needed.saturating_sub(sequence.blocks.len())
        };
        self.running.iter().map(lacking).sum()
    }
}
