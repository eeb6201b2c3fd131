//! The scheduler's state and surface. `schedule.rs` makes plans, `apply.rs` takes their results.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use tessera_types::{
    BlockKey, Epoch, FinishReason, SequenceId, SequenceSlot, StepId, TokenId, TokenLogprobs,
};

use crate::block_pool::BlockPool;
use crate::config::SchedulerConfig;
use crate::error::{AddError, ConfigError};
use crate::media::MediaAsks;
use crate::queue::WaitingQueue;
use crate::sequence::{Sequence, SequenceRequest, Stage};
use crate::table::SequenceTable;

/// What happened to a sequence. Collected by [`Scheduler::take_events`] in order.
#[derive(Debug, Clone, PartialEq)]
pub enum SequenceEvent {
    /// Embeddings of these items are wanted: not covered by the prefix cache, or no longer.
    MediaNeeded { sequence: SequenceId, items: Vec<u32> },
    /// The sequence took a slot for the first time.
    Admitted { sequence: SequenceId, num_cached_tokens: usize },
    /// Log probabilities of prompt tokens from `first_token` on. Those of one sequence follow each other,
    /// each token comes once, and all of them come before the first output token.
    PromptLogprobs { sequence: SequenceId, first_token: u32, tokens: Vec<TokenLogprobs> },
    /// A new output token; indices of one sequence follow each other.
    Token {
        sequence: SequenceId,
        output_index: u32,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    },
    /// Nothing follows for this sequence.
    Finished {
        sequence: SequenceId,
        reason: FinishReason,
        /// Output in all, forced output included.
        num_output_tokens: u32,
        /// Prompt tokens found in the prefix cache.
        num_cached_tokens: u32,
    },
}

/// How full the scheduler is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequences with a slot, the reserve's not counted.
    pub running: u32,
    pub waiting: u32,
    pub num_blocks: u32,
    pub num_free_blocks: u32,
    /// Since construction.
    pub num_preemptions: u64,
}

/// What happened since construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Sequences that took a slot; one that comes back after preemption counts once.
    pub num_admitted: u64,
    pub num_preemptions: u64,
    /// Prompt tokens of admitted sequences that may use the prefix cache, and those of them that were
    /// found there or shared with a running sequence: the hit rate is their ratio.
    pub num_queried_tokens: u64,
    pub num_hit_tokens: u64,
    /// Cached blocks that were given to other contents.
    pub num_evicted_blocks: u64,
}

/// Where a sequence is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Waiting,
    Slot(SequenceSlot),
}

/// A scheduled step whose output has not come yet.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub step: StepId,
    pub rows: Vec<InFlightRow>,
}

#[derive(Debug)]
pub(crate) struct InFlightRow {
    pub slot: SequenceSlot,
    /// Tokens computed after the step.
    pub num_computed: usize,
    /// Prompt tokens whose log probabilities the step yields.
    pub scored: Range<usize>,
    pub sample: bool,
}

/// Sequences, blocks and steps of one decoder group, over its epochs.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) pool: BlockPool,
    pub(crate) table: SequenceTable,
    /// `None` between epochs.
    pub(crate) epoch: Option<Epoch>,
    /// Step of the last plan made and of the last output applied.
    pub(crate) scheduled_step: StepId,
    pub(crate) applied_step: StepId,
    pub(crate) in_flight: VecDeque<InFlight>,
    /// Sequences by slot; the last slot is the reserve's.
    pub(crate) slots: Vec<Option<Sequence>>,
    pub(crate) free_slots: Vec<SequenceSlot>,
    /// Slots in stage `Running`, in order of admission.
    pub(crate) running: Vec<SequenceSlot>,
    /// Slots that end or are preempted, waiting for steps in flight.
    pub(crate) leaving: Vec<SequenceSlot>,
    /// Slots emptied since the last plan.
    pub(crate) released: Vec<SequenceSlot>,
    pub(crate) queue: WaitingQueue,
    pub(crate) places: HashMap<SequenceId, Place>,
    /// Running sequences by the key of their first block outside the prefix cache.
    pub(crate) frontiers: HashMap<BlockKey, SequenceSlot>,
    pub(crate) asks: MediaAsks,
    pub(crate) events: Vec<SequenceEvent>,
    /// Those of the pool are of earlier epochs.
    pub(crate) counters: Counters,
    /// Tokens that a step may hold now.
    pub(crate) token_budget: u32,
}

impl Scheduler {
    /// A scheduler without an epoch: it refuses sequences until [`Scheduler::begin_epoch`].
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let num_slots = config.num_slots() as usize;
        Ok(Self {
            pool: BlockPool::new(0),
            table: SequenceTable::new(config.table_limits(0), Epoch(0)),
            epoch: None,
            scheduled_step: StepId(0),
            applied_step: StepId(0),
            in_flight: VecDeque::new(),
            slots: (0..num_slots).map(|_| None).collect(),
            free_slots: Vec::new(),
            running: Vec::new(),
            leaving: Vec::new(),
            released: Vec::new(),
            queue: WaitingQueue::default(),
            places: HashMap::new(),
            frontiers: HashMap::new(),
            asks: MediaAsks::new(),
            events: Vec::new(),
            counters: Counters::default(),
            token_budget: config.max_tokens_per_step,
            config,
        })
    }

    /// The limits given at construction.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Sets how many tokens a step may hold from the next plan on, fitted by the caller to a time target.
    /// Kept between one token for each slot, so that every sequence in decode advances, and
    /// `max_tokens_per_step`. Returns the budget in force.
    pub fn set_token_budget(&mut self, num_tokens: u32) -> u32 {
        let (least, most) = (self.config.num_slots(), self.config.max_tokens_per_step);
        self.token_budget = num_tokens.clamp(least, most);
        self.token_budget
    }

    /// Tokens that a step may hold now.
    pub fn token_budget(&self) -> u32 {
        self.token_budget
    }

    /// Begins an epoch with empty blocks, prefix cache and table. Panics if one is running: the caller
    /// must have taken the sequences of the last one from [`Scheduler::end_epoch`].
    pub fn begin_epoch(&mut self, epoch: Epoch, num_blocks: u32) {
        assert!(self.epoch.is_none(), "epoch {epoch} begins before the last one ended");
        self.counters.num_evicted_blocks += self.pool.num_evicted();
        self.pool = BlockPool::new(num_blocks);
        self.table = SequenceTable::new(self.config.table_limits(num_blocks), epoch);
        self.scheduled_step = StepId(0);
        self.applied_step = StepId(0);
        // Popped from the end: low slots first.
        self.free_slots = (0..self.config.max_running).rev().map(SequenceSlot).collect();
        self.epoch = Some(epoch);
    }

    /// Ends the epoch: drops every sequence and every step in flight. Returns the dropped sequences.
    pub fn end_epoch(&mut self) -> Vec<SequenceId> {
        self.epoch = None;
        self.in_flight.clear();
        self.slots.iter_mut().for_each(|slot| *slot = None);
        self.running.clear();
        self.leaving.clear();
        self.released.clear();
        self.queue.clear();
        self.frontiers.clear();
        self.asks.clear();
        self.events.clear();
        let mut dropped: Vec<_> = self.places.drain().map(|(sequence, _)| sequence).collect();
        dropped.sort();
        dropped
    }

    /// Queues a sequence. Output that already ends it finishes it at once, without a step.
    pub fn add(&mut self, request: SequenceRequest) -> Result<(), AddError> {
        if self.epoch.is_none() {
            return Err(AddError::NoEpoch);
        }
        self.check_queue(&request)?;
        let id = request.sequence;
        if self.places.contains_key(&id) {
            return Err(AddError::Duplicate { sequence: id });
        }
        let ordinary_blocks =
            self.pool.num_blocks().saturating_sub(self.config.reserved_blocks as usize);
        let mut sequence = Sequence::new(request, &self.config, ordinary_blocks)?;
        if let Some(reason) = sequence.forced_stop_reason() {
            self.events.push(finished(&sequence, reason));
            return Ok(());
        }
        let num_covered = self.num_covered(&self.prefix_hit(&sequence));
        sequence.account =
            self.queue.tenants.open(sequence.request.priority, sequence.request.tenant);
        sequence.parked = true;
        self.places.insert(id, Place::Waiting);
        self.queue.push(sequence);
        self.ask_for_media(id, num_covered);
        self.queue.update(id, |sequence| sequence.parked = sequence.gap_from(num_covered) == 0);
        Ok(())
    }

    /// Room in the queue, as a whole and for the tenant.
    fn check_queue(&self, request: &SequenceRequest) -> Result<(), AddError> {
        let max_waiting = self.config.max_waiting;
        let num_reserve = self.queue.num_reserve();
        let num_waiting = match request.use_reserve {
            true => num_reserve,
            false => self.queue.len() - num_reserve,
        };
        if num_waiting >= max_waiting as usize {
            return Err(AddError::QueueFull { max_waiting });
        }
        let tenant = request.tenant;
        let max_waiting_per_tenant = self.config.max_waiting_of_tenant();
        if !request.use_reserve && self.queue.num_of(tenant) >= max_waiting_per_tenant {
            return Err(AddError::TenantQueueFull { tenant, max_waiting_per_tenant });
        }
        Ok(())
    }

    /// Keeps a waiting sequence from being admitted (its embeddings have no room yet), or lets it go.
    pub fn set_held(&mut self, sequence: SequenceId, held: bool) {
        if let Some(known) = self.sequence_mut(sequence) {
            known.held = held;
            self.queue.update(sequence, |waiting| waiting.held = held);
        }
    }

    /// Ends a sequence with `reason` (the client left, the deadline passed). Its blocks are free once no
    /// step in flight names them. `false`: it is not known, or ended already.
    pub fn abort(&mut self, sequence: SequenceId, reason: FinishReason) -> bool {
        let Some(known) = self.sequence_mut(sequence) else { return false };
        let event = finished(known, reason);
        self.events.push(event);
        self.remove(sequence)
    }

    /// [`Scheduler::abort`] without an event.
    pub fn remove(&mut self, sequence: SequenceId) -> bool {
        match self.places.remove(&sequence) {
            None => false,
            Some(Place::Waiting) => {
                let gone = self.queue.remove(sequence).expect("places says that it waits");
                self.queue.tenants.close(gone.account);
                self.end_asks(&gone);
                true
            }
            Some(Place::Slot(slot)) => {
                self.leave(slot, Stage::Ending);
                self.empty_left_slots();
                true
            }
        }
    }

    /// Events since the last call.
    pub fn take_events(&mut self) -> Vec<SequenceEvent> {
        std::mem::take(&mut self.events)
    }

    /// The epoch whose plans are made, if any.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Step of the last plan made.
    pub fn scheduled_step(&self) -> StepId {
        self.scheduled_step
    }

    /// How full the scheduler is.
    pub fn load(&self) -> Load {
        // The reserve's sequence (the canary) is nobody's request.
        let slots = self.running.iter().chain(&self.leaving);
        let requested = slots.filter(|slot| !self.at(**slot).request.use_reserve);
        Load {
            running: requested.count() as u32,
            waiting: self.queue.len() as u32,
            num_blocks: self.pool.num_blocks() as u32,
            num_free_blocks: self.pool.num_free() as u32,
            num_preemptions: self.counters.num_preemptions,
        }
    }

    /// What happened since construction.
    pub fn counters(&self) -> Counters {
        let num_evicted_blocks = self.counters.num_evicted_blocks + self.pool.num_evicted();
        Counters { num_evicted_blocks, ..self.counters }
    }

    /// Whether a sequence waits or runs; one that ended does neither.
    pub fn contains(&self, sequence: SequenceId) -> bool {
        self.places.contains_key(&sequence)
    }

    /// Whether no sequence is known and no step in flight.
    pub fn is_idle(&self) -> bool {
        self.places.is_empty() && self.in_flight.is_empty() && self.leaving.is_empty()
    }

    pub(crate) fn sequence_mut(&mut self, sequence: SequenceId) -> Option<&mut Sequence> {
        match *self.places.get(&sequence)? {
            Place::Waiting => self.queue.get_mut(sequence),
            Place::Slot(slot) => self.slots[slot.index()].as_mut(),
        }
    }

    /// The sequence in a slot known to be taken.
    pub(crate) fn at(&self, slot: SequenceSlot) -> &Sequence {
        self.slots[slot.index()].as_ref().expect("running and leaving slots hold a sequence")
    }

    pub(crate) fn at_mut(&mut self, slot: SequenceSlot) -> &mut Sequence {
        self.slots[slot.index()].as_mut().expect("running and leaving slots hold a sequence")
    }

    /// Moves a slot from `running` to `leaving`. What it holds stays until
    /// [`Scheduler::empty_left_slots`] finds that no step in flight names it.
    pub(crate) fn leave(&mut self, slot: SequenceSlot, stage: Stage) {
        self.leave_frontier(slot);
        if std::mem::replace(&mut self.at_mut(slot).stage, stage) == Stage::Running {
            self.running.retain(|&running| running != slot);
            self.leaving.push(slot);
        }
    }

    /// Frees blocks and slots of leaving sequences that no step in flight names.
    pub(crate) fn empty_left_slots(&mut self) {
        let mut index = 0;
        while index < self.leaving.len() {
            let slot = self.leaving[index];
            if self.at(slot).last_step > self.applied_step {
                index += 1;
                continue;
            }
            self.leaving.swap_remove(index);
            let mut sequence =
                self.slots[slot.index()].take().expect("a leaving slot holds a sequence");
            // Tails first: of a cached prefix the head is the most useful and goes last.
            sequence.blocks.iter().rev().for_each(|&block| self.pool.release(block));
            self.released.push(slot);
            if slot.0 < self.config.max_running {
                self.free_slots.push(slot);
            }
            if sequence.stage == Stage::Preempting {
                sequence.forget_computed();
                self.places.insert(sequence.id(), Place::Waiting);
                self.queue.push(sequence);
            } else {
                self.queue.tenants.close(sequence.account);
                self.end_asks(&sequence);
            }
        }
    }
}

pub(crate) fn finished(sequence: &Sequence, reason: FinishReason) -> SequenceEvent {
    SequenceEvent::Finished {
        sequence: sequence.id(),
        reason,
        num_output_tokens: sequence.output.len() as u32,
        num_cached_tokens: sequence.num_cached_tokens.unwrap_or(0) as u32,
    }
}
