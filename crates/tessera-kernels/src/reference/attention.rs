//! Attention: over the paged cache (decoder), and inside segments (vision tower).
//!
//! A row's result depends on the row, its keys and its values alone: keys come in tiles aligned to
//! absolute positions, masked entries have probability 0 and add exactly 0, and sums run in ascending
//! position. So a prompt may be cut into chunks anywhere and the bits stay.

use candle_core::{Device, Tensor};

use super::kv::ReferenceKv;
use super::matmul::{host, matmul};
use crate::backend::HeadShape;
use crate::error::{KernelError, Result};
use crate::inputs::StepInputs;
use crate::sampling::math::exp;

/// Keys and values are padded with zeros to a multiple of this.
const KV_TILE: usize = 128;
/// Query tokens whose scores are held at once.
const QUERY_TILE: usize = 64;

/// out `[T, hq·hd]` from qkv `[T, (hq + 2·hkv)·hd]` and the cache, which holds this step's keys already.
pub(super) fn paged(
    inputs: &StepInputs,
    qkv: &[f32],
    qkv_cols: usize,
    kv: &ReferenceKv,
    layer: u32,
    out: &mut [f32],
) -> Result<()> {
    let (dim, kv_heads) = (kv.spec().head_dim as usize, kv.spec().num_kv_heads as usize);
    let query_cols = qkv_cols - 2 * kv_heads * dim;
    let group = query_cols / dim / kv_heads;
    let stride = inputs.block_table_stride as usize;
    // Tokens that pad the batch belong to no sequence.
    out.fill(0.0);
    for (sequence, kv_len) in inputs.kv_len.iter().enumerate() {
        let rows = inputs.cu_q[sequence] as usize..inputs.cu_q[sequence + 1] as usize;
        let block_table = &inputs.block_tables[sequence * stride..(sequence + 1) * stride];
        let kv_len = *kv_len as usize;
        let padded = kv_len.next_multiple_of(KV_TILE);
        for head in 0..kv_heads {
            if rows.is_empty() {
                continue;
            }
            let (keys, values) = kv.gather_head(layer, head, block_table, kv_len, padded)?;
            let keys = transposed("attention_paged", keys, padded, dim)?;
            let values = tensor("attention_paged", values, padded, dim)?;
            for first in rows.clone().step_by(QUERY_TILE) {
                let last = rows.end.min(first + QUERY_TILE);
                // Rows of the tile are (token, query head of the group), token-major.
                let head_at = |row: usize| (head * group + row % group) * dim;
                let count = (last - first) * group;
                let mut queries = Vec::with_capacity(count * dim);
                for row in 0..count {
                    let from = (first + row / group) * qkv_cols + head_at(row);
                    queries.extend_from_slice(&qkv[from..from + dim]);
                }
                let first_position = kv_len - (rows.end - first);
                let visible = |row: usize| first_position + row / group + 1;
                let result = attend("attention_paged", &queries, &keys, &values, dim, visible)?;
                for (row, result) in result.chunks_exact(dim).enumerate() {
                    let to = (first + row / group) * query_cols + head_at(row);
                    out[to..to + dim].copy_from_slice(result);
                }
            }
        }
    }
    Ok(())
}

/// out `[P, heads·hd]` from qkv `[P, 3, heads, hd]`: every row sees its whole segment.
pub(super) fn varlen(cu: &[u32], qkv: &[f32], heads: HeadShape, out: &mut [f32]) -> Result<()> {
    let operation = "attention_varlen";
    let (dim, num_heads) = (heads.head_dim as usize, heads.num_heads as usize);
    let hidden = dim * num_heads;
    for bounds in cu.windows(2) {
        let rows = bounds[0] as usize..bounds[1] as usize;
        let len = rows.len();
        for head in 0..num_heads {
            let part = |which: usize| -> Vec<f32> {
                let at = |row: usize| row * 3 * hidden + which * hidden + head * dim;
                rows.clone().flat_map(|row| &qkv[at(row)..at(row) + dim]).copied().collect()
            };
            let keys = transposed(operation, part(1), len, dim)?;
            let values = tensor(operation, part(2), len, dim)?;
            let queries = part(0);
            for (tile, queries) in queries.chunks(QUERY_TILE * dim).enumerate() {
                let result = attend(operation, queries, &keys, &values, dim, |_| len)?;
                let first = rows.start + tile * QUERY_TILE;
                for (row, result) in result.chunks_exact(dim).enumerate() {
                    let to = (first + row) * hidden + head * dim;
                    out[to..to + dim].copy_from_slice(result);
                }
            }
        }
    }
    Ok(())
}

/// softmax(q·k / √hd)·v for queries `[M, hd]`, keys `[hd, L]`, values `[L, hd]`; row i sees the first
/// `visible(i)` keys.
fn attend(
    operation: &'static str,
    queries: &[f32],
    keys: &Tensor,
    values: &Tensor,
    dim: usize,
    visible: impl Fn(usize) -> usize,
) -> Result<Vec<f32>> {
    let rows = queries.len() / dim;
    let kv_len = keys.dim(1).map_err(host(operation))?;
    let scale = (dim as f32).powf(-0.5);
    let mut scores = vec![0.0; rows * kv_len];
    matmul(operation, queries, keys, &mut scores)?;
    for (row, scores) in scores.chunks_exact_mut(kv_len).enumerate() {
        let (seen, masked) = scores.split_at_mut(visible(row));
        seen.iter_mut().for_each(|score| *score *= scale);
        softmax(seen);
        masked.fill(0.0);
    }
    let mut out = vec![0.0; rows * dim];
    matmul(operation, &scores, values, &mut out)?;
    Ok(out)
}

/// Softmax in place, the sum in f64 by ascending index.
fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = exp(*score - max));
    let sum: f64 = scores.iter().map(|score| f64::from(*score)).sum();
    scores.iter_mut().for_each(|score| *score = (f64::from(*score) / sum) as f32);
}

fn tensor(operation: &'static str, values: Vec<f32>, rows: usize, cols: usize) -> Result<Tensor> {
    Tensor::from_vec(values, (rows, cols), &Device::Cpu).map_err(host(operation))
}

/// `[cols, rows]` from rows.
fn transposed(
    operation: &'static str,
    values: Vec<f32>,
    rows: usize,
    cols: usize,
) -> Result<Tensor> {
    let tensor = tensor(operation, values, rows, cols)?;
    tensor.t().and_then(|tensor| tensor.contiguous()).map_err(host(operation))
}

/// Checks that the local heads of qkv fit the cache; returns nothing else, as shapes carry the rest.
pub(super) fn check_heads(
    operation: &'static str,
    qkv_cols: usize,
    kv: &ReferenceKv,
) -> Result<()> {
    let (dim, kv_heads) = (kv.spec().head_dim as usize, kv.spec().num_kv_heads as usize);
    let heads = qkv_cols / dim;
    let whole = heads * dim == qkv_cols
        && heads > 2 * kv_heads
        && (heads - 2 * kv_heads).is_multiple_of(kv_heads);
    if whole {
        return Ok(());
    }
    Err(KernelError::Shape {
        operation,
        what: "qkv width",
        expected: (3 * kv_heads) * dim,
        found: qkv_cols,
    })
}
