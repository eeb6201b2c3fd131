//! Shares of the machine's multiplication peak that prefill and the vision tower of the 3B shape reach.
//!
//! A few layers with random weights are timed operation by operation and summed up to the full depth, each run
//! right after the peak is measured. Attention of one token over a long context is held against the time it takes
//! to read its keys and values. Argument: `prefill`, `vision` or `context` (all without one).

mod shape;

use std::error::Error;
use std::time::{Duration, Instant};

use tessera_kernels::cpu::{CpuLimits, Path};
use tessera_kernels::{
    Act, Backend, CpuBackend, CpuFormat, DType, HostRows, KvSpec, OpTime, RopeSpec, SlotId,
    SlotSpec, StepInputs, StepLimits, Timed, TokenSource,
};
use tessera_model::{
    Decoder, ModelConfig, TpSplit, VisionItem, VisionTower, WeightSource, Weights,
};
use tessera_types::{GridThw, Rank};

use shape::{CONFIG, median};

type TimedCpu = Timed<CpuBackend>;

/// Times that the peak and a run are measured side by side.
const PAIRS: usize = 9;
/// Layers that are really there.
const LAYERS: u32 = 4;
const TEXT_LAYERS: usize = 36;
const PROMPT_TOKENS: usize = 512;
const BLOCK_SIZE: usize = 16;
/// Tokens of context of a decode step.
const CONTEXTS: [usize; 3] = [2048, 8192, 32_768];
/// Patches along each side of a 1008 × 1008 image.
const SIDE: usize = 72;
/// Layers of the tower that attend inside windows, and over the whole image.
const WINDOW_LAYERS: usize = 28;
const FULL_LAYERS: usize = 4;

/// The 3B shape with `LAYERS` layers, of the tower's the last with full attention.
fn config() -> Result<ModelConfig, Box<dyn Error>> {
    let mut config = ModelConfig::from_json("config.json".as_ref(), CONFIG)?;
    config.text.num_layers = LAYERS as usize;
    config.vision.depth = LAYERS as usize;
    config.vision.full_attention_blocks = vec![LAYERS as usize - 1];
    Ok(config)
}

/// One run and the peak before it, in seconds and operations per second.
struct Run {
    /// What every layer does.
    layer: f64,
    /// Attention of one layer: inside windows, over the whole image.
    window: f64,
    full: f64,
    /// All that lies outside of the layers.
    outside: f64,
    peak: f64,
}

impl Run {
    fn new(ops: &[OpTime], whole: f64, peak: f64) -> Self {
        let seconds = |chosen: &dyn Fn(&OpTime) -> bool, times: u32| {
            let ops = ops.iter().filter(|op| chosen(op));
            ops.map(|op| op.time.as_secs_f64() / f64::from(times.max(op.calls))).sum::<f64>()
        };
        let is_attention = |op: &OpTime| op.operation.starts_with("attention_varlen");
        // An operation that each layer does once.
        let layer = seconds(&|op| op.calls == LAYERS && !is_attention(op), LAYERS);
        let window = seconds(&|op| op.operation == "attention_varlen (window)", 1);
        let full = seconds(&|op| op.operation == "attention_varlen (full)", 1);
        let attention = ops.iter().filter(|op| is_attention(op)).map(|op| op.time.as_secs_f64());
        let outside = whole - f64::from(LAYERS) * layer - attention.sum::<f64>();
        Self { layer, window, full, outside, peak }
    }
}

/// Times `forward` next to the peak, `PAIRS` times after one to warm up.
fn runs(
    b: &mut TimedCpu,
    limits: &CpuLimits,
    mut forward: impl FnMut(&mut TimedCpu) -> Result<(), Box<dyn Error>>,
) -> Result<Vec<Run>, Box<dyn Error>> {
    forward(b)?;
    let (mut runs, mut all) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        b.take();
        let peak = limits.multiply_flops(Duration::from_millis(100));
        let start = Instant::now();
        forward(b)?;
        let (whole, ops) = (start.elapsed().as_secs_f64(), b.take());
        runs.push(Run::new(&ops, whole, peak));
        all.push(ops);
    }
    for (index, OpTime { operation, cols: [from, to], calls, .. }) in all[0].iter().enumerate() {
        let time = median(all.iter().map(|ops| ops[index].time.as_secs_f64()));
        let each = time * 1e3 / f64::from(*calls);
        println!("{operation:<26} {from:>6} → {to:>6} {each:>9.2} ms, {calls} times");
    }
    Ok(runs)
}

/// Multiplications and additions of the linears `[inputs, outputs]` for `rows` rows.
fn linear_flops(rows: usize, linears: &[(usize, usize)]) -> f64 {
    linears.iter().map(|(inputs, outputs)| 2.0 * (rows * inputs * outputs) as f64).sum()
}

fn report(what: &str, runs: &[Run], flops: f64, seconds: impl Fn(&Run) -> f64) {
    let time = median(runs.iter().map(&seconds));
    let limit = median(runs.iter().map(|run| flops / run.peak));
    let share = median(runs.iter().map(|run| flops / run.peak / seconds(run)));
    println!("{what:<34} {:>9.1} ms, limit {:>9.1} ms, share {share:.2}", time * 1e3, limit * 1e3);
}

fn prefill(limits: &CpuLimits, threads: usize) -> Result<(), Box<dyn Error>> {
    let config = config()?;
    let step = StepLimits {
        max_tokens: PROMPT_TOKENS as u32,
        max_sequences: 1,
        max_blocks_per_sequence: (PROMPT_TOKENS / BLOCK_SIZE) as u32,
        max_visual_rows: 1,
        num_real_tokens: 151_665,
    };
    let mut b = Timed::new(CpuBackend::new(threads, CpuFormat::Bf16)?);
    let mut weights = Weights::open(&WeightSource::Random { seed: 1 }, &config)?;
    let split = TpSplit::new(&config.text, Rank(0), 1)?;
    let decoder = Decoder::load(&mut b, &config.text, &split, &step, &mut weights)?;
    let blocks = step.max_blocks_per_sequence;
    let mut kv = b.alloc_kv(&decoder.kv_spec(BLOCK_SIZE as u32), blocks)?;
    let tokens = PROMPT_TOKENS;
    let inputs = StepInputs {
        token_source: (0..tokens).map(|at| TokenSource::Host(at as u32)).collect(),
        positions: (0..tokens as i32).map(|at| [at; 3]).collect(),
        slot_mapping: (0..tokens as i64).collect(),
        visual_row: vec![-1; tokens],
        cu_q: vec![0, tokens as u32],
        kv_len: vec![tokens as u32],
        block_tables: (0..blocks).collect(),
        block_table_stride: blocks,
        logit_rows: vec![tokens as u32 - 1],
        ..StepInputs::default()
    };
    let runs = runs(&mut b, limits, |b| {
        b.upload(&inputs)?;
        decoder.forward(b, &mut kv, tokens as u32, 1)?;
        Ok(())
    })?;
    let text = &config.text;
    let (hidden, inner, query) = (2048, text.intermediate_size, text.num_heads * text.head_dim);
    let qkv = query + 2 * text.num_kv_heads * text.head_dim;
    let linears = [(hidden, qkv), (query, hidden), (hidden, 2 * inner), (inner, hidden)];
    // Two products of head_dim per head and pair of positions that see each other.
    let attention = 2.0 * (tokens * (tokens + 1) * query) as f64;
    let layer = linear_flops(tokens, &linears) + attention;
    let head = linear_flops(1, &[(hidden, text.vocab_size)]);
    report("layer", &runs, layer, |run| run.layer);
    report("whole model, 512 tokens", &runs, TEXT_LAYERS as f64 * layer + head, |run| {
        run.outside + TEXT_LAYERS as f64 * run.layer
    });
    Ok(())
}

fn vision(limits: &CpuLimits, threads: usize) -> Result<(), Box<dyn Error>> {
    let config = config()?;
    let patches = SIDE * SIDE;
    let mut b = Timed::new(CpuBackend::new(threads, CpuFormat::Bf16)?);
    let mut weights = Weights::open(&WeightSource::Random { seed: 1 }, &config)?;
    let tower = VisionTower::load(&mut b, &config.vision, patches as u32, &mut weights)?;
    let vision = &config.vision;
    let pixels: Vec<f32> =
        (0..patches * vision.patch_len()).map(|at| (at * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let grid = GridThw { t: 1, h: SIDE as u32, w: SIDE as u32 };
    let runs = runs(&mut b, limits, |b| {
        let item = VisionItem { grid, pixel_values: &pixels };
        tower.encode(b, &[item], Instant::now() + Duration::from_secs(600))?;
        Ok(())
    })?;
    let (hidden, inner) = (vision.hidden_size, vision.intermediate_size);
    let linears = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)];
    let window = (vision.window_units() * vision.spatial_merge_size).pow(2);
    let attention = |seen: usize| 4.0 * (patches * seen * hidden) as f64;
    let [windowed, full] =
        [window, patches].map(|seen| linear_flops(patches, &linears) + attention(seen));
    let merged = hidden * vision.merge_unit();
    let outside = linear_flops(patches, &[(vision.patch_len(), hidden)])
        + linear_flops(patches / vision.merge_unit(), &[(merged, merged), (merged, 2048)]);
    report("window attention", &runs, attention(window), |run| run.window);
    report("full attention", &runs, attention(patches), |run| run.full);
    report("layer with windows", &runs, windowed, |run| run.layer + run.window);
    report("layer with full attention", &runs, full, |run| run.layer + run.full);
    report("patches, merger, host", &runs, outside, |run| run.outside);
    let whole = WINDOW_LAYERS as f64 * windowed + FULL_LAYERS as f64 * full + outside;
    report("whole tower, 5,184 patches", &runs, whole, |run| {
        let (windowed, full) = (run.layer + run.window, run.layer + run.full);
        run.outside + WINDOW_LAYERS as f64 * windowed + FULL_LAYERS as f64 * full
    });
    Ok(())
}

/// Attention of one token of one sequence over `tokens` tokens of context.
fn context(threads: usize, kv_heads: u32, tokens: usize) -> Result<(), Box<dyn Error>> {
    const CACHE_LAYERS: u32 = 8;
    let limits = CpuLimits::new(threads, CpuFormat::Bf16, Path::detect(), 256 << 20)?;
    let (dim, group) = (128, 8);
    let cols = (group + 2) * kv_heads * dim;
    let slot =
        |id, cols| SlotSpec { slot: SlotId(id), max_rows: tokens as u32, cols, dtype: DType::F32 };
    let specs = [slot(0, cols), slot(1, group * kv_heads * dim)];
    let blocks = tokens.div_ceil(BLOCK_SIZE) as u32;
    let limit = StepLimits {
        max_tokens: tokens as u32,
        max_sequences: 1,
        max_blocks_per_sequence: blocks,
        ..StepLimits::default()
    };
    let mut b = CpuBackend::new(threads, CpuFormat::Bf16)?;
    b.plan(&specs, &limit)?;
    let spec = KvSpec {
        num_layers: CACHE_LAYERS,
        num_kv_heads: kv_heads,
        head_dim: dim,
        block_size: BLOCK_SIZE as u32,
        rope: RopeSpec { theta: 1e6, sections: [16, 24, 24], yarn: None },
    };
    let mut kv = b.alloc_kv(&spec, blocks)?;
    // Blocks lie anywhere but in order.
    let block = |index: usize| (index * 7 + 3) % blocks as usize;
    let slot = |at: usize| (block(at / BLOCK_SIZE) * BLOCK_SIZE + at % BLOCK_SIZE) as i64;
    let inputs = |first: usize| StepInputs {
        token_source: vec![TokenSource::Host(0); tokens - first],
        positions: (first as i32..tokens as i32).map(|at| [at; 3]).collect(),
        slot_mapping: (first..tokens).map(slot).collect(),
        visual_row: vec![-1; tokens - first],
        cu_q: vec![0, (tokens - first) as u32],
        kv_len: vec![tokens as u32],
        block_tables: (0..blocks as usize).map(|index| block(index) as u32).collect(),
        block_table_stride: blocks,
        ..StepInputs::default()
    };
    let act = |index: usize, rows: usize| Act::of(&specs[index], rows as u32);
    let values: Vec<f32> =
        (0..tokens * cols as usize).map(|at| (at * 37 % 101) as f32 / 50.0 - 1.0).collect();
    b.upload(&inputs(0))?;
    for layer in 0..CACHE_LAYERS {
        b.upload_rows(act(0, tokens), 0, HostRows { values: &values, cols })?;
        b.rope_kv_write(act(0, tokens), &mut kv, layer)?;
    }
    b.upload(&inputs(tokens - 1))?;
    let bytes = f64::from(CACHE_LAYERS * kv_heads * dim) * (tokens * 2 * 2) as f64;
    let mut pairs = Vec::new();
    for _ in 0..PAIRS {
        let limit = bytes / limits.read_bytes_per_second();
        let start = Instant::now();
        for layer in 0..CACHE_LAYERS {
            b.attention_paged(act(0, 1), &kv, layer, act(1, 1))?;
        }
        pairs.push((start.elapsed().as_secs_f64(), limit));
    }
    let layers = f64::from(CACHE_LAYERS);
    let time = median(pairs.iter().map(|(time, _)| time * 1e3 / layers));
    let share = median(pairs.iter().map(|(time, limit)| limit / time));
    println!("1 token, {kv_heads} KV heads, {tokens:>6} tokens {time:>8.3} ms, share {share:.2}");
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let wanted = std::env::args().nth(1);
    let wants = |what: &str| wanted.as_deref().is_none_or(|wanted| wanted == what);
    let (threads, path) = (std::thread::available_parallelism()?.get(), Path::detect());
    let limits = CpuLimits::new(threads, CpuFormat::Bf16, path, 1 << 20)?;
    println!("{threads} threads, {}; medians of {PAIRS} pairs", path.name());
    if wants("prefill") {
        prefill(&limits, threads)?;
    }
    if wants("vision") {
        vision(&limits, threads)?;
    }
    if wants("context") {
        for (kv_heads, tokens) in
            [2, 1].into_iter().flat_map(|heads| CONTEXTS.map(|len| (heads, len)))
        {
            context(threads, kv_heads, tokens)?;
        }
    }
    Ok(())
}
