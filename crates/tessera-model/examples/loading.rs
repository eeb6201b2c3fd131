//! How fast weights load: random ones of the whole 3B shape, and a checkpoint of about 2 GB from the page cache.
//! Each load is held against two limits measured right before it: reading the same file into buffers that stay
//! in the cache, and that plus being handed as much new memory by the system, which must clear it first.
//! The checkpoint lies in the temporary directory while it is measured. Argument: `checkpoint` leaves out the
//! random weights.

mod shape;

use std::borrow::Cow;
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::View;
use tessera_kernels::cpu::{self, CpuLimits};
use tessera_kernels::{CpuBackend, CpuFormat, SliceReader, StepLimits, TensorSlice};
use tessera_model::tensors::{self, TensorSpec};
use tessera_model::{
    Decoder, LoadMeter, ModelConfig, ShardJob, TpSplit, VisionTower, WeightSource, Weights,
    write_shards,
};
use tessera_types::Rank;

use shape::{CONFIG, median};

/// Times that a load and plain reading are measured side by side.
const PAIRS: usize = 5;
/// Layers of the checkpoint.
const LAYERS: usize = 10;
const READ_BYTES: usize = 1 << 20;
/// New memory that is asked for at a time, to measure how fast it comes.
const NEW_BYTES: usize = 1 << 30;
const LIMITS: StepLimits = StepLimits {
    max_tokens: 64,
    max_sequences: 4,
    max_blocks_per_sequence: 64,
    max_visual_rows: 64,
    num_real_tokens: 151_665,
};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Loads the decoder at a degree, each rank on a thread of its own with its share of the cores. Seconds and
/// bytes.
fn load(source: &WeightSource, config: &ModelConfig, tp: u32) -> Result<(f64, u64)> {
    let meter = LoadMeter::default();
    let cores = std::thread::available_parallelism()?.get();
    let start = Instant::now();
    let rank = |rank: u32| -> Result<f64> {
        let mut backend = CpuBackend::new((cores / tp as usize).max(1), CpuFormat::Bf16)?;
        let mut weights = Weights::open(source, config)?.with_meter(&meter);
        let split = TpSplit::new(&config.text, Rank(rank), tp)?;
        let decoder = Decoder::load(&mut backend, &config.text, &split, &LIMITS, &mut weights)?;
        let seconds = start.elapsed().as_secs_f64();
        drop(decoder);
        Ok(seconds)
    };
    let ends = std::thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = (0..tp).map(|index| scope.spawn(move || rank(index))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Result<Vec<_>>>()
    })?;
    Ok((ends.into_iter().fold(0.0, f64::max), meter.progress().loaded_bytes))
}

fn random(config: &ModelConfig) -> Result<()> {
    let source = WeightSource::Random { seed: 1 };
    for tp in [1, 2] {
        let runs = (0..3).map(|_| load(&source, config, tp)).collect::<Result<Vec<_>>>()?;
        let bytes = runs[0].1;
        let seconds = median(runs.into_iter().map(|(seconds, _)| seconds));
        println!(
            "random weights, 3B decoder, TP {tp}: {seconds:.2} s for {:.2} GB",
            bytes as f64 / 1e9
        );
    }
    let mut backend =
        CpuBackend::new(std::thread::available_parallelism()?.get(), CpuFormat::Bf16)?;
    let mut weights = Weights::open(&source, config)?;
    let start = Instant::now();
    VisionTower::load(&mut backend, &config.vision, 64, &mut weights)?;
    println!("random weights, vision tower: {:.2} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// A tensor that is drawn when it is written.
struct Drawn<'a> {
    weights: &'a Weights,
    spec: TensorSpec,
}

impl View for Drawn<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let TensorSpec { name, shape } = &self.spec;
        let cols = shape[1..].iter().product();
        let slice = TensorSlice { tensor: name, shape, rows: 0..shape[0], cols: 0..cols };
        let mut values = vec![bf16::ZERO; slice.len()];
        self.weights.read_bf16(&slice, &mut values).expect("random weights cannot fail");
        values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        self.spec.shape.iter().product::<usize>() * size_of::<bf16>()
    }
}

/// Bytes per second of reading a file on all cores, into buffers that stay in the cache.
fn read_plainly(path: &Path) -> Result<f64> {
    let file = File::open(path)?;
    let (len, next) = (file.metadata()?.len(), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let mut buffer = vec![0; READ_BYTES];
                loop {
                    let at = next.fetch_add(READ_BYTES as u64, Ordering::Relaxed);
                    if at >= len || file.read_at(&mut buffer, at).is_err() {
                        return;
                    }
                    std::hint::black_box(&buffer);
                }
            });
        }
    });
    Ok(len as f64 / start.elapsed().as_secs_f64())
}

fn checkpoint() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (model, out) = (directory.path().join("model"), directory.path().join("sharded"));
    std::fs::create_dir(&model)?;
    let text =
        CONFIG.replace("\"num_hidden_layers\": 36", &format!("\"num_hidden_layers\": {LAYERS}"));
    let text = text.replace("\"depth\": 32", "\"depth\": 1").replace("[7, 15, 23, 31]", "[0]");
    std::fs::write(model.join("config.json"), &text)?;
    let config = ModelConfig::from_json(&model, &text)?;
    let file = model.join("model.safetensors");
    let weights = Weights::open(&WeightSource::Random { seed: 1 }, &config)?;
    let drawn = tensors::all(&config).into_iter();
    let drawn = drawn.map(|spec| (spec.name.clone(), Drawn { weights: &weights, spec }));
    safetensors::serialize_to_file(drawn, None, &file)?;
    let start = Instant::now();
    write_shards(&ShardJob { model: &model, tp: 2, out: &out }, &|_| {
        std::ops::ControlFlow::Continue(())
    })?;
    println!("sharding for TP 2, synced: {:.1} s", start.elapsed().as_secs_f64());
    let threads = std::thread::available_parallelism()?.get();
    let limits = CpuLimits::new(threads, CpuFormat::Bf16, cpu::Path::detect(), NEW_BYTES)?;
    let published = WeightSource::Checkpoint(model);
    let sharded = WeightSource::Checkpoint(out);
    for (what, source, tp) in
        [("published", &published, 1), ("published", &published, 2), ("pre-sharded", &sharded, 2)]
    {
        let (mut speeds, mut plain, mut fresh) = (Vec::new(), Vec::new(), Vec::new());
        let (mut of_reading, mut of_both) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            let (read, new) = (read_plainly(&file)?, limits.new_memory_bytes_per_second()?);
            let (seconds, bytes) = load(source, &config, tp)?;
            let speed = bytes as f64 / seconds;
            speeds.push(speed / 1e9);
            plain.push(read / 1e9);
            fresh.push(new / 1e9);
            of_reading.push(speed / read);
            of_both.push(speed * (1.0 / read + 1.0 / new));
        }
        println!(
            "{what}, TP {tp}: {:.2} GB/s; plain reading {:.2} GB/s, share {:.2}; new memory {:.2} GB/s, share of both {:.2}",
            median(speeds),
            median(plain),
            median(of_reading),
            median(fresh),
            median(of_both),
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let config = ModelConfig::from_json("config.json".as_ref(), CONFIG)?;
    if std::env::args().nth(1).is_none_or(|argument| argument != "checkpoint") {
        random(&config)?;
    }
    checkpoint()
}
