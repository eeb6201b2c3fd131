//! What works on single rows: norms, and the draw of a token.

use tessera_kernels::{Backend, NormSpec, SampleRow, SamplerSequence, StepLimits};
use tessera_types::{LateInputs, SamplingParams, SequenceId, SequenceSlot};

use super::args::Plan;
use super::bed::{Bed, Maker, SomeWeights, act};
use super::report::{Report, Row};
use crate::bench::error::BenchError;
use crate::bench::limits::LimitMeter;
use crate::bench::work::Work;

/// Calls in one run; a single one is too short to time.
const CALLS: usize = 64;
/// Rows that draw a token.
const DRAWS: [u32; 3] = [1, 4, 16];

/// The norm alone, rows of the residual stream in and rows of activations out.
pub fn norm<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let text = &plan.shape.config.text;
    let cols = text.hidden_size as u32;
    let spec = NormSpec { tensor: "some".into(), size: text.hidden_size, eps: text.rms_norm_eps };
    for &rows in &plan.rows {
        let slots = [(rows, cols), (rows, cols)];
        let mut bed = Bed::new(plan, meter, make, &slots, &StepLimits::default())?;
        let norm = bed.b.load_norm(&spec, &SomeWeights)?;
        let (x, y) = (act(0, rows, cols), act(1, rows, cols));
        let work = Work { flops: 0.0, bytes: 8.0 * f64::from(rows) * f64::from(cols) };
        let paired = bed.measure(work, |b| {
            for _ in 0..CALLS {
                b.rms_norm(x, &norm, y)?;
            }
            Ok(CALLS)
        })?;
        let what = format!("{cols} columns");
        report.row(Row { kernel: "rms_norm", what, rows, context: None, paired });
    }
    Ok(())
}

/// Draws from rows of logits: greedy, and with the filters that people use.
pub fn sampling<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let greedy = SamplingParams::default();
    let filtered = SamplingParams {
        temperature: 0.7,
        top_p: 0.8,
        top_k: 20,
        repetition_penalty: 1.05,
        ..SamplingParams::default()
    };
    for rows in DRAWS {
        draw(plan, meter, make, ("sample greedy", &greedy), rows, report)?;
        draw(plan, meter, make, ("sample filtered", &filtered), rows, report)?;
    }
    Ok(())
}

fn draw<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    (kernel, params): (&'static str, &SamplingParams),
    rows: u32,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let vocab_size = plan.shape.config.text.vocab_size as u32;
    let limits = StepLimits {
        max_tokens: rows,
        max_sequences: rows,
        max_blocks_per_sequence: 1,
        max_visual_rows: 1,
        num_real_tokens: vocab_size,
    };
    let mut bed = Bed::new(plan, meter, make, &[(rows, vocab_size)], &limits)?;
    for slot in 0..rows {
        bed.b.sampler_admit(SamplerSequence {
            slot: SequenceSlot(slot),
            prompt: &[1, 2, 3],
            output: &[],
            params,
            eos_token_ids: &[],
            seed: u64::from(slot),
        })?;
    }
    let sample_row = |slot: u32| SampleRow {
        slot: SequenceSlot(slot),
        sequence: SequenceId(u64::from(slot)),
        output_index: 0,
    };
    let sample_rows: Vec<SampleRow> = (0..rows).map(sample_row).collect();
    let (logits, late) = (act(0, rows, vocab_size), LateInputs::default());
    let work = Work { flops: 0.0, bytes: 4.0 * f64::from(rows) * f64::from(vocab_size) };
    let paired = bed.measure(work, |b| {
        b.sample(logits, &sample_rows, &late)?;
        Ok(1)
    })?;
    let what = format!("{vocab_size} logits");
    report.row(Row { kernel, what, rows, context: None, paired });
    Ok(())
}
