//! Whole decode steps of the 3B shape on the CPU backend, through the model's own code, against what the
//! machine allows: reading every weight once, or making the products, whichever takes longer. The limits are
//! measured before and after each step. Weights are random.
//!
//! Arguments: layers (36), tensor-parallel degree (1), batch sizes (1,4,8,16). With a degree above 1 each rank
//! has an equal share of the threads, and every step is paired with one of a single rank with all of them.

mod rank;
#[path = "../shape/mod.rs"]
mod shape;

use std::path::Path;
use std::time::Duration;

use tessera_kernels::cpu::{self, CpuLimits};
use tessera_kernels::{CpuFormat, OpTime};
use tessera_model::{ModelConfig, TextConfig};
use tessera_types::SamplingParams;

use rank::{Failure, Group, Setup};
use shape::{CONFIG, median};

/// Steps of each batch size that count.
const PAIRS: usize = 9;
const CONTEXT: u32 = 256;
const LIMIT_BYTES: usize = 256 << 20;

/// Weights that every token is multiplied by.
fn num_weights(text: &TextConfig) -> f64 {
    let heads = text.num_heads + 2 * text.num_kv_heads;
    let attention = text.hidden_size * text.head_dim * (heads + text.num_heads);
    let layer = attention + 3 * text.hidden_size * text.intermediate_size;
    (text.num_layers * layer + text.vocab_size * text.hidden_size) as f64
}

/// Seconds that a step of `batch` sequences needs at least.
fn limit(machine: &CpuLimits, weights: f64, batch: u32) -> [f64; 2] {
    let reading = 2.0 * weights / machine.read_bytes_per_second();
    let peak = machine.multiply_flops(Duration::from_millis(30));
    [reading, 2.0 * weights * f64::from(batch) / peak]
}

fn print_operations(steps: &[Vec<OpTime>], step_seconds: f64) {
    let mut rest = step_seconds;
    for (i, op) in steps[0].iter().enumerate() {
        let seconds = median(steps.iter().map(|step| step[i].time.as_secs_f64()));
        rest -= seconds;
        if seconds > step_seconds * 1e-4 {
            let (share, [input, output]) = (seconds / step_seconds * 100.0, op.cols);
            println!(
                "    {:<22} {input:>6} -> {output:<6} x{:<3} {:>8.2} ms {share:>5.1} %",
                op.operation,
                op.calls,
                seconds * 1e3
            );
        }
    }
    println!("    {:<43} {:>8.2} ms", "between operations", rest * 1e3);
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |otherwise: u32| match arguments.next() {
        Some(argument) => argument.parse::<u32>(),
        None => Ok(otherwise),
    };
    let (layers, degree) = (number(36)?, number(1)?);
    let batches = arguments.next().unwrap_or_else(|| "1,4,8,16".to_owned());
    let batches = batches.split(',').map(str::parse).collect::<Result<Vec<u32>, _>>()?;

    let mut config = ModelConfig::from_json(Path::new("config.json"), CONFIG)?;
    config.text.num_layers = layers as usize;
    let weights = num_weights(&config.text);
    let threads = std::thread::available_parallelism()?.get();
    let (format, path) = (CpuFormat::Bf16, cpu::Path::detect());
    let machine = CpuLimits::new(threads, format, path, LIMIT_BYTES)?;
    let setup = |degree: u32| Setup {
        config: config.clone(),
        threads_per_rank: threads / degree as usize,
        max_batch: batches.iter().copied().max().unwrap_or(1),
        context: CONTEXT,
        params: SamplingParams { repetition_penalty: 1.05, ..SamplingParams::default() },
    };
    let group = Group::start(degree, &setup(degree))?;
    let single = (degree > 1).then(|| Group::start(1, &setup(1))).transpose()?;
    println!(
        "{layers} layers and head, {:.2} GB of weights, TP {degree}, {threads} threads, {}, context \
         {CONTEXT}; medians of {PAIRS} steps",
        2e-9 * weights,
        path.name()
    );
    for &batch in &batches {
        group.step(batch)?;
        let (mut times, mut shares, mut versus) = (Vec::new(), Vec::new(), Vec::new());
        let (mut operations, mut limits) = (Vec::new(), Vec::new());
        let mut before = limit(&machine, weights, batch);
        for _ in 0..PAIRS {
            let (time, ops) = group.step(batch)?;
            let after = limit(&machine, weights, batch);
            let [reading, products] = [0, 1].map(|i| (before[i] + after[i]) / 2.0);
            before = after;
            let (time, limit) = (time.as_secs_f64(), reading.max(products));
            if let Some(single) = &single {
                versus.push(single.step(batch)?.0.as_secs_f64() / time);
            }
            operations.push(ops);
            limits.push(limit);
            times.push(time);
            shares.push(limit / time);
        }
        let [time, limit, share] = [times, limits, shares].map(median);
        println!(
            "batch {batch}: step {:.1} ms, limit {:.1} ms, share {share:.2}, {:.1} tokens/s",
            time * 1e3,
            limit * 1e3,
            f64::from(batch) / time
        );
        if single.is_some() {
            println!("    {:.2} times as fast as one rank with all threads", median(versus));
        }
        print_operations(&operations, time);
    }
    Ok(())
}
