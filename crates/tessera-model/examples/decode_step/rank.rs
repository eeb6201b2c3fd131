//! One rank of the measured decoder, in a thread of its own as in the engine.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tessera_collective::{Communicator, threads};
use tessera_kernels::cpu::CpuKv;
use tessera_kernels::{
    Backend, CpuBackend, CpuFormat, GraphKey, OpTime, SampleRow, SamplerSequence, StepInputs,
    StepKind, StepLimits, Timed, TokenSource,
};
use tessera_model::{Decoder, ModelConfig, TpSplit, WeightSource, Weights};
use tessera_types::{
    BlockCopy, BlockId, Epoch, LateInputs, SamplingParams, SequenceId, SequenceSlot,
};

const BLOCK_SIZE: u32 = 16;

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What to build.
#[derive(Clone)]
pub struct Setup {
    pub config: ModelConfig,
    pub threads_per_rank: usize,
    pub max_batch: u32,
    /// Tokens in the cache of every sequence.
    pub context: u32,
    pub params: SamplingParams,
}

/// A group of ranks that step together when told to.
pub struct Group {
    ranks: Vec<(SyncSender<u32>, JoinHandle<()>)>,
    results: Receiver<(u32, Result<Vec<OpTime>, Failure>)>,
}

impl Group {
    /// Starts the ranks and waits until their weights are loaded and their caches filled.
    pub fn start(world_size: u32, setup: &Setup) -> Result<Self, Failure> {
        let (done, results) = sync_channel(world_size as usize);
        let start = |communicator: Communicator| {
            let (order, orders) = sync_channel::<u32>(1);
            let (setup, done, rank) = (setup.clone(), done.clone(), communicator.rank().0);
            let run = move || {
                let mut member = match Member::load(&setup, communicator) {
                    Ok(member) => member,
                    Err(error) => return drop(done.send((rank, Err(error)))),
                };
                let mut result = Ok(Vec::new());
                while done.send((rank, result)).is_ok() {
                    let Ok(batch) = orders.recv() else { return };
                    result = member.step(batch);
                }
            };
            (order, std::thread::spawn(run))
        };
        let ranks = threads::group(world_size, Epoch(1)).into_iter().map(start).collect();
        let group = Self { ranks, results };
        group.collect()?;
        Ok(group)
    }

    /// One decode step of `batch` sequences: its time, and rank 0's operations.
    pub fn step(&self, batch: u32) -> Result<(Duration, Vec<OpTime>), Failure> {
        let start = Instant::now();
        for (order, _) in &self.ranks {
            order.send(batch)?;
        }
        let operations = self.collect()?;
        Ok((start.elapsed(), operations))
    }

    fn collect(&self) -> Result<Vec<OpTime>, Failure> {
        let mut operations = Vec::new();
        for _ in &self.ranks {
            let (rank, result) = self.results.recv()?;
            let result = result?;
            if rank == 0 {
                operations = result;
            }
        }
        Ok(operations)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for (order, thread) in self.ranks.drain(..) {
            drop(order);
            // Its failure was reported as a result.
            let _ = thread.join();
        }
    }
}

struct Member {
    backend: Timed<CpuBackend>,
    decoder: Decoder<Timed<CpuBackend>>,
    kv: CpuKv,
    context: u32,
    output_index: u32,
}

impl Member {
    fn load(setup: &Setup, communicator: Communicator) -> Result<Self, Failure> {
        let text = &setup.config.text;
        let blocks = (setup.context + 1).div_ceil(BLOCK_SIZE);
        let limits = StepLimits {
            max_tokens: setup.context.max(setup.max_batch),
            max_sequences: setup.max_batch,
            max_blocks_per_sequence: blocks,
            max_visual_rows: 0,
            num_real_tokens: text.vocab_size as u32,
        };
        let mut backend = Timed::new(CpuBackend::new(setup.threads_per_rank, CpuFormat::Bf16)?);
        let split = TpSplit::new(text, communicator.rank(), communicator.world_size())?;
        let mut weights = Weights::open(&WeightSource::Random { seed: 1 }, &setup.config)?;
        let decoder = Decoder::load(&mut backend, text, &split, &limits, &mut weights)?;
        let kv = backend.alloc_kv(&decoder.kv_spec(BLOCK_SIZE), blocks * setup.max_batch)?;
        backend.set_communicator(Some(communicator))?;
        let mut member = Self { backend, decoder, kv, context: setup.context, output_index: 0 };
        member.fill(setup, blocks)?;
        Ok(member)
    }

    /// Computes the context of the first sequence and copies it to all others.
    fn fill(&mut self, setup: &Setup, blocks: u32) -> Result<(), Failure> {
        let prompt: Vec<u32> = (0..self.context).map(|i| (i * 7919 + 13) % 50_000).collect();
        for sequence in 0..setup.max_batch {
            self.backend.sampler_admit(SamplerSequence {
                slot: SequenceSlot(sequence),
                prompt: &prompt,
                output: &[],
                params: &setup.params,
                eos_token_ids: &[],
                seed: u64::from(sequence),
            })?;
        }
        let copy = |sequence: u32, block: u32| BlockCopy {
            from: BlockId(block),
            to: BlockId(sequence * blocks + block),
        };
        let mut inputs = StepInputs {
            token_source: prompt.iter().map(|token| TokenSource::Host(*token)).collect(),
            cu_q: vec![0, self.context],
            block_copies: (1..setup.max_batch)
                .flat_map(|sequence| (0..blocks).map(move |block| copy(sequence, block)))
                .collect(),
            ..StepInputs::default()
        };
        (0..self.context).for_each(|token| place(&mut inputs, token, 0, blocks));
        finish(&mut inputs, 1, self.context, blocks);
        inputs.logit_rows = vec![self.context - 1];
        self.backend.upload(&inputs)?;
        self.decoder.forward(&mut self.backend, &mut self.kv, self.context, 1)?;
        self.backend.copy_blocks(&mut self.kv)?;
        self.backend.take();
        Ok(())
    }

    fn step(&mut self, batch: u32) -> Result<Vec<OpTime>, Failure> {
        let blocks = (self.context + 1).div_ceil(BLOCK_SIZE);
        let slots = (0..batch).map(SequenceSlot);
        let mut inputs = StepInputs {
            token_source: slots.clone().map(TokenSource::LastSampled).collect(),
            cu_q: (0..=batch).collect(),
            ..StepInputs::default()
        };
        (0..batch).for_each(|sequence| place(&mut inputs, self.context, sequence, blocks));
        finish(&mut inputs, batch, self.context + 1, blocks);
        inputs.logit_rows = (0..batch).collect();
        self.backend.upload(&inputs)?;
        let key = GraphKey { tokens: batch, seqs: batch, rows: batch, kind: StepKind::Decode };
        let mut logits = self.decoder.visual();
        self.backend.run(key, &mut |b| {
            logits = self.decoder.forward(b, &mut self.kv, batch, batch)?;
            Ok(())
        })?;
        let output_index = self.output_index;
        let row = |slot| SampleRow { slot, sequence: SequenceId(7), output_index };
        let rows: Vec<_> = slots.map(row).collect();
        self.backend.sample(logits, &rows, &LateInputs::default())?;
        let ticket = self.backend.submit()?;
        self.backend.wait(ticket, Instant::now() + Duration::from_secs(60))?;
        self.output_index += 1;
        Ok(self.backend.take())
    }
}

/// Adds the token at `position` of a sequence.
fn place(inputs: &mut StepInputs, position: u32, sequence: u32, blocks: u32) {
    inputs.positions.push([position as i32; 3]);
    inputs.slot_mapping.push(i64::from(sequence * blocks * BLOCK_SIZE + position));
    inputs.visual_row.push(-1);
}

/// Adds what a step says about each of its sequences.
fn finish(inputs: &mut StepInputs, batch: u32, kv_len: u32, blocks: u32) {
    inputs.kv_len = vec![kv_len; batch as usize];
    inputs.block_tables = (0..batch * blocks).collect();
    inputs.block_table_stride = blocks;
}
