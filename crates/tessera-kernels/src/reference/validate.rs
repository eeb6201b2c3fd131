//! Checks of what the host uploads, so that operations may index without care.

use crate::error::{KernelError, Result};
use crate::inputs::{StepInputs, StepLimits, VisionInputs};

/// Bytes of the largest step's inputs.
pub(crate) fn inputs_bytes(max: &StepLimits) -> u64 {
    // Token source 8, position 12, slot 8, visual row 4; per sequence cu_q, kv_len and a row of blocks.
    let tokens = u64::from(max.max_tokens) * 32;
    let sequences =
        u64::from(max.max_sequences) * (12 + 4 * u64::from(max.max_blocks_per_sequence));
    tokens + sequences
}

fn wrong(field: &'static str, reason: String) -> KernelError {
    KernelError::Input { field, reason }
}

fn same_len(field: &'static str, expected: usize, found: usize) -> Result<()> {
    match expected == found {
        true => Ok(()),
        false => Err(wrong(field, format!("expected {expected} entries, found {found}"))),
    }
}

fn at_most(field: &'static str, limit: u32, found: usize) -> Result<()> {
    match found <= limit as usize {
        true => Ok(()),
        false => Err(wrong(field, format!("{found} exceeds the planned {limit}"))),
    }
}

fn prefix_sums(field: &'static str, sums: &[u32]) -> Result<()> {
    let starts_at_zero = sums.first() == Some(&0);
    match starts_at_zero && sums.is_sorted() {
        true => Ok(()),
        false => Err(wrong(field, "not ascending prefix sums from 0".to_owned())),
    }
}

/// A decoder step: lengths agree, prefix sums ascend, rows and slots lie inside.
pub(crate) fn step(inputs: &StepInputs, limits: &StepLimits) -> Result<()> {
    let (tokens, sequences) = (inputs.token_source.len(), inputs.kv_len.len());
    at_most("token_source", limits.max_tokens, tokens)?;
    at_most("kv_len", limits.max_sequences, sequences)?;
    at_most(
        "block_table_stride",
        limits.max_blocks_per_sequence,
        inputs.block_table_stride as usize,
    )?;
    same_len("positions", tokens, inputs.positions.len())?;
    same_len("slot_mapping", tokens, inputs.slot_mapping.len())?;
    same_len("visual_row", tokens, inputs.visual_row.len())?;
    same_len("cu_q", sequences + 1, inputs.cu_q.len())?;
    same_len(
        "block_tables",
        sequences * inputs.block_table_stride as usize,
        inputs.block_tables.len(),
    )?;
    prefix_sums("cu_q", &inputs.cu_q)?;
    for (sequence, bounds) in inputs.cu_q.windows(2).enumerate() {
        if bounds[1] - bounds[0] > inputs.kv_len[sequence] {
            let (queries, kv_len) = (bounds[1] - bounds[0], inputs.kv_len[sequence]);
            let reason =
                format!("sequence {sequence} computes {queries} tokens but ends at {kv_len}");
            return Err(wrong("kv_len", reason));
        }
    }
    let last = inputs.cu_q.last().copied().unwrap_or(0) as usize;
    if last > tokens {
        return Err(wrong("cu_q", format!("ends at {last} of {tokens} tokens")));
    }
    for (field, rows) in [("logit_rows", &inputs.logit_rows), ("score_rows", &inputs.score_rows)] {
        if let Some(row) = rows.iter().find(|row| **row as usize >= tokens) {
            return Err(wrong(field, format!("row {row} of {tokens} tokens")));
        }
    }
    Ok(())
}

/// `rows` of the rows to be scored, from number `from` on.
pub(crate) fn score_tile(inputs: &StepInputs, from: u32, rows: u32) -> Result<&[u32]> {
    let (from, rows, len) = (from as usize, rows as usize, inputs.score_rows.len());
    let tile = inputs.score_rows.get(from..from + rows);
    tile.ok_or_else(|| wrong("score_rows", format!("{from} + {rows} of {len} rows")))
}

/// A vision step: segments cover all patches, and `inverse` names merged rows.
pub(crate) fn vision(inputs: &VisionInputs, limits: &StepLimits) -> Result<()> {
    let patches = inputs.row_col.len();
    at_most("row_col", limits.max_tokens, patches)?;
    at_most("inverse", limits.max_visual_rows, inputs.inverse.len())?;
    for (field, sums) in [("cu_window", &inputs.cu_window), ("cu_full", &inputs.cu_full)] {
        prefix_sums(field, sums)?;
        same_len(field, patches, sums.last().copied().unwrap_or(0) as usize)?;
    }
    let merged = inputs.inverse.len();
    match inputs.inverse.iter().find(|row| **row as usize >= merged) {
        Some(row) => Err(wrong("inverse", format!("row {row} of {merged}"))),
        None => Ok(()),
    }
}
