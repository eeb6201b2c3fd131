//! Attention over the paged KV cache, and the rotation and write that come before it.

use tessera_kernels::{Backend, KvSpec, StepInputs, StepLimits, TokenSource};
use tessera_model::TextConfig;

use super::args::Plan;
use super::bed::{Bed, COLD_BYTES, Maker, act};
use super::report::{Report, Row};
use crate::bench::error::BenchError;
use crate::bench::limits::{LimitMeter, dtype_of};
use crate::bench::work::Work;

const BLOCK_SIZE: u32 = 16;
/// Sequences that decode together.
const BATCH: u32 = 8;
/// Tokens of a prefill chunk.
const CHUNK: u32 = 512;

/// Sequences with equal contexts, each of which computes its last tokens.
#[derive(Debug, Clone, Copy)]
struct Step {
    sequences: u32,
    context: u32,
    /// Of each sequence.
    tokens: u32,
}

impl Step {
    fn blocks(self) -> u32 {
        self.context.div_ceil(BLOCK_SIZE)
    }

    fn rows(self) -> u32 {
        self.sequences * self.tokens
    }

    /// The step as the backend takes it: sequence `s` holds the blocks from `s · blocks` on.
    fn inputs(self) -> StepInputs {
        let (mut inputs, blocks) = (StepInputs::default(), self.blocks());
        inputs.block_table_stride = blocks;
        inputs.cu_q.push(0);
        for sequence in 0..self.sequences {
            let first_block = sequence * blocks;
            for position in self.context - self.tokens..self.context {
                let slot = u64::from(first_block) * u64::from(BLOCK_SIZE) + u64::from(position);
                inputs.token_source.push(TokenSource::Host(0));
                inputs.positions.push([position as i32; 3]);
                inputs.slot_mapping.push(slot as i64);
                inputs.visual_row.push(-1);
            }
            inputs.cu_q.push(inputs.token_source.len() as u32);
            inputs.kv_len.push(self.context);
            inputs.block_tables.extend(first_block..first_block + blocks);
        }
        inputs
    }

    /// Pairs of a query and a key, causal.
    fn pairs(self) -> f64 {
        let (context, tokens) = (f64::from(self.context), f64::from(self.tokens));
        let before = context - tokens;
        f64::from(self.sequences) * (tokens * before + tokens * (tokens + 1.0) / 2.0)
    }
}

/// Columns of a row of queries, keys and values, and of the queries alone.
fn columns(text: &TextConfig) -> (u32, u32) {
    let query = text.num_heads * text.head_dim;
    ((query + 2 * text.num_kv_heads * text.head_dim) as u32, query as u32)
}

fn kv_spec(text: &TextConfig, num_layers: u32) -> KvSpec {
    KvSpec {
        num_layers,
        num_kv_heads: text.num_kv_heads as u32,
        head_dim: text.head_dim as u32,
        block_size: BLOCK_SIZE,
        rope: text.rope(),
    }
}

/// A step of `full` fills the cache; both fit into the limits.
fn limits(full: Step) -> StepLimits {
    StepLimits {
        max_tokens: full.context.max(full.rows()),
        max_sequences: full.sequences,
        max_blocks_per_sequence: full.blocks(),
        max_visual_rows: 1,
        num_real_tokens: 1,
    }
}

/// Decode of a batch, and a prefill chunk, over every context.
pub fn attention<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    for &context in &plan.contexts {
        let decode = Step { sequences: BATCH, context, tokens: 1 };
        over_layers(plan, meter, make, "attention decode", decode, report)?;
        let chunk = Step { sequences: 1, context, tokens: CHUNK.min(context) };
        over_layers(plan, meter, make, "attention prefill", chunk, report)?;
    }
    Ok(())
}

/// One call per layer, over as many layers as the model has or as are needed to leave the caches behind.
fn over_layers<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    kernel: &'static str,
    step: Step,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let (text, dtype) = (&plan.shape.config.text, dtype_of(plan.device));
    let (cols, query_cols) = columns(text);
    let kv_bytes = step.sequences as usize
        * step.context as usize
        * 2
        * text.num_kv_heads
        * text.head_dim
        * dtype.size_bytes();
    let is_decode = step.tokens == 1;
    let layers = if is_decode { COLD_BYTES.div_ceil(kv_bytes).min(text.num_layers) } else { 1 };
    let limits = limits(step);
    let slots = [(limits.max_tokens, cols), (limits.max_tokens, query_cols)];
    let mut bed = Bed::new(plan, meter, make, &slots, &limits)?;
    let spec = kv_spec(text, layers as u32);
    let mut kv = bed.b.alloc_kv(&spec, step.sequences * step.blocks())?;
    // Memory that was never written is not read from memory either.
    for sequence in 0..step.sequences {
        let mut whole = Step { sequences: 1, context: step.context, tokens: step.context }.inputs();
        let shift = i64::from(sequence * step.blocks() * BLOCK_SIZE);
        whole.slot_mapping.iter_mut().for_each(|slot| *slot += shift);
        bed.b.upload(&whole)?;
        for layer in 0..layers as u32 {
            bed.b.rope_kv_write(act(0, step.context, cols), &mut kv, layer)?;
        }
    }
    bed.b.upload(&step.inputs())?;
    let (qkv, out) = (act(0, step.rows(), cols), act(1, step.rows(), query_cols));
    let work = Work { flops: 4.0 * f64::from(query_cols) * step.pairs(), bytes: kv_bytes as f64 };
    let paired = bed.measure(work, |b| {
        for layer in 0..layers as u32 {
            b.attention_paged(qkv, &kv, layer, out)?;
        }
        Ok(layers)
    })?;
    let what = format!("{} of {} heads", step.sequences, text.num_heads);
    report.row(Row { kernel, what, rows: step.rows(), context: Some(step.context), paired });
    Ok(())
}

/// Rotation of queries and keys, and the write of keys and values.
pub fn rope<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let (text, dtype) = (&plan.shape.config.text, dtype_of(plan.device));
    let (cols, query_cols) = columns(text);
    for &rows in &plan.rows {
        let step = Step { sequences: 1, context: rows, tokens: rows };
        let mut bed = Bed::new(plan, meter, make, &[(rows, cols)], &limits(step))?;
        let layers = text.num_layers as u32;
        let mut kv = bed.b.alloc_kv(&kv_spec(text, layers), step.blocks())?;
        bed.b.upload(&step.inputs())?;
        let kv_cols = cols - query_cols;
        // Rows are read, queries and keys written back, keys and values written to the cache.
        let per_row = 4 * (cols + query_cols + kv_cols / 2) + kv_cols * dtype.size_bytes() as u32;
        let work = Work { flops: 0.0, bytes: f64::from(per_row) * f64::from(rows) };
        let paired = bed.measure(work, |b| {
            for layer in 0..layers {
                b.rope_kv_write(act(0, rows, cols), &mut kv, layer)?;
            }
            Ok(layers as usize)
        })?;
        let what = format!("{cols} columns");
        report.row(Row { kernel: "rope, KV write", what, rows, context: None, paired });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_names_the_last_tokens_of_each_context() {
        let step = Step { sequences: 2, context: 20, tokens: 3 };
        let inputs = step.inputs();
        assert_eq!((inputs.cu_q, inputs.kv_len), (vec![0, 3, 6], vec![20, 20]));
        assert_eq!(inputs.block_tables, [0, 1, 2, 3]);
        assert_eq!(inputs.slot_mapping, [17, 18, 19, 32 + 17, 32 + 18, 32 + 19]);
        // 18 + 19 + 20 of each.
        assert_eq!(step.pairs(), 114.0);
    }
}
