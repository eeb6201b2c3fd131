//! Attention of the vision tower: patches of one image, in windows and all with all.

use tessera_kernels::{Backend, HeadShape, Segments, StepLimits};
use tessera_model::window_order;

use super::args::Plan;
use super::bed::{Bed, Maker, act};
use super::report::{Report, Row};
use crate::bench::error::BenchError;
use crate::bench::limits::LimitMeter;
use crate::bench::work::{Work, pairs_within};

pub fn run<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let config = &plan.shape.config.vision;
    let grid = plan.image.grid(config);
    let inputs = window_order(&[grid], config).inputs;
    let (patches, hidden) = (inputs.row_col.len() as u32, config.hidden_size as u32);
    let limits = StepLimits {
        max_tokens: patches,
        max_visual_rows: inputs.inverse.len() as u32,
        ..StepLimits::default()
    };
    let slots = [(patches, 3 * hidden), (patches, hidden)];
    let mut bed = Bed::new(plan, meter, make, &slots, &limits)?;
    bed.b.upload_vision(&inputs)?;
    let heads =
        HeadShape { num_heads: config.num_heads as u32, head_dim: config.head_dim() as u32 };
    let (qkv, out) = (act(0, patches, 3 * hidden), act(1, patches, hidden));
    let kinds = [
        ("window attention", Segments::Window, &inputs.cu_window),
        ("full attention", Segments::Full, &inputs.cu_full),
    ];
    for (kernel, segments, cu) in kinds {
        // Rows of queries, keys and values are read once, and results written.
        let bytes = 4.0 * f64::from(patches) * f64::from(4 * hidden);
        let work = Work { flops: 4.0 * f64::from(hidden) * pairs_within(cu), bytes };
        let paired = bed.measure(work, |b| {
            b.attention_varlen(qkv, heads, segments, out)?;
            Ok(1)
        })?;
        let what = format!("{}x{} pixels", plan.image.width, plan.image.height);
        report.row(Row { kernel, what, rows: patches, context: None, paired });
    }
    Ok(())
}
