//! A model made of hashes, for tests and simulation: what a rank group computes, without tensors.
//!
//! Every place of the fake KV cache holds a hash of the token, its position, its embedding row and the
//! rank. A token is a hash over everything read through the block table, folded from every rank's share,
//! the seed and the output index, so stale KV, lost context, a wrong position, a foreign embedding or a
//! block used twice all change it. (A model that is a function of position alone is blind to these.)
//!
//! [`FakeModel::expected_token`] is the same function without cache, batch or plans: what an undisturbed
//! sequence must produce.

use std::collections::{HashMap, HashSet, VecDeque};

use tessera_types::{
    BlockId, EmbeddingKey, Epoch, LateInputs, MediaSpan, Prompt, PromptLogprobs, SampledToken,
    SamplingParams, SequenceSlot, StepId, StepOutput, StepPlan, TokenId, TokenLogprobs,
};

use crate::error::TableError;
use crate::table::{SequenceTable, TableEntry, TableLimits, mix};

/// A plan that a correct scheduler never makes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FakeModelError {
    #[error("rank {rank}: the plan contradicts the table")]
    Table { rank: u32, source: TableError },
    #[error("slot {slot} reads place {index}, which no step of this epoch has written")]
    ReadUnwritten { slot: SequenceSlot, index: usize },
    #[error("slot {slot} writes place {index} a second time")]
    WrittenTwice { slot: SequenceSlot, index: usize },
    #[error("block {block} is zeroed while step {step} in flight names it")]
    BlockInFlight { block: BlockId, step: StepId },
    #[error("slot {slot} needs an embedding that has not arrived")]
    EmbeddingMissing { slot: SequenceSlot },
    #[error("slot {slot} computes a drawn token before it was drawn")]
    TokenUnknown { slot: SequenceSlot },
    #[error("a step is forwarded before step {step} was sampled")]
    NotSampled { step: StepId },
    #[error("step {step} is sampled before it was forwarded")]
    NotForwarded { step: StepId },
}

/// One place of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Epoch of the write; none: zeroed or never written.
    epoch: Option<Epoch>,
    hash: u64,
}

const UNWRITTEN: Place = Place { epoch: None, hash: 0 };

#[derive(Debug)]
struct FakeRank {
    rank: u32,
    table: SequenceTable,
    kv: Vec<Place>,
}

/// A step whose tokens are not drawn yet: slots that draw, and the hash of what they read.
#[derive(Debug)]
struct Forwarded {
    step: StepId,
    rows: Vec<(SequenceSlot, u64)>,
    prompt_logprobs: Vec<PromptLogprobs>,
}

/// What one slot read in one step.
#[derive(Debug)]
struct Computed {
    /// Hash of the whole context, over the ranks.
    context: u64,
    /// First prompt token that the step scores.
    first_scored: usize,
    /// Hash of the context before each scored token.
    scored: Vec<u64>,
}

/// What decides a sequence's tokens beside its prompt and output.
#[derive(Debug, Clone, Copy)]
pub struct DrawRule<'a> {
    pub sampling: &'a SamplingParams,
    pub eos_token_ids: &'a [TokenId],
    pub seed: u64,
}

/// All ranks of one epoch.
#[derive(Debug)]
pub struct FakeModel {
    limits: TableLimits,
    vocab_size: u32,
    ranks: Vec<FakeRank>,
    last_sampled: HashMap<SequenceSlot, TokenId>,
    embeddings: HashSet<EmbeddingKey>,
    forwarded: Option<Forwarded>,
    /// Blocks named by steps that were not collected yet.
    in_flight: VecDeque<(StepId, HashSet<BlockId>)>,
}

impl FakeModel {
    /// `world_size` ranks with fresh KV. Tokens are drawn from `0..vocab_size`.
    pub fn new(limits: TableLimits, epoch: Epoch, world_size: u32, vocab_size: u32) -> Self {
        let places = limits.num_blocks as usize * limits.block_size as usize;
        let rank = |rank| FakeRank {
            rank,
            table: SequenceTable::new(limits, epoch),
            kv: vec![UNWRITTEN; places],
        };
        Self {
            limits,
            vocab_size,
            ranks: (0..world_size).map(rank).collect(),
            last_sampled: HashMap::new(),
            embeddings: HashSet::new(),
            forwarded: None,
            in_flight: VecDeque::new(),
        }
    }

    /// The epoch whose plans it takes.
    pub fn epoch(&self) -> Epoch {
        self.ranks.first().map_or(Epoch(0), |rank| rank.table.epoch())
    }

    /// The embedding of `key` may be read from now on.
    pub fn install_embedding(&mut self, key: EmbeddingKey) {
        self.embeddings.insert(key);
    }

    /// The embedding of `key` is gone.
    pub fn drop_embedding(&mut self, key: EmbeddingKey) {
        self.embeddings.remove(&key);
    }

    /// First half of a step: writes KV and reads it.
    pub fn forward(&mut self, plan: &StepPlan) -> Result<(), FakeModelError> {
        if let Some(forwarded) = &self.forwarded {
            return Err(FakeModelError::NotSampled { step: forwarded.step });
        }
        for rank in &mut self.ranks {
            let applied = rank.table.apply(plan);
            applied.map_err(|source| FakeModelError::Table { rank: rank.rank, source })?;
        }
        self.zero(&plan.zero_blocks)?;
        let (mut rows, mut prompt_logprobs) = (Vec::new(), Vec::new());
        let mut blocks = HashSet::new();
        for scheduled in &plan.scheduled {
            let slot = scheduled.slot;
            let computed = self.compute(slot, scheduled.num_tokens as usize)?;
            if scheduled.sample {
                rows.push((slot, computed.context));
            }
            let entry = entry(&self.ranks[0], slot);
            if !computed.scored.is_empty() {
                prompt_logprobs.push(score(slot, entry, &computed, self.vocab_size));
            }
            blocks.extend(entry.block_table.iter().copied());
        }
        self.forwarded = Some(Forwarded { step: plan.step, rows, prompt_logprobs });
        self.in_flight.push_back((plan.step, blocks));
        Ok(())
    }

    /// Second half of a step: draws its tokens.
    pub fn sample(
        &mut self,
        step: StepId,
        late: &LateInputs,
    ) -> Result<StepOutput, FakeModelError> {
        let Some(forwarded) = self.forwarded.take().filter(|forwarded| forwarded.step == step)
        else {
            return Err(FakeModelError::NotForwarded { step });
        };
        let mut tokens = Vec::with_capacity(forwarded.rows.len());
        for (slot, context) in forwarded.rows {
            let entry = entry(&self.ranks[0], slot);
            let mask = late.masks.iter().find(|(masked, _)| *masked == slot);
            let rule = DrawRule {
                sampling: &entry.sampling,
                eos_token_ids: &entry.eos_token_ids,
                seed: entry.seed,
            };
            let index = entry.num_output_tokens() - 1;
            let token = draw(context, index, self.vocab_size, rule, |token| {
                mask.is_none_or(|(_, mask)| mask.allows(token))
            });
            self.last_sampled.insert(slot, token);
            let logprobs = logprobs(token, rule.sampling);
            tokens.push(SampledToken { slot, sequence: entry.sequence, token, logprobs });
        }
        Ok(StepOutput { step, tokens, prompt_logprobs: forwarded.prompt_logprobs })
    }

    /// The step's output was taken: it is no longer in flight.
    pub fn collected(&mut self, step: StepId) {
        self.in_flight.retain(|&(in_flight, _)| in_flight > step);
    }

    /// The token that follows `output`, computed from the prompt alone: the truth to compare with.
    pub fn expected_token(
        &self,
        prompt: &Prompt,
        output: &[TokenId],
        rule: DrawRule<'_>,
    ) -> TokenId {
        let known = prompt.tokens.len() + output.len();
        let mut positions = Vec::with_capacity(known);
        prompt.extend_positions(0, known, &mut positions);
        let token = |index: usize| match index.checked_sub(prompt.tokens.len()) {
            None => prompt.tokens[index],
            Some(index) => output[index],
        };
        let context = self.ranks.iter().fold(0, |context, rank| {
            let places = (0..known).map(|index| {
                let embedding = embedding_hash(prompt, index).map_or(0, |(_, hash)| hash);
                place_hash(rank.rank, token(index), positions[index], embedding)
            });
            mix(context, places.fold(0, mix))
        });
        draw(context, output.len(), self.vocab_size, rule, |_| true)
    }

    /// Log probabilities of the prompt tokens from the second on, `top` tokens each, computed from the
    /// prompt alone.
    pub fn expected_prompt_logprobs(&self, prompt: &Prompt, top: u32) -> Vec<TokenLogprobs> {
        let known = prompt.tokens.len();
        let mut positions = Vec::with_capacity(known);
        prompt.extend_positions(0, known, &mut positions);
        let mut contexts = vec![0; known - 1];
        for rank in &self.ranks {
            let mut share = 0;
            for (index, context) in contexts.iter_mut().enumerate() {
                let embedding = embedding_hash(prompt, index).map_or(0, |(_, hash)| hash);
                let token = prompt.tokens[index];
                share = mix(share, place_hash(rank.rank, token, positions[index], embedding));
                *context = mix(*context, share);
            }
        }
        let tokens = contexts.iter().zip(&prompt.tokens[1..]);
        tokens.map(|(&context, &token)| scored(context, token, top, self.vocab_size)).collect()
    }

    fn zero(&mut self, blocks: &[BlockId]) -> Result<(), FakeModelError> {
        let block_size = self.limits.block_size as usize;
        for &block in blocks {
            if let Some((step, _)) = self.in_flight.iter().find(|(_, named)| named.contains(&block))
            {
                return Err(FakeModelError::BlockInFlight { block, step: *step });
            }
            let start = block.index() * block_size;
            for rank in &mut self.ranks {
                rank.kv[start..start + block_size].fill(UNWRITTEN);
            }
        }
        Ok(())
    }

    /// Writes the last `num_tokens` computed tokens of a slot and reads all.
    fn compute(
        &mut self,
        slot: SequenceSlot,
        num_tokens: usize,
    ) -> Result<Computed, FakeModelError> {
        let block_size = self.limits.block_size as usize;
        let last_sampled = self.last_sampled.get(&slot).copied();
        let scored_tokens = entry(&self.ranks[0], slot).scored_tokens(num_tokens);
        let first_scored = scored_tokens.start;
        let mut scored = vec![0; scored_tokens.len()];
        let mut context = 0;
        for rank in &mut self.ranks {
            let entry = rank.table.entry(slot).expect("the table accepted the plan");
            let end = entry.num_computed_tokens;
            let place = |index: usize| {
                entry.block_table[index / block_size].index() * block_size + index % block_size
            };
            let mut positions = Vec::with_capacity(num_tokens);
            entry.prompt.extend_positions(end - num_tokens, end, &mut positions);
            for (index, position) in (end - num_tokens..end).zip(positions) {
                let token = entry.token(index).or(last_sampled);
                let token = token.ok_or(FakeModelError::TokenUnknown { slot })?;
                let embedding = match embedding_hash(&entry.prompt, index) {
                    None => 0,
                    Some((key, hash)) if self.embeddings.contains(&key) => hash,
                    Some(_) => return Err(FakeModelError::EmbeddingMissing { slot }),
                };
                let written = &mut rank.kv[place(index)];
                if written.epoch.is_some() {
                    return Err(FakeModelError::WrittenTwice { slot, index });
                }
                let hash = place_hash(rank.rank, token, position, embedding);
                *written = Place { epoch: Some(rank.table.epoch()), hash };
            }
            let mut share = 0;
            for index in 0..end {
                let read = rank.kv[place(index)];
                if read.epoch != Some(rank.table.epoch()) {
                    return Err(FakeModelError::ReadUnwritten { slot, index });
                }
                share = mix(share, read.hash);
                if scored_tokens.contains(&(index + 1)) {
                    let before = &mut scored[index + 1 - first_scored];
                    *before = mix(*before, share);
                }
            }
            context = mix(context, share);
        }
        Ok(Computed { context, first_scored, scored })
    }
}

fn entry(rank: &FakeRank, slot: SequenceSlot) -> &TableEntry {
    rank.table.entry(slot).expect("the table accepted the plan")
}

/// Key and hash of the embedding row that stands at a token of a media span.
fn embedding_hash(prompt: &Prompt, index: usize) -> Option<(EmbeddingKey, u64)> {
    let covers = |span: &&MediaSpan| (span.offset as usize..span.end() as usize).contains(&index);
    let span = prompt.media.iter().find(covers)?;
    let key = span.embedding_key;
    let bytes = key.0.as_bytes().iter().map(|&byte| u64::from(byte));
    let row = index as u64 - u64::from(span.offset);
    Some((key, mix(bytes.fold(1, mix), row)))
}

fn place_hash(rank: u32, token: TokenId, position: [i32; 3], embedding: u64) -> u64 {
    let hash = mix(u64::from(rank) + 1, u64::from(token));
    let hash = position.iter().fold(hash, |hash, &axis| mix(hash, axis as u64));
    mix(hash, embedding)
}

/// The first token from a hashed place on that is allowed and not barred by `min_tokens`.
fn draw(
    context: u64,
    output_index: usize,
    vocab_size: u32,
    rule: DrawRule<'_>,
    allows: impl Fn(TokenId) -> bool,
) -> TokenId {
    let ends = |token| {
        let eos = !rule.sampling.ignore_eos && rule.eos_token_ids.contains(&token);
        eos || rule.sampling.stop_token_ids.contains(&token)
    };
    let barred = |token| output_index < rule.sampling.min_tokens as usize && ends(token);
    let hash = mix(mix(context, rule.seed), output_index as u64);
    let first = (hash % u64::from(vocab_size)) as u32;
    let mut tokens = (0..vocab_size).map(|offset| (first + offset) % vocab_size);
    tokens.find(|&token| allows(token) && !barred(token)).unwrap_or(first)
}

fn logprobs(token: TokenId, sampling: &SamplingParams) -> Option<TokenLogprobs> {
    let top = (0..sampling.logprobs?).map(|rank| (token + rank, -1.0 - rank as f32)).collect();
    Some(TokenLogprobs { logprob: -1.0, top })
}

/// Log probabilities of the prompt tokens that a slot scored in one step.
fn score(
    slot: SequenceSlot,
    entry: &TableEntry,
    computed: &Computed,
    vocab_size: u32,
) -> PromptLogprobs {
    let top = entry.sampling.prompt_logprobs.unwrap_or(0);
    let tokens = computed.scored.iter().zip(&entry.prompt.tokens[computed.first_scored..]);
    PromptLogprobs {
        slot,
        sequence: entry.sequence,
        first_token: computed.first_scored as u32,
        tokens: tokens.map(|(&context, &token)| scored(context, token, top, vocab_size)).collect(),
    }
}

/// The log probability of `token` after a context, exact in f32.
fn scored(context: u64, token: TokenId, top: u32, vocab_size: u32) -> TokenLogprobs {
    let logprob = -((mix(context, u64::from(token)) % 4096) as f32) / 256.0;
    let first = (context % u64::from(vocab_size)) as u32;
    let top = (0..top).map(|rank| ((first + rank) % vocab_size, -(rank as f32))).collect();
    TokenLogprobs { logprob, top }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tessera_types::{
        AdmittedSequence, GridThw, Hash256, MediaKind, PositionSpan, ScheduledSequence, SequenceId,
    };

    use super::*;

    const LIMITS: TableLimits = TableLimits { num_slots: 2, num_blocks: 4, block_size: 2 };
    const KEY: EmbeddingKey = EmbeddingKey(Hash256([7; 32]));

    /// A leader that plans what it is told, right or wrong, and a model of two ranks.
    struct Leader {
        table: SequenceTable,
        model: FakeModel,
    }

    impl Leader {
        fn new() -> Self {
            let epoch = Epoch(1);
            Self {
                table: SequenceTable::new(LIMITS, epoch),
                model: FakeModel::new(LIMITS, epoch, 2, 50),
            }
        }

        fn forward(&mut self, mut plan: StepPlan) -> Result<(), FakeModelError> {
            (plan.epoch, plan.step) = (self.table.epoch(), self.table.step().next());
            plan.table_digest = self.table.advance(&plan).expect("a consistent plan");
            self.model.forward(&plan)
        }

        fn step(&mut self, plan: StepPlan) -> Result<StepOutput, FakeModelError> {
            self.forward(plan)?;
            self.model.sample(self.table.step(), &LateInputs::default())
        }
    }

    fn admission(slot: u32, media: bool) -> AdmittedSequence {
        let span = MediaSpan {
            item: 0,
            kind: MediaKind::Image,
            offset: 1,
            num_tokens: 1,
            grid: GridThw { t: 1, h: 2, w: 2 },
            seconds_per_grid: 0.0,
            embedding_key: KEY,
        };
        AdmittedSequence {
            slot: SequenceSlot(slot),
            sequence: SequenceId(u64::from(slot)),
            prompt: Arc::new(Prompt {
                tokens: vec![4, 5],
                media: if media { vec![span] } else { Vec::new() },
                positions: vec![PositionSpan::Text { len: 2 }],
            }),
            output: Vec::new(),
            sampling: Arc::new(SamplingParams::default()),
            eos_token_ids: Arc::from([]),
            seed: 0,
            num_computed_tokens: 0,
            block_table: Vec::new(),
        }
    }

    fn scheduled(slot: u32, num_tokens: u32, blocks: &[u32]) -> ScheduledSequence {
        let appended_blocks = blocks.iter().map(|&block| BlockId(block)).collect();
        ScheduledSequence { slot: SequenceSlot(slot), num_tokens, appended_blocks, sample: true }
    }

    fn plan(admitted: Vec<AdmittedSequence>, scheduled: Vec<ScheduledSequence>) -> StepPlan {
        StepPlan { admitted, scheduled, ..StepPlan::default() }
    }

    #[test]
    fn a_block_in_flight_must_not_be_zeroed() {
        let mut leader = Leader::new();
        leader
            .step(plan(vec![admission(0, false)], vec![scheduled(0, 2, &[0])]))
            .expect("a good step");
        let zero = || StepPlan { zero_blocks: vec![BlockId(0)], ..StepPlan::default() };
        let step = StepId(1);
        assert_eq!(
            leader.step(zero()),
            Err(FakeModelError::BlockInFlight { block: BlockId(0), step })
        );
        let mut leader = Leader::new();
        leader
            .step(plan(vec![admission(0, false)], vec![scheduled(0, 2, &[0])]))
            .expect("a good step");
        leader.model.collected(step);
        assert!(leader.step(zero()).is_ok());
    }

    #[test]
    fn a_block_used_twice_and_a_block_never_written_are_caught() {
        let mut leader = Leader::new();
        leader
            .step(plan(vec![admission(0, false)], vec![scheduled(0, 2, &[0])]))
            .expect("a good step");
        let again = leader.step(plan(vec![admission(1, false)], vec![scheduled(1, 2, &[0])]));
        let slot = SequenceSlot(1);
        assert_eq!(again, Err(FakeModelError::WrittenTwice { slot, index: 0 }));
        let mut leader = Leader::new();
        let hit = AdmittedSequence {
            num_computed_tokens: 1,
            block_table: vec![BlockId(2)],
            ..admission(1, false)
        };
        let unwritten = leader.step(plan(vec![hit], vec![scheduled(1, 1, &[])]));
        assert_eq!(unwritten, Err(FakeModelError::ReadUnwritten { slot, index: 0 }));
    }

    #[test]
    fn a_missing_embedding_is_caught() {
        let work = || plan(vec![admission(0, true)], vec![scheduled(0, 2, &[0])]);
        let mut leader = Leader::new();
        let slot = SequenceSlot(0);
        assert_eq!(leader.step(work()), Err(FakeModelError::EmbeddingMissing { slot }));
        let mut leader = Leader::new();
        leader.model.install_embedding(KEY);
        assert!(leader.step(work()).is_ok());
    }

    #[test]
    fn the_halves_of_a_step_come_in_order() {
        let mut leader = Leader::new();
        let early = leader.model.sample(StepId(1), &LateInputs::default());
        assert_eq!(early, Err(FakeModelError::NotForwarded { step: StepId(1) }));
        let work = plan(vec![admission(0, false)], vec![scheduled(0, 2, &[0])]);
        leader.forward(work).expect("a good step");
        let next = leader.forward(plan(vec![], vec![scheduled(0, 1, &[1])]));
        assert_eq!(next, Err(FakeModelError::NotSampled { step: StepId(1) }));
    }
}
