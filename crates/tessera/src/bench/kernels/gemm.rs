//! Products with the weights of a layer and of the head.

use tessera_kernels::{Backend, DType, Epilogue, StepLimits};

use super::args::Plan;
use super::bed::{Bed, COLD_BYTES, Maker, SomeWeights, act, linear};
use super::report::{Report, Row};
use crate::bench::error::BenchError;
use crate::bench::limits::{LimitMeter, dtype_of};
use crate::bench::work::Work;

/// Rows above which a product takes so long that one copy of the weights is enough.
const FEW_ROWS: u32 = 64;

/// One linear: name, inputs, and outputs of its parts (gate and up are two).
type Linear = (&'static str, usize, Vec<usize>);

pub fn run<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    for linear in linears(plan) {
        measure(plan, meter, make, &linear, report)?;
    }
    Ok(())
}

fn linears(plan: &Plan) -> Vec<Linear> {
    let text = &plan.shape.config.text;
    let (hidden, inner) = (text.hidden_size, text.intermediate_size);
    let (query, kv) = (text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim);
    vec![
        ("qkv", hidden, vec![query + 2 * kv]),
        ("o_proj", query, vec![hidden]),
        ("gate_up", hidden, vec![inner, inner]),
        ("down", inner, vec![hidden]),
        ("lm_head", hidden, vec![text.vocab_size]),
    ]
}

fn measure<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    (name, cols, outs): &Linear,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let dtype = dtype_of(plan.device);
    let out: usize = outs.iter().sum();
    let is_swiglu = outs.len() > 1;
    let written = outs[0] as u32;
    let max_rows = plan.rows.iter().copied().max().unwrap_or(1);
    let slots = [(max_rows, *cols as u32), (max_rows, written)];
    let mut bed = Bed::new(plan, meter, make, &slots, &StepLimits::default())?;
    let weight_bytes = cols * out * dtype.size_bytes();
    let copies = COLD_BYTES.div_ceil(weight_bytes);
    let spec = linear(outs, *cols);
    let linears = (0..copies).map(|_| bed.b.load_linear(&spec, &SomeWeights));
    let linears = linears.collect::<tessera_kernels::Result<Vec<_>>>()?;
    for &rows in &plan.rows {
        let (x, y) = (act(0, rows, *cols as u32), act(1, rows, written));
        let used = if rows > FEW_ROWS { &linears[..1] } else { &linears[..] };
        let paired = bed.measure(product(*cols, out, rows, dtype), |b| {
            for linear in used {
                match is_swiglu {
                    true => b.linear_swiglu(x, linear, y)?,
                    false => b.linear(x, linear, Epilogue::None, y)?,
                }
            }
            Ok(used.len())
        })?;
        let what = format!("{cols} to {out}");
        report.row(Row { kernel: name, what, rows, context: None, paired });
    }
    Ok(())
}

fn product(cols: usize, out: usize, rows: u32, dtype: DType) -> Work {
    let weights = (cols * out) as f64;
    Work { flops: 2.0 * weights * f64::from(rows), bytes: weights * dtype.size_bytes() as f64 }
}
