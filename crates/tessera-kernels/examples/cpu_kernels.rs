//! Shares of the machine's limits that the linears of the 3B shape reach: the time it takes to read the
//! weights, or to make the products where that is more. Each kernel is measured right after its limits.

use std::error::Error;
use std::time::{Duration, Instant};

use half::bf16;
use tessera_kernels::cpu::{CpuLimits, Path};
use tessera_kernels::{
    Act, Backend, CpuBackend, CpuFormat, DType, Epilogue, HostRows, LinearPart, LinearSpec,
    PartLayout, SliceReader, SlotId, SlotSpec, StepLimits, TensorSlice, WeightError, WeightFormat,
};

/// Input and output of the two large linears of a 3B layer.
const SHAPES: [(usize, usize); 2] = [(2048, 22016), (11008, 2048)];
/// Times that a limit and a kernel are measured side by side.
const PAIRS: usize = 9;
/// Copies of a linear, so that its weights are never found in a cache.
const COPIES: usize = 6;
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 512];

/// Some weights; their values do not matter.
struct SomeWeights;

impl SliceReader for SomeWeights {
    fn read_f32(&self, _: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError> {
        out.fill(0.5);
        Ok(())
    }

    fn read_bf16(&self, _: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError> {
        out.fill(bf16::from_f32(0.5));
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn act(slot: u32, rows: usize, cols: usize) -> Act {
    let (max_rows, cols) = (rows as u32, cols as u32);
    Act::of(&SlotSpec { slot: SlotId(slot), max_rows, cols, dtype: DType::F32 }, max_rows)
}

fn main() -> Result<(), Box<dyn Error>> {
    let threads = std::thread::available_parallelism()?.get();
    let (format, path) = (CpuFormat::Bf16, Path::detect());
    let limits = CpuLimits::new(threads, format, path, 256 << 20)?;
    println!("{threads} threads, {}; medians of {PAIRS} pairs", path.name());
    println!(
        "{:>6} {:>6} {:>5} {:>9} {:>9} {:>8}",
        "K", "N", "rows", "kernel ms", "limit ms", "share"
    );
    for (k, n) in SHAPES {
        let mut b = CpuBackend::new(threads, format)?;
        let slot = |id, cols| SlotSpec { slot: SlotId(id), max_rows: 512, cols, dtype: DType::F32 };
        b.plan(&[slot(0, k as u32), slot(1, n as u32)], &StepLimits::default())?;
        let spec = LinearSpec {
            parts: vec![LinearPart::whole("some", n, k, false)],
            padded_cols: k,
            layout: PartLayout::Stacked,
            format: WeightFormat::Dense,
        };
        let load = |b: &mut CpuBackend| b.load_linear(&spec, &mut SomeWeights);
        let linears = (0..COPIES).map(|_| load(&mut b)).collect::<Result<Vec<_>, _>>()?;
        for rows in ROWS {
            let (x, y) = (act(0, rows, k), act(1, rows, n));
            let (values, cols) = (vec![0.25; x.len()], x.cols);
            b.upload_rows(x, 0, HostRows { values: &values, cols })?;
            let (mut kernels, mut limits_ms, mut shares) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..PAIRS {
                // Neither the weights come faster than they are read, nor the products than they are made.
                let reading = (2 * k * n) as f64 / limits.read_bytes_per_second();
                let peak = limits.multiply_flops(Duration::from_millis(50));
                let limit = reading.max((2 * k * n * rows) as f64 / peak);
                let start = Instant::now();
                let times = if rows > 64 { 1 } else { COPIES };
                for linear in &linears[..times] {
                    b.linear(x, linear, Epilogue::None, y)?;
                }
                let kernel = start.elapsed().as_secs_f64() / times as f64;
                kernels.push(kernel * 1e3);
                limits_ms.push(limit * 1e3);
                shares.push(limit / kernel);
            }
            let [kernel, limit, share] = [kernels, limits_ms, shares].map(median);
            println!("{k:>6} {n:>6} {rows:>5} {kernel:>9.2} {limit:>9.2} {share:>8.2}");
        }
    }
    Ok(())
}
