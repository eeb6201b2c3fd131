//! How a plan is made, within one token budget: sequences in decode first, then prefill and admission in
//! the order of turns (priority, then the least served tenant).

use std::collections::{BTreeMap, VecDeque};

use tessera_types::{ScheduledSequence, SequenceSlot, StepId, StepPlan};

use crate::scheduler::{InFlight, InFlightRow, Scheduler};
use crate::sequence::{OrderKey, Stage};
use crate::table::scored_tokens;
use crate::tenants::Turn;

/// A plan in the making.
pub(crate) struct Draft {
    pub plan: StepPlan,
    rows: Vec<InFlightRow>,
    /// Tokens that may still be scheduled.
    pub budget: usize,
    /// First sequence, in order of seniority, that did not get the blocks it needs. Those after it get
    /// none: they would take what it waits for.
    starved: Option<OrderKey>,
    /// Nobody else is admitted: slots or blocks are missing.
    pub closed: bool,
    /// Blocks that running sequences lack, once somebody asked.
    pub promised: Option<usize>,
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
            budget: self.token_budget as usize,
            starved: None,
            closed: false,
            promised: None,
        };
        draft.plan.scheduled.reserve(self.running.len() + 1);
        self.schedule_decode(&mut draft);
        if draft.budget > 0 {
            self.spend_rest(&mut draft);
        }
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
    /// than the rest of the budget. Each has room for its token, as every slot is within the budget.
    fn schedule_decode(&mut self, draft: &mut Draft) {
        // Preemption removes sequences behind the current one only.
        let mut index = 0;
        while let Some(&slot) = self.running.get(index) {
            index += 1;
            if self.at(slot).gap() == 1 {
                self.schedule_tokens(slot, 1, draft);
            }
        }
    }

    /// Spends what decode left on prompts, running and waiting, turn by turn. Of the same tenant running
    /// sequences go before waiting ones.
    fn spend_rest(&mut self, draft: &mut Draft) {
        let mut prefill = self.prefill_turns(draft);
        self.admit_to_reserve(draft);
        while draft.budget > 0 {
            let running = prefill.first_key_value().map(|(&turn, _)| turn);
            let waiting = if draft.closed { None } else { self.queue.next() };
            match (running, waiting) {
                (None, None) => return,
                (Some(turn), waiting) if waiting.is_none_or(|(other, _)| turn <= other) => {
                    self.prefill_next(turn, &mut prefill, draft);
                }
                (_, Some((_, id))) => self.admit_next(id, draft),
                (Some(_), None) => unreachable!("the second arm took it"),
            }
        }
    }

    /// Running sequences that lack more than decode gave them, by turn, each tenant's by seniority.
    fn prefill_turns(&self, draft: &Draft) -> BTreeMap<Turn, VecDeque<SequenceSlot>> {
        let mut turns = BTreeMap::<Turn, VecDeque<SequenceSlot>>::new();
        for &slot in &self.running {
            let sequence = self.at(slot);
            if sequence.last_step != draft.plan.step && sequence.gap() > 0 {
                let turn = self.queue.tenants.turn(sequence.account);
                turns.entry(turn).or_default().push_back(slot);
            }
        }
        turns
    }

    /// Schedules the next prompt of the tenant whose turn it is.
    fn prefill_next(
        &mut self,
        turn: Turn,
        prefill: &mut BTreeMap<Turn, VecDeque<SequenceSlot>>,
        draft: &mut Draft,
    ) {
        let mut slots = prefill.remove(&turn).expect("the caller found it there");
        // Served since, by computing what another tenant's sequence shares.
        let now = self.queue.tenants.turn(turn.3);
        if now != turn {
            prefill.entry(now).or_default().append(&mut slots);
            return;
        }
        let slot = slots.pop_front();
        // It may have been preempted, or computed for another sequence's sake.
        let sequence = slot.and_then(|slot| self.slots[slot.index()].as_ref());
        if let (Some(slot), Some(sequence)) = (slot, sequence)
            && sequence.stage == Stage::Running
            && sequence.last_step != draft.plan.step
        {
            self.schedule_tokens(slot, sequence.gap().min(draft.budget), draft);
        }
        if !slots.is_empty() {
            let turn = self.queue.tenants.turn(turn.3);
            prefill.insert(turn, slots);
        }
    }

    /// Schedules up to `num_tokens` tokens of a running sequence, as many as find a place.
    pub(crate) fn schedule_tokens(
        &mut self,
        slot: SequenceSlot,
        num_tokens: usize,
        draft: &mut Draft,
    ) {
        let num_tokens = self.make_room(slot, num_tokens, draft);
        if num_tokens == 0 {
            return;
        }
        let promised_before = draft.promised.map(|_| self.lacking_blocks(slot));
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
        let account = sequence.account;
        draft.rows.push(InFlightRow { slot, num_computed, scored, sample });
        draft.plan.scheduled.push(ScheduledSequence {
            slot,
            num_tokens: num_tokens as u32,
            appended_blocks,
            sample,
        });
        self.queue.tenants.charge(account, num_tokens);
        if let (Some(promised), Some(before)) = (&mut draft.promised, promised_before) {
            *promised = *promised + self.lacking_blocks(slot) - before;
        }
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
                self.preempt(youngest, draft);
            }
            granted = self.free_blocks(use_reserve).min(missing);
        }
        if granted < missing {
            draft.starved = Some(draft.starved.map_or(order, |starved| starved.min(order)));
            draft.closed = true;
        }
        let sequence = self.at(slot);
        let places = (sequence.blocks.len() + granted) * self.config.block_size as usize;
        num_tokens.min(places - sequence.num_computed)
    }

    fn preempt(&mut self, slot: SequenceSlot, draft: &mut Draft) {
        self.counters.num_preemptions += 1;
        (draft.closed, draft.promised) = (true, None);
        self.leave(slot, Stage::Preempting);
        self.empty_left_slots();
    }

    fn missing_blocks(&self, slot: SequenceSlot, num_tokens: usize) -> usize {
        let sequence = self.at(slot);
        let needed = self.config.blocks_for(sequence.num_computed + num_tokens);
        needed.saturating_sub(sequence.blocks.len())
    }

    /// Blocks that a sequence may take now: the unused reserve is for its owner alone.
    pub(crate) fn free_blocks(&self, use_reserve: bool) -> usize {
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
}
