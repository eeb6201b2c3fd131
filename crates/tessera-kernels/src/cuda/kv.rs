//! The paged KV cache on the device.

use tessera_types::{BlockCopy, BlockId};

use super::device::Gpu;
use super::elements::{KvPlanes, RopeTables};
use super::memory::DeviceBuffer;
use super::{DevicePtr, NAME};
use crate::act::DType;
use crate::backend::KvSpec;
use crate::error::{KernelError, Result};
use crate::inputs::StepInputs;

/// Keys (rotated) and values: of every layer first the keys, then the values, each `[num_blocks, num_kv_heads,
/// block_size, head_dim]`, so that a head's part of a block is one run.
#[derive(Debug)]
pub struct CudaKv {
    buffer: DeviceBuffer,
    pub(super) spec: KvSpec,
    pub(super) bounds: KvBounds,
    /// Bytes of one block of keys, or of values, of one layer.
    block_bytes: u32,
    pub(super) rope: RopeTables,
}

/// What slots and blocks of a step must stay within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KvBounds {
    pub(super) block_size: u32,
    pub(super) num_blocks: u32,
}

impl CudaKv {
    /// Kernels copy blocks in units of this.
    const UNIT_BYTES: u32 = 16;

    /// # Errors
    /// No memory; blocks that kernels cannot copy.
    pub(super) fn new(gpu: &Gpu, spec: &KvSpec, num_blocks: u32, dtype: DType) -> Result<Self> {
        let block = spec.num_kv_heads * spec.block_size * spec.head_dim;
        let block_bytes = block * dtype.size_bytes() as u32;
        if !block_bytes.is_multiple_of(Self::UNIT_BYTES) {
            let what = format!("KV blocks of {block_bytes} bytes");
            return Err(KernelError::Unsupported { backend: NAME, what });
        }
        let planes = 2 * spec.num_layers as usize;
        let buffer = gpu.alloc(planes * num_blocks as usize * block_bytes as usize)?;
        let bounds = KvBounds { block_size: spec.block_size, num_blocks };
        let rope = RopeTables::new(gpu, &spec.rope, spec.head_dim)?;
        Ok(Self { buffer, spec: *spec, bounds, block_bytes, rope })
    }

    /// Keys and values of all layers, for what is done to whole blocks.
    pub(super) fn planes(&self) -> KvPlanes {
        let block_bytes = self.block_bytes;
        KvPlanes {
            base: self.buffer.ptr(),
            num_planes: 2 * self.spec.num_layers,
            plane_bytes: u64::from(self.bounds.num_blocks) * u64::from(block_bytes),
            block_bytes,
        }
    }

    /// Keys and values of one layer.
    pub(super) fn layer(&self, layer: u32) -> Result<(DevicePtr, DevicePtr)> {
        if layer >= self.spec.num_layers {
            let (expected, found) = (self.spec.num_layers as usize, layer as usize);
            return Err(KernelError::Shape { operation: "kv", what: "layer", expected, found });
        }
        let KvPlanes { base, plane_bytes, .. } = self.planes();
        let keys = base + 2 * u64::from(layer) * plane_bytes;
        Ok((keys, keys + plane_bytes))
    }

    /// Query heads of qkv `[T, (hq + 2·hkv)·head_dim]`, whose columns must fit the cache.
    pub(super) fn query_heads(&self, operation: &'static str, qkv_cols: u32) -> Result<u32> {
        let KvSpec { head_dim, num_kv_heads, .. } = self.spec;
        let heads = qkv_cols / head_dim;
        let whole = heads * head_dim == qkv_cols
            && heads > 2 * num_kv_heads
            && (heads - 2 * num_kv_heads).is_multiple_of(num_kv_heads);
        if whole {
            return Ok(heads - 2 * num_kv_heads);
        }
        let (expected, found) = ((3 * num_kv_heads * head_dim) as usize, qkv_cols as usize);
        Err(KernelError::Shape { operation, what: "qkv width", expected, found })
    }
}

impl KvBounds {
    /// Every token is written inside of the cache, or nowhere.
    pub(super) fn check_slots(self, inputs: &StepInputs) -> Result<()> {
        let slots = i64::from(self.num_blocks) * i64::from(self.block_size);
        match inputs.slot_mapping.iter().find(|slot| **slot >= slots) {
            None => Ok(()),
            Some(slot) => {
                let reason = format!("slot {slot} lies outside of a cache of {slots} tokens");
                Err(KernelError::Input { field: "slot_mapping", reason })
            }
        }
    }

    /// Every position that a sequence reads has a block of the cache.
    pub(super) fn check_tables(self, inputs: &StepInputs) -> Result<()> {
        let stride = inputs.block_table_stride as usize;
        let sequences = inputs.kv_len.iter().zip(inputs.cu_q.windows(2)).enumerate();
        for (sequence, (kv_len, bounds)) in sequences {
            if bounds[0] == bounds[1] {
                continue;
            }
            let table = &inputs.block_tables[sequence * stride..(sequence + 1) * stride];
            let needed = kv_len.div_ceil(self.block_size) as usize;
            let used = table.get(..needed);
            let fits = |used: &[u32]| used.iter().all(|block| *block < self.num_blocks);
            if !used.is_some_and(fits) {
                let reason =
                    format!("a position below {kv_len} of sequence {sequence} has no block");
                return Err(KernelError::Input { field: "block_tables", reason });
            }
        }
        Ok(())
    }

    pub(super) fn check_zeros(self, blocks: &[BlockId]) -> Result<()> {
        blocks.iter().try_for_each(|block| self.check_block("zero_blocks", *block))
    }

    pub(super) fn check_copies(self, copies: &[BlockCopy]) -> Result<()> {
        let blocks = copies.iter().flat_map(|copy| [copy.from, copy.to]);
        blocks.into_iter().try_for_each(|block| self.check_block("block_copies", block))
    }

    fn check_block(self, field: &'static str, block: BlockId) -> Result<()> {
        if block.0 < self.num_blocks {
            return Ok(());
        }
        let reason = format!("block {block} lies outside of a cache of {} blocks", self.num_blocks);
        Err(KernelError::Input { field, reason })
    }
}
