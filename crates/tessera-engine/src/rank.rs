//! One rank's work, without its thread: the model's share, its KV cache, its sequence table.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_collective::{AbortHandle, Communicator};
use tessera_kernels::{Act, Backend, HostRows, SampleRow, SamplerSequence, StepLimits};
use tessera_model::{Decoder, LoadMeter, ModelConfig, TpSplit, WeightSource, Weights};
use tessera_scheduler::{SequenceTable, TableLimits};
use tessera_types::{
    EmbeddingKey, Epoch, LateInputs, PromptLogprobs, Rank, SequenceSlot, StepId, StepOutput,
    StepPlan, TokenLogprobs,
};

use crate::batch::{ScoredRun, StepBatch};
use crate::error::RankError;
use crate::rank_thread::RankInfo;

/// Result of a rank's work.
pub type Result<T, E = RankError> = std::result::Result<T, E>;

/// Longest that a submitted step may take before its rank gives up on the device. A last resort: a group
/// that hangs is found by its missing progress long before (CLUSTER §2).
const STEP_TIMEOUT: Duration = Duration::from_secs(600);

/// What a rank loads.
#[derive(Debug, Clone)]
pub struct RankSpec {
    pub rank: Rank,
    pub world_size: u32,
    pub model: Arc<ModelConfig>,
    pub weights: WeightSource,
    /// Largest step; `max_sequences` is the number of slots.
    pub limits: StepLimits,
    /// Tokens per KV block.
    pub block_size: u32,
}

/// One rank of a decoder group. Owned by one thread.
pub struct RankWorker<B: Backend> {
    rank: Rank,
    world_size: u32,
    backend: B,
    decoder: Decoder<B>,
    limits: StepLimits,
    block_size: u32,
    batch: StepBatch,
    /// Rank 0 only. They outlive epochs.
    embeddings: HashMap<EmbeddingKey, Arc<[f32]>>,
    /// The logits slot, as the model's last pass returned it: a replayed step does not return it again.
    logits: Option<Act>,
    epoch: Option<RankEpoch<B>>,
}

/// What one epoch adds, and takes with it.
struct RankEpoch<B: Backend> {
    kv: B::Kv,
    table: SequenceTable,
    abort: AbortHandle,
    forwarded: Option<Forwarded>,
    submitted: VecDeque<Submitted<B>>,
}

/// A step between its two halves.
struct Forwarded {
    step: StepId,
    has_tokens: bool,
    rows: Vec<SampleRow>,
    spent: Duration,
}

struct Submitted<B: Backend> {
    step: StepId,
    /// `None`: the plan held nothing to compute.
    ticket: Option<B::Ticket>,
    /// Whose prompt tokens it scored.
    scored: Vec<ScoredRun>,
    /// Time spent in its two halves.
    spent: Duration,
}

/// A completed step.
#[derive(Debug)]
pub struct Completed {
    /// Log probabilities on rank 0 only.
    pub output: StepOutput,
    /// Mean time of one layer, enqueueing and waiting included; `None` if nothing was computed.
    pub layer_time: Option<Duration>,
}

impl<B: Backend> RankWorker<B> {
    /// Loads this rank's share of the language model, counting in `meter`. Joins no epoch yet.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, an impossible degree, a block size the backend lacks.
    pub fn load(mut backend: B, spec: &RankSpec, meter: &LoadMeter) -> Result<Self> {
        let block_sizes = &backend.caps().block_sizes;
        if !block_sizes.is_empty() && !block_sizes.contains(&spec.block_size) {
            return Err(RankError::BlockSize { block_size: spec.block_size });
        }
        let text = &spec.model.text;
        let split = TpSplit::new(text, spec.rank, spec.world_size)
            .map_err(tessera_model::ModelError::from)?;
        let mut weights = Weights::open(&spec.weights, &spec.model)?.with_meter(meter);
        let decoder = Decoder::load(&mut backend, text, &split, &spec.limits, &mut weights)?;
        Ok(Self {
            rank: spec.rank,
            world_size: spec.world_size,
            backend,
            decoder,
            limits: spec.limits,
            block_size: spec.block_size,
            batch: StepBatch::default(),
            embeddings: HashMap::new(),
            logits: None,
            epoch: None,
        })
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// What the owner of the group must know of this rank.
    pub fn info(&self) -> RankInfo {
        let caps = self.backend.caps();
        RankInfo {
            rank: self.rank,
            backend: caps.name,
            kv_block_bytes: self.decoder.kv_spec(self.block_size).block_bytes(caps.kv_dtype),
            memory: self.decoder.memory(),
            numerics_id: tessera_model::numerics::decoder_numerics(caps, self.world_size),
        }
    }

    /// The backend's layer counter.
    pub fn layers(&self) -> tessera_kernels::Progress {
        self.backend.progress()
    }

    /// Joins an epoch with empty KV and an empty table.
    pub fn begin_epoch(
        &mut self,
        epoch: Epoch,
        num_blocks: u32,
        communicator: Communicator,
    ) -> Result<()> {
        self.end_epoch()?;
        let limits = TableLimits {
            num_slots: self.limits.max_sequences,
            num_blocks,
            block_size: self.block_size,
        };
        let abort = communicator.abort_handle();
        // KV first: if it can't be had, the communicator is dropped and peers notice at once.
        let kv = self.backend.alloc_kv(&self.decoder.kv_spec(self.block_size), num_blocks)?;
        self.backend.set_communicator(Some(communicator))?;
        self.epoch = Some(RankEpoch {
            kv,
            table: SequenceTable::new(limits, epoch),
            abort,
            forwarded: None,
            submitted: VecDeque::new(),
        });
        Ok(())
    }

    /// Leaves the epoch: steps, KV and communicator go; weights and embeddings stay. KV goes first, so
    /// that the next epoch finds its memory free.
    pub fn end_epoch(&mut self) -> Result<()> {
        if self.epoch.take().is_some() {
            (0..self.limits.max_sequences)
                .for_each(|slot| self.backend.sampler_release(SequenceSlot(slot)));
            self.backend.set_communicator(None)?;
        }
        Ok(())
    }

    /// Ends the epoch for all ranks that share this one's abort handle or hear of it through the
    /// communicator.
    pub fn abort(&self, reason: String) {
        if let Some(epoch) = &self.epoch {
            epoch.abort.abort(reason);
        }
    }

    /// Keeps an embedding `[rows, hidden]`.
    pub fn install_embedding(&mut self, key: EmbeddingKey, rows: Arc<[f32]>) {
        self.embeddings.insert(key, rows);
    }

    pub fn drop_embedding(&mut self, key: EmbeddingKey) {
        self.embeddings.remove(&key);
    }

    /// First half of a step: enqueues everything up to the logits.
    pub fn forward(&mut self, plan: &StepPlan) -> Result<()> {
        let started = Instant::now();
        let epoch = self.epoch.as_mut().ok_or(RankError::NoEpoch)?;
        epoch.table.apply(plan)?;
        plan.released.iter().for_each(|&slot| self.backend.sampler_release(slot));
        for admitted in &plan.admitted {
            self.backend.sampler_admit(SamplerSequence {
                slot: admitted.slot,
                prompt: &admitted.prompt.tokens,
                output: &admitted.output,
                params: &admitted.sampling,
                eos_token_ids: &admitted.eos_token_ids,
                seed: admitted.seed,
            })?;
        }
        self.batch.build(&epoch.table, plan, self.block_size);
        let most = self.limits.max_sequences.min(self.limits.max_tokens);
        self.batch.round_up(&self.backend.caps().decode_buckets, most);
        if self.batch.num_tokens() > 0 {
            self.run_batch()?;
        }
        let epoch = self.epoch.as_mut().expect("present at the start of this call");
        epoch.forwarded = Some(Forwarded {
            step: plan.step,
            has_tokens: self.batch.num_tokens() > 0,
            rows: self.batch.rows.clone(),
            spent: started.elapsed(),
        });
        Ok(())
    }

    /// Second half of a step: enqueues the draw and marks the end of the step.
    pub fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<()> {
        let started = Instant::now();
        let epoch = self.epoch.as_mut().ok_or(RankError::NoEpoch)?;
        let expected = epoch.table.step();
        let forwarded = epoch.forwarded.take().filter(|forwarded| forwarded.step == step);
        let forwarded = forwarded.ok_or(RankError::OutOfOrder { expected, got: step })?;
        if !forwarded.rows.is_empty() {
            let logits = self.logits.expect("a step with tokens was forwarded");
            let logits = Act { rows: forwarded.rows.len() as u32, ..logits };
            self.backend.sample(logits, &forwarded.rows, late)?;
        }
        // Only now: their logits take the place of those that were drawn from.
        self.score()?;
        let epoch = self.epoch.as_mut().expect("present at the start of this call");
        let ticket = if forwarded.has_tokens { Some(self.backend.submit()?) } else { None };
        let spent = forwarded.spent + started.elapsed();
        let scored = std::mem::take(&mut self.batch.scored);
        epoch.submitted.push_back(Submitted { step, ticket, scored, spent });
        Ok(())
    }

    /// Enqueues the scores of prompt tokens, a tile of rows at a time. The batch is still that of the step
    /// being sampled.
    fn score(&mut self) -> Result<()> {
        let (tokens, tile) = (self.batch.num_tokens(), self.decoder.max_scored_rows() as usize);
        for (index, rows) in self.batch.scores.chunks(tile.max(1)).enumerate() {
            let (from, num_rows) = ((index * tile) as u32, rows.len() as u32);
            let logits = self.decoder.score(&mut self.backend, tokens, from, num_rows)?;
            self.backend.score_rows(logits, rows)?;
        }
        Ok(())
    }

    /// Waits for the oldest submitted step, which is `step`.
    pub fn collect(&mut self, step: StepId) -> Result<Completed> {
        let started = Instant::now();
        let epoch = self.epoch.as_mut().ok_or(RankError::NoEpoch)?;
        let expected =
            epoch.submitted.front().map_or(epoch.table.step(), |submitted| submitted.step);
        let submitted = epoch.submitted.pop_front().filter(|submitted| submitted.step == step);
        let submitted = submitted.ok_or(RankError::OutOfOrder { expected, got: step })?;
        let Some(ticket) = submitted.ticket else {
            let output = StepOutput { step, ..StepOutput::default() };
            return Ok(Completed { output, layer_time: None });
        };
        let readback = self.backend.wait(ticket, started + STEP_TIMEOUT)?;
        let prompt_logprobs = by_sequence(&submitted.scored, readback.scores);
        let output = StepOutput { step, tokens: readback.tokens, prompt_logprobs };
        let num_layers = self.decoder.kv_spec(self.block_size).num_layers.max(1);
        let layer_time = Some((submitted.spent + started.elapsed()) / num_layers);
        Ok(Completed { output, layer_time })
    }

    fn run_batch(&mut self) -> Result<()> {
        self.backend.upload(&self.batch.inputs)?;
        if self.rank == Rank(0) {
            self.upload_visual_rows()?;
        }
        let epoch = self.epoch.as_mut().ok_or(RankError::NoEpoch)?;
        if !self.batch.inputs.zero_blocks.is_empty() {
            self.backend.zero_blocks(&mut epoch.kv)?;
        }
        if !self.batch.inputs.block_copies.is_empty() {
            self.backend.copy_blocks(&mut epoch.kv)?;
        }
        let key = self.batch.graph_key();
        let (decoder, logits, kv) = (&self.decoder, &mut self.logits, &mut epoch.kv);
        self.backend.run(key, &mut |backend| {
            *logits = Some(decoder.forward(backend, kv, key.tokens, key.rows)?);
            Ok(())
        })?;
        Ok(())
    }

    /// Uploads the rows of embeddings that this step's chunk merges, and no others.
    fn upload_visual_rows(&mut self) -> Result<()> {
        let visual = self.decoder.visual();
        for run in &self.batch.visual {
            let (sequence, key) = (run.sequence, run.key);
            let missing = || RankError::EmbeddingMissing { sequence, key };
            let rows = self.embeddings.get(&run.key).ok_or_else(missing)?;
            let values = run.first_row * visual.cols..(run.first_row + run.num_rows) * visual.cols;
            let values =
                rows.get(values.start as usize..values.end as usize).ok_or_else(missing)?;
            self.backend.upload_rows(visual, run.at, HostRows { values, cols: visual.cols })?;
        }
        Ok(())
    }
}

/// Scores in the order of rows, as their sequences'; none on ranks that are told none.
fn by_sequence(scored: &[ScoredRun], scores: Vec<TokenLogprobs>) -> Vec<PromptLogprobs> {
    if scores.is_empty() {
        return Vec::new();
    }
    let mut scores = scores.into_iter();
    let of_run = |run: &ScoredRun| PromptLogprobs {
        slot: run.slot,
        sequence: run.sequence,
        first_token: run.first_token,
        tokens: scores.by_ref().take(run.num_tokens as usize).collect(),
    };
    scored.iter().map(of_run).collect()
}
