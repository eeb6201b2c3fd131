//! Shares of the machine's limits that the linears of the 3B shape reach on this machine: reading at
//! few rows, multiplying at many. Each kernel is measured right after its limit; medians of the shares.

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
    fn read_f32(&mut self, _: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError> {
        out.fill(0.5);
        Ok(())
    }

    fn read_bf16(&mut self, _: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError> {
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
    println!("{:>6} {:>6} {:>5} {:>9} {:>9} {:>8}", "K", "N", "rows", "kernel", "limit", "share");
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
            // Few rows are bound by reading the weights, many by multiplying.
            let reads = rows <= 16;
            let (mut kernels, mut maxima, mut shares) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..PAIRS {
                let limit = match reads {
                    true => limits.read_bytes_per_second(),
                    false => limits.multiply_flops(Duration::from_millis(50)),
                };
                let start = Instant::now();
                let times = if rows > 64 { 1 } else { COPIES };
                for linear in &linears[..times] {
                    b.linear(x, linear, Epilogue::None, y)?;
                }
                let seconds = start.elapsed().as_secs_f64() / times as f64;
                let work = if reads { 2 * k * n } else { 2 * k * n * rows };
                let rate = work as f64 / seconds;
                kernels.push(rate / 1e9);
                maxima.push(limit / 1e9);
                shares.push(rate / limit);
            }
            let [kernel, limit, share] = [kernels, maxima, shares].map(median);
            let unit = if reads { "GB/s" } else { "GFLOP/s" };
            println!("{k:>6} {n:>6} {rows:>5} {kernel:>9.1} {limit:>9.1} {share:>8.2} {unit}");
        }
    }
    Ok(())
}
