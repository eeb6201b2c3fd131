//! How long `schedule()` takes: 256 running sequences in decode, alone, beside prefill, and with 4,096
//! sequences of 100 tenants waiting. Run it on an idle machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_scheduler::{Scheduler, SchedulerConfig, SequenceRequest};
use tessera_types::{
    BlockKey, Epoch, Hash256, PositionSpan, Prompt, SampledToken, SamplingParams, SequenceId,
    SequenceSlot, StepOutput, StepPlan, TenantId,
};

const NUM_RUNNING: u32 = 256;
const NUM_STEPS: usize = 2000;
/// Long enough that nobody ends while it is measured.
const MAX_TOKENS: u32 = 8192;

fn config(max_tokens_per_step: u32) -> SchedulerConfig {
    SchedulerConfig {
        max_running: NUM_RUNNING + 1,
        max_waiting: 8192,
        max_waiting_per_tenant: 8192,
        max_tokens_per_step,
        max_model_len: 1 << 17,
        ..SchedulerConfig::default()
    }
}

/// A sequence whose prompt has a key of its own per block.
fn request(id: u64, num_tokens: u32, tenant: u64) -> SequenceRequest {
    let block_keys = (0..num_tokens as u64 / 16).map(|block| {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[8..16].copy_from_slice(&block.to_le_bytes());
        BlockKey(Hash256(bytes))
    });
    SequenceRequest {
        sequence: SequenceId(id),
        block_keys: block_keys.collect(),
        prompt: Arc::new(Prompt {
            tokens: vec![7; num_tokens as usize],
            media: Vec::new(),
            positions: vec![PositionSpan::Text { len: num_tokens }],
        }),
        output: Vec::new(),
        sampling: Arc::new(SamplingParams { max_tokens: MAX_TOKENS, ..SamplingParams::default() }),
        eos_token_ids: Arc::from([1]),
        seed: id,
        priority: 0,
        tenant: TenantId(tenant),
        arrival: id,
        use_reserve: false,
    }
}

/// Answers plans with a token for every draw.
struct Rig {
    scheduler: Scheduler,
    /// The sequence in each slot.
    sequences: Vec<SequenceId>,
    previous: Option<StepPlan>,
}

impl Rig {
    fn new(max_tokens_per_step: u32) -> Self {
        let config = config(max_tokens_per_step);
        let sequences = vec![SequenceId(0); config.num_slots() as usize];
        let mut scheduler = Scheduler::new(config).expect("the limits agree");
        scheduler.begin_epoch(Epoch(1), 1 << 18);
        Self { scheduler, sequences, previous: None }
    }

    fn add(&mut self, request: SequenceRequest) {
        self.scheduler.add(request).expect("there is room");
    }

    /// One turn at depth 2. Returns the time that `schedule()` took, and the tokens planned.
    fn step(&mut self) -> (Duration, usize) {
        let start = Instant::now();
        let plan = self.scheduler.schedule().expect("there is work");
        let spent = start.elapsed();
        for admitted in &plan.admitted {
            self.sequences[admitted.slot.index()] = admitted.sequence;
        }
        let num_tokens = plan.num_tokens();
        if let Some(plan) = self.previous.replace(plan) {
            let token = |slot: SequenceSlot| SampledToken {
                slot,
                sequence: self.sequences[slot.index()],
                token: 9,
                logprobs: None,
            };
            let draws = plan.scheduled.iter().filter(|scheduled| scheduled.sample);
            let tokens = draws.map(|scheduled| token(scheduled.slot)).collect();
            let output = StepOutput { step: plan.step, tokens, prompt_logprobs: Vec::new() };
            self.scheduler.apply(output).expect("the output fits the plan");
        }
        drop(self.scheduler.take_events());
        (spent, num_tokens)
    }
}

fn report(name: &str, rig: &mut Rig) {
    let mut times = Vec::with_capacity(NUM_STEPS);
    let mut num_tokens = 0;
    for _ in 0..NUM_STEPS {
        let (spent, tokens) = rig.step();
        times.push(spent.as_secs_f64() * 1e6);
        num_tokens += tokens;
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((NUM_STEPS - 1) as f64 * share) as usize];
    let mean_tokens = num_tokens / NUM_STEPS;
    println!("| {name} | {mean_tokens} | {:.1} | {:.1} |", at(0.5), at(0.99));
}

/// 256 sequences past their prompt, and no more.
fn decoding(max_tokens_per_step: u32) -> Rig {
    let mut rig = Rig::new(max_tokens_per_step);
    for id in 0..NUM_RUNNING as u64 {
        rig.add(request(id, 64, id % 100));
    }
    while rig.step().1 != NUM_RUNNING as usize {}
    rig
}

fn main() {
    println!("| state | tokens per step | median µs | p99 µs |\n|---|---|---|---|");
    report("256 in decode", &mut decoding(512));
    let mut rig = decoding(288);
    rig.add(request(1 << 32, 100_000, 3));
    report("256 in decode, one in prefill", &mut rig);
    let mut rig = decoding(512);
    // The last slot is taken, so nobody who waits is admitted.
    rig.add(request(1 << 32, 64, 1));
    for id in 0..4096 {
        rig.add(request((1 << 33) + id, 1024, id % 100));
    }
    report("257 in decode, 4,096 of 100 tenants waiting", &mut rig);
}
