//! A backend with slots to work in, and the loop that measures one kernel.

use std::time::{Duration, Instant};

use half::bf16;
use tessera_kernels::{
    Act, Backend, DType, HostRows, LinearPart, LinearSpec, PartLayout, SliceReader, SlotId,
    SlotSpec, StepLimits, TensorSlice, WeightError, WeightFormat,
};

use super::args::Plan;
use crate::bench::error::BenchError;
use crate::bench::limits::{LimitMeter, Pair, Paired};
use crate::bench::random::Random;
use crate::bench::work::Work;

/// Makes a fresh backend: its slots are planned once.
pub type Maker<'a, B> = &'a dyn Fn() -> tessera_kernels::Result<B>;

/// What a kernel reads should not be found in a cache: several times the largest.
pub const COLD_BYTES: usize = 256 << 20;

/// Longest that the runs between two looks at the clock may take.
const DEADLINE: Duration = Duration::from_secs(600);

/// A backend whose slots are planned.
pub struct Bed<'a, B: Backend> {
    pub b: B,
    meter: &'a LimitMeter,
    repeats: usize,
}

impl<'a, B: Backend> Bed<'a, B> {
    /// `slots` are rows and columns of slots 0, 1, …, filled with noise.
    pub fn new(
        plan: &Plan,
        meter: &'a LimitMeter,
        make: Maker<'_, B>,
        slots: &[(u32, u32)],
        limits: &StepLimits,
    ) -> Result<Self, BenchError> {
        let mut b = make()?;
        let specs = slots.iter().zip(0..).map(|(&(rows, cols), id)| spec(id, rows, cols));
        b.plan(&specs.collect::<Vec<_>>(), limits)?;
        let mut bed = Self { b, meter, repeats: plan.repeats };
        for (&(rows, cols), id) in slots.iter().zip(0..) {
            bed.fill(act(id, rows, cols))?;
        }
        Ok(bed)
    }

    /// Noise in a slot.
    fn fill(&mut self, slot: Act) -> Result<(), BenchError> {
        let mut random = Random::new(1);
        let values: Vec<f32> = (0..slot.cols).map(|_| random.uniform() as f32 - 0.5).collect();
        for row in 0..slot.rows {
            self.b.upload_rows(slot, row, HostRows { values: &values, cols: slot.cols })?;
        }
        Ok(())
    }

    /// Measures `body`, which does `work` so many times as it returns.
    pub fn measure(
        &mut self,
        work: Work,
        mut body: impl FnMut(&mut B) -> tessera_kernels::Result<usize>,
    ) -> Result<Paired, BenchError> {
        body(&mut self.b)?;
        finish(&mut self.b)?;
        let (b, meter) = (&mut self.b, self.meter);
        let mut pairs = Vec::with_capacity(self.repeats);
        for _ in 0..self.repeats {
            let (limits, seconds) = meter.around(|| {
                let started = Instant::now();
                let times = body(b)?;
                finish(b)?;
                Ok(started.elapsed().as_secs_f64() / times as f64)
            })?;
            pairs.push(Pair { seconds, limits });
        }
        Ok(Paired::of(work, &pairs))
    }
}

/// Waits until what was enqueued is computed.
fn finish<B: Backend>(b: &mut B) -> Result<(), BenchError> {
    let ticket = b.submit()?;
    b.wait(ticket, Instant::now() + DEADLINE)?;
    Ok(())
}

fn spec(slot: u32, max_rows: u32, cols: u32) -> SlotSpec {
    SlotSpec { slot: SlotId(slot), max_rows, cols, dtype: DType::F32 }
}

/// The first rows of a slot.
pub fn act(slot: u32, rows: u32, cols: u32) -> Act {
    Act::of(&spec(slot, rows, cols), rows)
}

/// A linear `[out, cols]` without bias; with two parts, gate and up.
pub fn linear(outs: &[usize], cols: usize) -> LinearSpec {
    let layout = match outs {
        [_] => PartLayout::Stacked,
        _ => PartLayout::GateUp,
    };
    LinearSpec {
        parts: outs.iter().map(|&out| LinearPart::whole("some", out, cols, false)).collect(),
        padded_cols: cols,
        layout,
        format: WeightFormat::Dense,
    }
}

/// Some weights; their values do not matter.
pub struct SomeWeights;

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
