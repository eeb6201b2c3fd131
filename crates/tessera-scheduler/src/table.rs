//! The sequence table that every rank keeps, fed by plans alone. It knows everything about a running
//! sequence except the tokens drawn since its admission: those stay on the device.
//!
//! Each plan carries the digest of the table after it. The digest is a sum over entries, so that keeping
//! it costs as much as the plan changes, not as much as the table holds.

use std::ops::Range;
use std::sync::Arc;

use tessera_types::{
    AdmittedSequence, BlockId, Epoch, PositionSpan, Prompt, SamplingParams, ScheduledSequence,
    SequenceId, SequenceSlot, StepId, StepPlan, TokenId,
};

use crate::error::TableError;

/// Bounds of a table; slots and blocks beyond them are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableLimits {
    pub num_slots: u32,
    pub num_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
}

/// A running sequence as a rank knows it.
#[derive(Debug, Clone)]
pub struct TableEntry {
    pub sequence: SequenceId,
    pub prompt: Arc<Prompt>,
    /// Output that existed at admission.
    pub forced_output: Vec<TokenId>,
    pub sampling: Arc<SamplingParams>,
    pub eos_token_ids: Arc<[TokenId]>,
    pub seed: u64,
    /// Tokens in the KV cache once all applied plans have run.
    pub num_computed_tokens: usize,
    /// Tokens drawn since admission, those still in flight included.
    pub num_sampled_tokens: usize,
    pub block_table: Vec<BlockId>,
    /// Hash of what never changes after admission.
    identity: u64,
    /// Hash of the block table, extended as it grows.
    blocks_digest: u64,
}

impl TableEntry {
    /// Prompt, forced output and drawn tokens.
    pub fn num_known_tokens(&self) -> usize {
        self.num_admitted_tokens() + self.num_sampled_tokens
    }

    /// Output tokens so far, the index of the next one.
    pub fn num_output_tokens(&self) -> usize {
        self.forced_output.len() + self.num_sampled_tokens
    }

    /// The token at `index`; `None`: it was drawn after admission, so only the device knows it.
    pub fn token(&self, index: usize) -> Option<TokenId> {
        let prompt = &self.prompt.tokens;
        match index.checked_sub(prompt.len()) {
            None => Some(prompt[index]),
            Some(output) => self.forced_output.get(output).copied(),
        }
    }

    /// Prompt tokens whose log probabilities the last `num_tokens` computed rows yield: the row of a token
    /// gives the distribution of the one after it. Empty unless `prompt_logprobs` was asked for.
    pub fn scored_tokens(&self, num_tokens: usize) -> Range<usize> {
        let end = self.num_computed_tokens;
        scored_tokens(&self.sampling, &self.prompt, end.saturating_sub(num_tokens)..end)
    }

    fn num_admitted_tokens(&self) -> usize {
        self.prompt.tokens.len() + self.forced_output.len()
    }

    fn digest(&self, slot: SequenceSlot) -> u64 {
        let mut hash = mix(self.identity, u64::from(slot.0));
        hash = mix(hash, self.num_computed_tokens as u64);
        hash = mix(hash, self.num_sampled_tokens as u64);
        mix(hash, self.blocks_digest)
    }
}

/// All slots of one epoch.
#[derive(Debug, Clone)]
pub struct SequenceTable {
    limits: TableLimits,
    epoch: Epoch,
    /// Step of the last plan applied.
    step: StepId,
    entries: Vec<Option<TableEntry>>,
    /// Step in which each slot was last scheduled, against scheduling it twice.
    scheduled_in: Vec<StepId>,
    /// Wrapping sum of the entries' digests.
    entries_digest: u64,
}

impl SequenceTable {
    /// The empty table with which an epoch begins.
    pub fn new(limits: TableLimits, epoch: Epoch) -> Self {
        let num_slots = limits.num_slots as usize;
        Self {
            limits,
            epoch,
            step: StepId(0),
            entries: (0..num_slots).map(|_| None).collect(),
            scheduled_in: vec![StepId(0); num_slots],
            entries_digest: 0,
        }
    }

    /// Epoch whose plans are accepted.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Step of the last plan applied; 0 before the first.
    pub fn step(&self) -> StepId {
        self.step
    }

    /// The sequence in `slot`.
    pub fn entry(&self, slot: SequenceSlot) -> Option<&TableEntry> {
        self.entries.get(slot.index())?.as_ref()
    }

    /// Sequences in the table with their slots, ascending.
    pub fn entries(&self) -> impl Iterator<Item = (SequenceSlot, &TableEntry)> {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(slot, entry)| Some((SequenceSlot(slot as u32), entry.as_ref()?)))
    }

    /// Applies a plan and compares digests. After an error the table is unusable: the epoch is over.
    pub fn apply(&mut self, plan: &StepPlan) -> Result<u64, TableError> {
        let got = self.advance(plan)?;
        match got == plan.table_digest {
            true => Ok(got),
            false => Err(TableError::DigestMismatch {
                step: plan.step,
                expected: plan.table_digest,
                got,
            }),
        }
    }

    /// Applies a plan that has no digest yet and returns it, for the leader to stamp.
    pub fn advance(&mut self, plan: &StepPlan) -> Result<u64, TableError> {
        if plan.epoch != self.epoch {
            return Err(TableError::WrongEpoch { expected: self.epoch, got: plan.epoch });
        }
        let expected = self.step.next();
        if plan.step != expected {
            return Err(TableError::StepGap { expected, got: plan.step });
        }
        self.step = expected;
        plan.released.iter().try_for_each(|&slot| self.release(slot))?;
        plan.admitted.iter().try_for_each(|admitted| self.admit(admitted))?;
        self.check_blocks(&plan.zero_blocks)?;
        for copy in &plan.copy_blocks {
            self.check_blocks(&[copy.from, copy.to])?;
        }
        plan.scheduled.iter().try_for_each(|scheduled| self.schedule(scheduled))?;
        Ok(mix(mix(self.entries_digest, self.epoch.0), self.step.0))
    }

    fn release(&mut self, slot: SequenceSlot) -> Result<(), TableError> {
        self.check_slot(slot)?;
        let entry = self.entries[slot.index()].take().ok_or(TableError::EmptySlot { slot })?;
        self.entries_digest = self.entries_digest.wrapping_sub(entry.digest(slot));
        Ok(())
    }

    fn admit(&mut self, admitted: &AdmittedSequence) -> Result<(), TableError> {
        let slot = admitted.slot;
        self.check_slot(slot)?;
        if self.entries[slot.index()].is_some() {
            return Err(TableError::SlotTaken { slot });
        }
        self.check_blocks(&admitted.block_table)?;
        let entry = TableEntry {
            sequence: admitted.sequence,
            prompt: Arc::clone(&admitted.prompt),
            forced_output: admitted.output.clone(),
            sampling: Arc::clone(&admitted.sampling),
            eos_token_ids: Arc::clone(&admitted.eos_token_ids),
            seed: admitted.seed,
            num_computed_tokens: admitted.num_computed_tokens as usize,
            num_sampled_tokens: 0,
            block_table: admitted.block_table.clone(),
            identity: identity(admitted),
            blocks_digest: mix_blocks(0, &admitted.block_table),
        };
        self.check_computed(slot, &entry)?;
        self.entries_digest = self.entries_digest.wrapping_add(entry.digest(slot));
        self.entries[slot.index()] = Some(entry);
        Ok(())
    }

    fn schedule(&mut self, scheduled: &ScheduledSequence) -> Result<(), TableError> {
        let slot = scheduled.slot;
        self.check_slot(slot)?;
        self.check_blocks(&scheduled.appended_blocks)?;
        if std::mem::replace(&mut self.scheduled_in[slot.index()], self.step) == self.step {
            return Err(TableError::ScheduledTwice { slot });
        }
        if scheduled.num_tokens == 0 {
            return Err(TableError::NoTokens { slot });
        }
        let mut entry = self.entries[slot.index()].take().ok_or(TableError::EmptySlot { slot })?;
        let before = entry.digest(slot);
        entry.num_computed_tokens += scheduled.num_tokens as usize;
        entry.blocks_digest = mix_blocks(entry.blocks_digest, &scheduled.appended_blocks);
        entry.block_table.extend_from_slice(&scheduled.appended_blocks);
        self.check_computed(slot, &entry)?;
        if scheduled.sample {
            let (computed, known) = (entry.num_computed_tokens, entry.num_known_tokens());
            if computed != known {
                return Err(TableError::SampleBeforeEnd { slot, computed, known });
            }
            entry.num_sampled_tokens += 1;
        }
        let change = entry.digest(slot).wrapping_sub(before);
        self.entries_digest = self.entries_digest.wrapping_add(change);
        self.entries[slot.index()] = Some(entry);
        Ok(())
    }

    fn check_slot(&self, slot: SequenceSlot) -> Result<(), TableError> {
        let num_slots = self.limits.num_slots;
        match slot.0 < num_slots {
            true => Ok(()),
            false => Err(TableError::SlotOutOfRange { slot, num_slots }),
        }
    }

    fn check_blocks(&self, blocks: &[BlockId]) -> Result<(), TableError> {
        let num_blocks = self.limits.num_blocks;
        match blocks.iter().find(|block| block.0 >= num_blocks) {
            None => Ok(()),
            Some(&block) => Err(TableError::BlockOutOfRange { block, num_blocks }),
        }
    }

    fn check_computed(&self, slot: SequenceSlot, entry: &TableEntry) -> Result<(), TableError> {
        let (computed, known) = (entry.num_computed_tokens, entry.num_known_tokens());
        let capacity = entry.block_table.len() * self.limits.block_size as usize;
        if computed > known {
            return Err(TableError::BeyondKnown { slot, computed, known });
        }
        if computed > capacity {
            return Err(TableError::BlocksTooFew { slot, computed, capacity });
        }
        Ok(())
    }
}

/// Prompt tokens whose log probabilities the rows of the tokens `computed` yield.
pub(crate) fn scored_tokens(
    sampling: &SamplingParams,
    prompt: &Prompt,
    computed: Range<usize>,
) -> Range<usize> {
    let first = computed.start + 1;
    match sampling.prompt_logprobs {
        None => first..first,
        Some(_) => first..(computed.end + 1).min(prompt.tokens.len()).max(first),
    }
}

/// One step of a 64-bit hash: SplitMix64's finaliser over the running state (Steele et al. 2014). It
/// guards against mistakes, not against an adversary; the plan stream is inside the cluster.
pub(crate) fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).rotate_left(17).wrapping_add(state.rotate_left(32))
}

fn mix_blocks(state: u64, blocks: &[BlockId]) -> u64 {
    blocks.iter().fold(state, |state, block| mix(state, u64::from(block.0) + 1))
}

fn mix_all(state: u64, values: impl ExactSizeIterator<Item = u64>) -> u64 {
    let state = mix(state, values.len() as u64);
    values.fold(state, mix)
}

/// Hash of everything a rank was told about a sequence at its admission.
fn identity(admitted: &AdmittedSequence) -> u64 {
    let prompt = &admitted.prompt;
    let mut hash = mix(admitted.sequence.0, admitted.seed);
    hash = mix_all(hash, prompt.tokens.iter().map(|&token| u64::from(token)));
    hash = mix_all(hash, admitted.output.iter().map(|&token| u64::from(token)));
    hash = mix_all(hash, admitted.eos_token_ids.iter().map(|&token| u64::from(token)));
    for span in &prompt.positions {
        hash = match *span {
            PositionSpan::Text { len } => mix(hash, u64::from(len)),
            PositionSpan::Grid { t, h, w, step } => {
                let values =
                    [1 << 32 | u64::from(t), u64::from(h), u64::from(w), step.to_bits().into()];
                mix_all(hash, values.into_iter())
            }
        };
    }
    for span in &prompt.media {
        hash = mix(hash, u64::from(span.offset) << 32 | u64::from(span.num_tokens));
        let key = span.embedding_key.0;
        hash = mix_all(hash, key.as_bytes().iter().map(|&byte| u64::from(byte)));
    }
    mix(hash, sampling_identity(&admitted.sampling))
}

fn sampling_identity(sampling: &SamplingParams) -> u64 {
    let floats = [
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    ];
    let mut hash = mix_all(0, floats.iter().map(|value| u64::from(value.to_bits())));
    let bias = sampling.logit_bias.iter();
    hash = mix_all(
        hash,
        bias.map(|&(token, bias)| u64::from(token) << 32 | u64::from(bias.to_bits())),
    );
    hash = mix_all(hash, sampling.stop_token_ids.iter().map(|&token| u64::from(token)));
    let counts = [sampling.top_k, sampling.max_tokens, sampling.min_tokens];
    hash = mix_all(hash, counts.iter().map(|&value| u64::from(value)));
    // Which rows are scored, and into how many tokens, decides what ranks exchange.
    let logprobs = [sampling.logprobs, sampling.prompt_logprobs];
    hash = mix_all(hash, logprobs.iter().map(|top| top.map_or(0, |top| u64::from(top) + 1)));
    mix(hash, u64::from(sampling.ignore_eos))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: TableLimits = TableLimits { num_slots: 2, num_blocks: 4, block_size: 2 };

    fn admitted(slot: u32, tokens: usize) -> AdmittedSequence {
        let len = tokens as u32;
        AdmittedSequence {
            slot: SequenceSlot(slot),
            sequence: SequenceId(u64::from(slot) + 10),
            prompt: Arc::new(Prompt {
                tokens: vec![5; tokens],
                media: Vec::new(),
                positions: vec![PositionSpan::Text { len }],
            }),
            output: Vec::new(),
            sampling: Arc::new(SamplingParams::default()),
            eos_token_ids: Arc::from([1]),
            seed: 3,
            num_computed_tokens: 0,
            block_table: Vec::new(),
        }
    }

    fn scheduled(slot: u32, num_tokens: u32, blocks: &[u32], sample: bool) -> ScheduledSequence {
        let appended_blocks = blocks.iter().map(|&block| BlockId(block)).collect();
        ScheduledSequence { slot: SequenceSlot(slot), num_tokens, appended_blocks, sample }
    }

    fn plan(
        step: u64,
        admitted: Vec<AdmittedSequence>,
        scheduled: Vec<ScheduledSequence>,
    ) -> StepPlan {
        StepPlan { epoch: Epoch(1), step: StepId(step), admitted, scheduled, ..StepPlan::default() }
    }

    /// A table after step 1, in which slot 0 computed its 3 prompt tokens and drew one.
    fn started() -> SequenceTable {
        let mut table = SequenceTable::new(LIMITS, Epoch(1));
        let first = plan(1, vec![admitted(0, 3)], vec![scheduled(0, 3, &[0, 1], true)]);
        table.advance(&first).expect("a valid plan");
        table
    }

    #[test]
    fn each_inconsistency_is_named() {
        let slot = SequenceSlot(0);
        let other = SequenceSlot(1);
        type Case = (StepPlan, TableError);
        let cases: [Case; 12] = [
            (
                StepPlan { epoch: Epoch(2), ..plan(2, vec![], vec![]) },
                TableError::WrongEpoch { expected: Epoch(1), got: Epoch(2) },
            ),
            (plan(3, vec![], vec![]), TableError::StepGap { expected: StepId(2), got: StepId(3) }),
            (plan(1, vec![], vec![]), TableError::StepGap { expected: StepId(2), got: StepId(1) }),
            (
                plan(2, vec![], vec![scheduled(2, 1, &[], true)]),
                TableError::SlotOutOfRange { slot: SequenceSlot(2), num_slots: 2 },
            ),
            (
                plan(2, vec![], vec![scheduled(1, 1, &[], true)]),
                TableError::EmptySlot { slot: other },
            ),
            (
                StepPlan { released: vec![other], ..plan(2, vec![], vec![]) },
                TableError::EmptySlot { slot: other },
            ),
            (plan(2, vec![admitted(0, 1)], vec![]), TableError::SlotTaken { slot }),
            (
                plan(2, vec![], vec![scheduled(0, 1, &[], true), scheduled(0, 1, &[2], true)]),
                TableError::ScheduledTwice { slot },
            ),
            (
                plan(2, vec![], vec![scheduled(0, 1, &[4], true)]),
                TableError::BlockOutOfRange { block: BlockId(4), num_blocks: 4 },
            ),
            (plan(2, vec![], vec![scheduled(0, 0, &[], false)]), TableError::NoTokens { slot }),
            (
                plan(2, vec![], vec![scheduled(0, 2, &[2], true)]),
                TableError::BeyondKnown { slot, computed: 5, known: 4 },
            ),
            (
                plan(2, vec![admitted(1, 3)], vec![scheduled(1, 2, &[2], true)]),
                TableError::SampleBeforeEnd { slot: other, computed: 2, known: 3 },
            ),
        ];
        for (plan, expected) in cases {
            assert_eq!(started().advance(&plan), Err(expected));
        }
    }

    #[test]
    fn tokens_need_blocks() {
        let mut table = started();
        table.advance(&plan(2, vec![], vec![scheduled(0, 1, &[], true)])).expect("the fourth fits");
        let error = table.advance(&plan(3, vec![], vec![scheduled(0, 1, &[], true)]));
        let slot = SequenceSlot(0);
        assert_eq!(error, Err(TableError::BlocksTooFew { slot, computed: 5, capacity: 4 }));
    }

    #[test]
    fn any_difference_changes_the_digest() {
        type Edit = fn(&mut StepPlan);
        let base = plan(1, vec![admitted(0, 3)], vec![scheduled(0, 3, &[0, 1], false)]);
        let digest =
            |plan: &StepPlan| SequenceTable::new(LIMITS, Epoch(1)).advance(plan).expect("valid");
        let edits: [Edit; 10] = [
            |p| p.admitted[0].seed += 1,
            |p| p.admitted[0].sequence.0 += 1,
            |p| Arc::make_mut(&mut p.admitted[0].prompt).tokens[1] += 1,
            |p| p.admitted[0].output.push(7),
            |p| Arc::make_mut(&mut p.admitted[0].sampling).temperature = 0.5,
            |p| Arc::make_mut(&mut p.admitted[0].sampling).prompt_logprobs = Some(0),
            |p| p.scheduled[0].appended_blocks.swap(0, 1),
            |p| p.scheduled[0].num_tokens -= 1,
            |p| p.scheduled[0].sample = true,
            |p| {
                p.admitted[0].slot.0 = 1;
                p.scheduled[0].slot.0 = 1;
            },
        ];
        for (i, edit) in edits.iter().enumerate() {
            let mut edited = base.clone();
            edit(&mut edited);
            assert_ne!(digest(&edited), digest(&base), "edit {i}");
        }
        let mut stamped = base.clone();
        stamped.table_digest = digest(&base);
        let mut table = SequenceTable::new(LIMITS, Epoch(1));
        assert_eq!(table.apply(&stamped), Ok(stamped.table_digest));
        stamped.table_digest ^= 1;
        let mut table = SequenceTable::new(LIMITS, Epoch(1));
        assert!(matches!(table.apply(&stamped), Err(TableError::DigestMismatch { .. })));
    }

    #[test]
    fn only_the_device_knows_drawn_tokens() {
        let mut table = SequenceTable::new(LIMITS, Epoch(1));
        let forced = AdmittedSequence { output: vec![8, 9], ..admitted(0, 2) };
        let first = plan(1, vec![forced], vec![scheduled(0, 4, &[0, 1], true)]);
        table.advance(&first).expect("valid");
        let entry = table.entry(SequenceSlot(0)).expect("admitted");
        let tokens: Vec<_> = (0..5).map(|index| entry.token(index)).collect();
        assert_eq!(tokens, [Some(5), Some(5), Some(8), Some(9), None]);
        assert_eq!((entry.num_known_tokens(), entry.num_output_tokens()), (5, 3));
    }

    #[test]
    fn a_row_scores_the_next_prompt_token() {
        let mut first = admitted(0, 4);
        Arc::make_mut(&mut first.sampling).prompt_logprobs = Some(2);
        first.num_computed_tokens = 1;
        first.block_table = vec![BlockId(0), BlockId(1)];
        let mut table = SequenceTable::new(LIMITS, Epoch(1));
        let mut step = |admitted, num_tokens, blocks: &[u32], sample| {
            let step = table.step().next().0;
            let plan = plan(step, admitted, vec![scheduled(0, num_tokens, blocks, sample)]);
            table.advance(&plan).expect("valid");
            table.entry(SequenceSlot(0)).expect("admitted").scored_tokens(num_tokens as usize)
        };
        assert_eq!(step(vec![first], 1, &[], false), 2..3);
        assert_eq!(step(vec![], 2, &[], true), 3..4, "the last row draws");
        assert!(step(vec![], 1, &[2], true).is_empty());
        assert!(started().entry(SequenceSlot(0)).expect("admitted").scored_tokens(3).is_empty());
    }
}
