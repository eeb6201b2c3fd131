//! Launches of the kernels in `cuda/{elements,norm,rows,rope,blocks}.cu`.
//!
//! Addresses are of the device and hold what each function says; shapes were checked by the caller. Each kernel
//! exists for runs of 16 bytes and for any size; which one runs depends on widths alone, so that a row's bits never
//! depend on the batch.

use super::DevicePtr;
use super::device::Gpu;
use super::memory::DeviceBuffer;
use super::step::StepPtrs;
use crate::act::DType;
use crate::backend::{HeadShape, RopeSpec};
use crate::error::{KernelError, Result};
use crate::reference::rope::{DecoderRope, VisionRope};

#[cfg(test)]
mod tests;

/// Threads of a block that works on elements.
const BLOCK: u32 = 256;
/// Most threads of a block.
const MAX_BLOCK: u32 = 1024;
/// Bytes of one access.
const RUN_BYTES: u32 = 16;
/// Pairs of one head that the rotary kernels hold.
const MAX_PAIRS: u32 = 128;

/// Names of a kernel: for any size and for runs of 16 bytes, by activation type.
macro_rules! names {
    ($name:literal) => {
        [
            [concat!($name, "_f32"), concat!($name, "_bf16")],
            [concat!($name, "_wide_f32"), concat!($name, "_wide_bf16")],
        ]
    };
}

/// Names of a norm: for any width, for widths up to 4 and up to 8 elements per thread.
macro_rules! norm_names {
    ($name:literal) => {
        [
            [concat!($name, "_f32"), concat!($name, "_bf16")],
            [concat!($name, "_wide_1_f32"), concat!($name, "_wide_1_bf16")],
            [concat!($name, "_wide_2_f32"), concat!($name, "_wide_2_bf16")],
        ]
    };
}

fn of_type(names: [&'static str; 2], act: DType) -> &'static str {
    match act {
        DType::F32 => names[0],
        DType::Bf16 => names[1],
    }
}

/// The kernel for rows of whole multiples of `unit` elements, and the elements that one of its threads works on.
fn by_width(names: [[&'static str; 2]; 2], act: DType, unit: u32) -> (&'static str, u32) {
    let run = RUN_BYTES / act.size_bytes() as u32;
    match unit.is_multiple_of(run) {
        true => (of_type(names[1], act), run),
        false => (of_type(names[0], act), 1),
    }
}

/// Whole warps that hold `threads` threads, at most `most`.
fn warps(threads: u32, most: u32) -> u32 {
    threads.clamp(1, most).next_multiple_of(32)
}

/// The embedding rows of one rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct EmbeddingTable {
    /// `[num_rows, hidden]` of the activation type.
    pub(super) rows: DevicePtr,
    pub(super) first_token: u32,
    pub(super) num_rows: u32,
    pub(super) hidden: u32,
}

/// x `[T, hidden]` f32 = embedding rows of the step's tokens, 0 for ids outside of the table; visual rows
/// `[.., hidden]` f32 on the leader, whose address is given there. `last_sampled`: u32 per sequence slot.
pub(super) fn embed_merge(
    gpu: &Gpu,
    act: DType,
    table: &EmbeddingTable,
    step: &StepPtrs,
    last_sampled: DevicePtr,
    visual: Option<DevicePtr>,
    x: DevicePtr,
) -> Result<()> {
    let hidden = table.hidden;
    let (name, run) = by_width(names!("embed_merge"), act, hidden);
    gpu.launch(name)
        .grid([step.num_tokens, 1, 1])
        .block([warps(hidden.div_ceil(run), BLOCK), 1, 1])
        .ptr(table.rows)
        .u32(table.first_token)
        .u32(table.num_rows)
        .ptr(step.token_source)
        .ptr(step.visual_row)
        .ptr(last_sampled)
        .ptr(visual.unwrap_or(0))
        .u32(u32::from(visual.is_some()))
        .ptr(x)
        .u32(hidden)
        .go()
}

/// Weight `[cols]` f32 and epsilon of a norm.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormArgs {
    pub(super) weight: DevicePtr,
    pub(super) eps: f32,
    pub(super) cols: u32,
}

impl NormArgs {
    /// The kernel for this width, and the threads of its block.
    fn kernel(&self, names: [[&'static str; 2]; 3], act: DType) -> (&'static str, u32) {
        let cols = self.cols;
        let (names, threads) = match cols {
            _ if !cols.is_multiple_of(4) || cols > 8 * MAX_BLOCK => (names[0], cols),
            _ if cols <= 4 * MAX_BLOCK => (names[1], cols / 4),
            _ => (names[2], cols.div_ceil(8)),
        };
        (of_type(names, act), warps(threads, MAX_BLOCK))
    }
}

/// y `[rows, cols]` = rms(x)·weight of x `[rows, cols]` f32.
pub(super) fn rms_norm(
    gpu: &Gpu,
    act: DType,
    x: DevicePtr,
    norm: &NormArgs,
    y: DevicePtr,
    rows: u32,
) -> Result<()> {
    let (name, threads) = norm.kernel(norm_names!("rms_norm"), act);
    gpu.launch(name)
        .grid([rows, 1, 1])
        .block([threads, 1, 1])
        .ptr(x)
        .ptr(norm.weight)
        .f32(norm.eps)
        .ptr(y)
        .u32(norm.cols)
        .go()
}

/// residual `[rows, cols]` f32 += partial f32; y = rms(residual)·weight.
pub(super) fn add_rms_norm(
    gpu: &Gpu,
    act: DType,
    partial: DevicePtr,
    residual: DevicePtr,
    norm: &NormArgs,
    y: DevicePtr,
    rows: u32,
) -> Result<()> {
    let (name, threads) = norm.kernel(norm_names!("add_rms_norm"), act);
    gpu.launch(name)
        .grid([rows, 1, 1])
        .block([threads, 1, 1])
        .ptr(partial)
        .ptr(residual)
        .ptr(norm.weight)
        .f32(norm.eps)
        .ptr(y)
        .u32(norm.cols)
        .go()
}

/// Launches a kernel of grid `[rows, blocks of a row]` over rows of `cols` elements.
fn over_rows(
    gpu: &Gpu,
    (name, run): (&'static str, u32),
    pointers: &[DevicePtr],
    rows: u32,
    cols: u32,
) -> Result<()> {
    let blocks = cols.div_ceil(run).div_ceil(BLOCK);
    let launch = gpu.launch(name).grid([rows, blocks, 1]).block([BLOCK, 1, 1]);
    pointers.iter().fold(launch, |launch, pointer| launch.ptr(*pointer)).u32(cols).go()
}

/// y `[rows, inner]` = silu(gate) ∘ up of gate_up `[rows, 2·inner]`, gate in the first half of each row.
pub(super) fn swiglu(
    gpu: &Gpu,
    act: DType,
    gate_up: DevicePtr,
    y: DevicePtr,
    rows: u32,
    inner: u32,
) -> Result<()> {
    over_rows(gpu, by_width(names!("swiglu"), act, inner), &[gate_up, y], rows, inner)
}

/// x `[rows, cols]` = gelu(x) in place, the exact (erf) form.
pub(super) fn gelu_erf(gpu: &Gpu, act: DType, x: DevicePtr, rows: u32, cols: u32) -> Result<()> {
    over_rows(gpu, by_width(names!("gelu_erf"), act, cols), &[x], rows, cols)
}

/// Row r of y `[rows, cols]` = row `row_list[r]` (i32) of x, both of `dtype`.
pub(super) fn gather_rows(
    gpu: &Gpu,
    dtype: DType,
    x: DevicePtr,
    row_list: DevicePtr,
    y: DevicePtr,
    rows: u32,
    cols: u32,
) -> Result<()> {
    let row_bytes = cols * dtype.size_bytes() as u32;
    let (name, unit) = match row_bytes {
        _ if row_bytes.is_multiple_of(16) => ("gather_rows_16", 16),
        _ if row_bytes.is_multiple_of(4) => ("gather_rows_4", 4),
        _ => ("gather_rows_2", 2),
    };
    let units = row_bytes / unit;
    gpu.launch(name)
        .grid([rows, 1, 1])
        .block([warps(units, BLOCK), 1, 1])
        .ptr(x)
        .ptr(row_list)
        .ptr(y)
        .u32(units)
        .go()
}

/// Frequencies of the decoder's rotary embedding on the device, and how they are used.
#[derive(Debug)]
pub(super) struct RopeTables {
    /// `[head_dim / 2]` f32.
    frequencies: DeviceBuffer,
    attention_factor: f32,
    /// Ends of the runs that follow t and h.
    sections: [u32; 2],
}

impl RopeTables {
    /// # Errors
    /// No memory; what the device reports.
    pub(super) fn new(gpu: &Gpu, spec: &RopeSpec, head_dim: u32) -> Result<Self> {
        let rope = DecoderRope::new(spec, head_dim);
        let frequencies = on_device(gpu, rope.frequencies())?;
        let [t, h, _] = spec.sections;
        Ok(Self { frequencies, attention_factor: rope.scale(), sections: [t, t + h] })
    }
}

/// Frequencies of the vision tower's rotary embedding `[head_dim / 4]` f32 on the device.
///
/// # Errors
/// No memory; what the device reports.
pub(super) fn vision_frequencies(gpu: &Gpu, heads: HeadShape) -> Result<DeviceBuffer> {
    on_device(gpu, VisionRope::new(heads).frequencies())
}

/// A few numbers that stay. It waits for the copy: for start-up only.
fn on_device(gpu: &Gpu, values: &[f32]) -> Result<DeviceBuffer> {
    let bytes = size_of_val(values);
    let buffer = gpu.alloc(bytes)?;
    let mut pinned = gpu.alloc_pinned(bytes)?;
    let (words, _) = pinned.as_mut_slice().as_chunks_mut();
    words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_ne_bytes());
    gpu.copy_to_device(&pinned, 0..bytes, buffer.ptr())?;
    gpu.synchronize()?;
    Ok(buffer)
}

fn check_pairs(operation: &'static str, head_dim: u32) -> Result<()> {
    let (what, expected) = ("head_dim", 2 * MAX_PAIRS as usize);
    match head_dim <= 2 * MAX_PAIRS {
        true => Ok(()),
        false => Err(KernelError::Shape { operation, what, expected, found: head_dim as usize }),
    }
}

/// Heads of one rank and the blocks that its keys and values go to.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeDims {
    pub(super) num_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) block_size: u32,
}

/// Rotates q and k of qkv `[T, (heads + 2·kv_heads)·head_dim]` in place and writes k and v through the slot mapping
/// to one layer's keys and values, each `[num_blocks, kv_heads, block_size, head_dim]`.
pub(super) fn rope_kv_write(
    gpu: &Gpu,
    act: DType,
    qkv: DevicePtr,
    step: &StepPtrs,
    (k_cache, v_cache): (DevicePtr, DevicePtr),
    rope: &RopeTables,
    dims: &RopeDims,
) -> Result<()> {
    check_pairs("rope_kv_write", dims.head_dim)?;
    let (name, run) = by_width(names!("rope_kv_write"), act, dims.head_dim / 2);
    let pairs = (dims.num_heads + dims.num_kv_heads) * dims.head_dim / 2;
    let runs = (pairs + dims.num_kv_heads * dims.head_dim) / run;
    gpu.launch(name)
        .grid([step.num_tokens, 1, 1])
        .block([warps(runs, BLOCK), 1, 1])
        .ptr(qkv)
        .ptr(step.positions)
        .ptr(step.slot_mapping)
        .ptr(k_cache)
        .ptr(v_cache)
        .ptr(rope.frequencies.ptr())
        .f32(rope.attention_factor)
        .u32(rope.sections[0])
        .u32(rope.sections[1])
        .u32(dims.num_heads)
        .u32(dims.num_kv_heads)
        .u32(dims.head_dim)
        .u32(dims.block_size)
        .go()
}

/// Rotates q and k of qkv `[P, 3, heads, head_dim]` in place by row_col `[P, 2]`.
pub(super) fn rope_2d(
    gpu: &Gpu,
    act: DType,
    qkv: DevicePtr,
    row_col: DevicePtr,
    frequencies: &DeviceBuffer,
    heads: HeadShape,
    patches: u32,
) -> Result<()> {
    check_pairs("rope_2d", heads.head_dim)?;
    let (name, run) = by_width(names!("rope_2d"), act, heads.head_dim / 2);
    gpu.launch(name)
        .grid([patches, 1, 1])
        .block([warps(heads.num_heads * heads.head_dim / run, BLOCK), 1, 1])
        .ptr(qkv)
        .ptr(row_col)
        .ptr(frequencies.ptr())
        .u32(heads.num_heads)
        .u32(heads.head_dim)
        .go()
}

/// All planes (keys and values of each layer) of a cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct KvPlanes {
    pub(super) base: DevicePtr,
    pub(super) num_planes: u32,
    pub(super) plane_bytes: u64,
    /// Of one block in one plane; a multiple of 16.
    pub(super) block_bytes: u32,
}

/// Zeroes the blocks listed at `blocks` (i32) in all planes; their number is read at `count` (i32) by the device.
pub(super) fn zero_blocks(
    gpu: &Gpu,
    kv: &KvPlanes,
    blocks: DevicePtr,
    count: DevicePtr,
) -> Result<()> {
    over_blocks(gpu, "zero_blocks", kv, blocks, count)
}

/// Copies blocks in all planes as the pairs (from, to) at `copies` (i32) say, in order; their number is read at
/// `count` (i32) by the device.
pub(super) fn copy_blocks(
    gpu: &Gpu,
    kv: &KvPlanes,
    copies: DevicePtr,
    count: DevicePtr,
) -> Result<()> {
    over_blocks(gpu, "copy_blocks", kv, copies, count)
}

fn over_blocks(
    gpu: &Gpu,
    name: &'static str,
    kv: &KvPlanes,
    list: DevicePtr,
    count: DevicePtr,
) -> Result<()> {
    gpu.launch(name)
        .grid([kv.block_bytes.div_ceil(RUN_BYTES * BLOCK), kv.num_planes, 1])
        .block([BLOCK, 1, 1])
        .ptr(kv.base)
        .u64(kv.plane_bytes)
        .u32(kv.block_bytes)
        .ptr(list)
        .ptr(count)
        .go()
}

/// Adds one to a u64 in mapped host memory, when what was enqueued before is done.
pub(super) fn bump_counter(gpu: &Gpu, counter: DevicePtr) -> Result<()> {
    gpu.launch("bump_counter").ptr(counter).go()
}
