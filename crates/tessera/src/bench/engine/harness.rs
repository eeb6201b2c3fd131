//! An engine with all its ranks in this process, and a record of what its sequences did and when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use tessera_collective::{AbortHandle, CollectiveConfig, threads};
use tessera_engine::{
    Engine, EngineConfig, EngineHandle, EngineThread, EpochStart, Event, GroupExecutor, LocalRanks,
    RankSpec, SequenceError, SinkError, Submission,
};
use tessera_kernels::{CpuBackend, Device, ReferenceBackend, StepLimits, cuda};
use tessera_types::{
    BlockKey, Epoch, FinishReason, Hash256, PositionSpan, Prompt, Rank, SamplingParams, SequenceId,
    TenantId,
};

use super::args::Plan;
use crate::bench::error::BenchError;
use crate::bench::random::Random;

const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);
const EPOCH: Epoch = Epoch(1);
/// Prompts hold ids of this share of the vocabulary, and so none of the special ones at its end.
const PLAIN_TOKENS: f64 = 0.9;

/// A running engine.
pub struct Harness {
    handle: EngineHandle,
    _thread: EngineThread,
    vocab_size: u32,
    block_size: u32,
}

/// What one sequence did.
#[derive(Debug, Clone, Copy)]
pub struct Note {
    /// The number that the sequence was started with.
    pub sequence: usize,
    pub at: Instant,
    /// Steps completed, of which differences count.
    pub step: u64,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Token,
    Finished,
}

/// Notes of several sequences in the order in which they happened.
pub struct Log {
    sender: Sender<Result<Note, SequenceError>>,
    notes: Receiver<Result<Note, SequenceError>>,
}

impl Log {
    /// With room for that many notes between reads.
    pub fn new(capacity: usize) -> Self {
        let (sender, notes) = bounded(capacity);
        Self { sender, notes }
    }

    /// The next note.
    ///
    /// # Errors
    /// A sequence that failed.
    pub fn next(&self) -> Result<Note, BenchError> {
        // The log holds a sender itself, so a lost engine shows as a sequence that failed.
        Ok(self.notes.recv().map_err(|_| BenchError::Stopped)??)
    }

    /// The next note before `deadline`, if there is one.
    pub fn next_before(&self, deadline: Instant) -> Result<Option<Note>, BenchError> {
        match self.notes.recv_deadline(deadline) {
            Ok(note) => Ok(Some(note?)),
            Err(_) => Ok(None),
        }
    }

    /// Notes until `sequences` of them have finished.
    pub fn until_finished(&self, sequences: usize) -> Result<Vec<Note>, BenchError> {
        let (mut notes, mut finished) = (Vec::new(), 0);
        while finished < sequences {
            let note = self.next()?;
            finished += usize::from(note.what == What::Finished);
            notes.push(note);
        }
        Ok(notes)
    }
}

/// A prompt to submit.
#[derive(Debug, Clone)]
pub struct Request {
    prompt: Arc<Prompt>,
    block_keys: Vec<BlockKey>,
}

impl Harness {
    /// Loads the ranks, starts the engine and begins its epoch.
    ///
    /// # Errors
    /// A shape that cannot be split, weights that cannot be read, too little memory.
    pub fn start(plan: &Plan) -> Result<Self, BenchError> {
        let (scheduler, text) = (plan.scheduler(), &plan.shape.config.text);
        let ranks = load_ranks(plan)?;
        let config = EngineConfig {
            scheduler,
            hidden_size: text.hidden_size as u32,
            vocab_size: text.vocab_size as u32,
            ..EngineConfig::default()
        };
        let executor = Box::new(GroupExecutor::new(ranks, LEAVE_TIMEOUT));
        // The end of the epoch fails every sequence, which its log tells.
        let (handle, thread) = Engine::spawn(config, executor, Box::new(|_| {}))?;
        let harness = Self {
            handle,
            _thread: thread,
            vocab_size: text.vocab_size as u32,
            block_size: plan.block_size,
        };
        harness.begin_epoch(plan)?;
        Ok(harness)
    }

    fn begin_epoch(&self, plan: &Plan) -> Result<(), BenchError> {
        let abort = AbortHandle::new(EPOCH);
        let start = EpochStart {
            epoch: EPOCH,
            num_blocks: plan.num_blocks(),
            abort: abort.clone(),
            communicators: threads::group_with(plan.tp, &abort, &CollectiveConfig::default()),
            plans: None,
        };
        let (sender, reply) = bounded(1);
        self.handle.begin_epoch(start, Box::new(move |result| drop(sender.send(result))))?;
        Ok(reply.recv().map_err(|_| BenchError::Stopped)??)
    }

    /// A prompt of random tokens. With `cached`, its full blocks are found in the prefix cache when the same
    /// prompt (by `seed`) comes again.
    pub fn request(&self, seed: u64, num_tokens: u32, cached: bool) -> Request {
        let plain = (f64::from(self.vocab_size) * PLAIN_TOKENS) as u32;
        let mut random = Random::new(seed);
        let tokens = (0..num_tokens).map(|_| random.between(0, plain.saturating_sub(1))).collect();
        let num_keys = if cached { num_tokens / self.block_size } else { 0 };
        let key = |block: u32| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&seed.to_le_bytes());
            key[8..12].copy_from_slice(&block.to_le_bytes());
            BlockKey(Hash256(key))
        };
        Request {
            prompt: Arc::new(Prompt {
                tokens,
                media: Vec::new(),
                positions: vec![PositionSpan::Text { len: num_tokens }],
            }),
            block_keys: (0..num_keys).map(key).collect(),
        }
    }

    /// Starts a sequence that draws exactly `max_tokens` tokens and is noted as `sequence`.
    pub fn submit(
        &self,
        request: &Request,
        max_tokens: u32,
        sequence: usize,
        log: &Log,
    ) -> Result<SequenceId, BenchError> {
        let submission = Submission {
            prompt: Arc::clone(&request.prompt),
            output: Vec::new(),
            sampling: Arc::new(SamplingParams {
                max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            }),
            seed: sequence as u64,
            priority: 0,
            tenant: TenantId::default(),
            age: Duration::ZERO,
            block_keys: request.block_keys.clone(),
        };
        let (sender, engine) = (log.sender.clone(), self.handle.clone());
        let note = move |event| {
            let what = match event {
                Event::Token { .. } => What::Token,
                Event::Finished { .. } => What::Finished,
                Event::Failed { error } => {
                    return sender.try_send(Err(error)).map_err(|_| SinkError::Full);
                }
                _ => return Ok(()),
            };
            let step = engine.load().completed_step.0;
            let note = Note { sequence, at: Instant::now(), step, what };
            sender.try_send(Ok(note)).map_err(|_| SinkError::Full)
        };
        Ok(self.handle.submit(submission, Box::new(note))?)
    }

    /// Ends a sequence; it is noted as finished.
    pub fn stop(&self, sequence: SequenceId) -> Result<(), BenchError> {
        Ok(self.handle.abort(sequence, FinishReason::Cancelled)?)
    }

    /// Waits until nothing is computed any more: a step in flight is over when one that came after it is.
    pub fn settle(&self) -> Result<(), BenchError> {
        let log = Log::new(4);
        self.submit(&self.request(u64::MAX, 1, false), 1, 0, &log)?;
        log.until_finished(1)?;
        Ok(())
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.handle.shutdown();
    }
}

fn load_ranks(plan: &Plan) -> Result<LocalRanks, BenchError> {
    let scheduler = plan.scheduler();
    let model = Arc::new(plan.shape.config.clone());
    let limits = StepLimits {
        max_tokens: scheduler.max_tokens_per_step,
        max_sequences: scheduler.num_slots(),
        max_blocks_per_sequence: scheduler.max_blocks_per_sequence(),
        max_visual_rows: 1,
        num_real_tokens: model.text.vocab_size as u32,
    };
    let spec = |rank| RankSpec {
        rank: Rank(rank),
        world_size: plan.tp,
        model: Arc::clone(&model),
        weights: plan.weight_source.clone(),
        limits,
        block_size: plan.block_size,
    };
    let specs = (0..plan.tp).map(spec).collect();
    let threads = plan.threads_per_rank;
    Ok(match plan.device {
        Device::Reference => LocalRanks::load(specs, |_| Ok(ReferenceBackend::new()))?,
        Device::Cpu(format) => LocalRanks::load(specs, move |_| CpuBackend::new(threads, format))?,
        Device::Cuda(device) => LocalRanks::load(specs, move |rank: Rank| {
            cuda::open(&device.options(rank.0 as usize, false))
        })?,
    })
}
