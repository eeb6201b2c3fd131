//! The paged KV cache in f32.

use tessera_types::{BlockCopy, BlockId};

use crate::backend::KvSpec;
use crate::error::{KernelError, Result};

/// Keys (rotated) and values of every layer, `[num_blocks, block_size, num_kv_heads, head_dim]` each.
#[derive(Debug)]
pub struct ReferenceKv {
    spec: KvSpec,
    num_blocks: usize,
    layers: Vec<LayerKv>,
}

#[derive(Debug)]
struct LayerKv {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl ReferenceKv {
    pub(super) fn new(spec: &KvSpec, num_blocks: u32) -> Self {
        let num_blocks = num_blocks as usize;
        let len = num_blocks * block_len(spec);
        let layer = || LayerKv { keys: vec![0.0; len], values: vec![0.0; len] };
        Self { spec: *spec, num_blocks, layers: (0..spec.num_layers).map(|_| layer()).collect() }
    }

    pub(super) fn spec(&self) -> &KvSpec {
        &self.spec
    }

    fn token_len(&self) -> usize {
        self.spec.num_kv_heads as usize * self.spec.head_dim as usize
    }

    fn layer_index(&self, layer: u32) -> Result<usize> {
        let (index, expected) = (layer as usize, self.layers.len());
        if index < expected {
            return Ok(index);
        }
        Err(KernelError::Shape { operation: "kv", what: "layer", expected, found: index })
    }

    /// Writes one token's key and value `[num_kv_heads · head_dim]` to a slot of the mapping.
    pub(super) fn write(
        &mut self,
        layer: u32,
        slot: i64,
        key: &[f32],
        value: &[f32],
    ) -> Result<()> {
        let (layer, len) = (self.layer_index(layer)?, self.token_len());
        let slots = self.num_blocks * self.spec.block_size as usize;
        let at = usize::try_from(slot).ok().filter(|at| *at < slots).ok_or_else(|| {
            let reason = format!("slot {slot} lies outside of a cache of {slots} tokens");
            KernelError::Input { field: "slot_mapping", reason }
        })?;
        self.layers[layer].keys[at * len..(at + 1) * len].copy_from_slice(key);
        self.layers[layer].values[at * len..(at + 1) * len].copy_from_slice(value);
        Ok(())
    }

    /// Collects keys and values of one head for positions 0..`kv_len` of a sequence, each
    /// `[padded, head_dim]` with zeros from `kv_len` on.
    pub(super) fn gather_head(
        &self,
        layer: u32,
        head: usize,
        block_table: &[u32],
        kv_len: usize,
        padded: usize,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let layer = &self.layers[self.layer_index(layer)?];
        let (block_size, dim) = (self.spec.block_size as usize, self.spec.head_dim as usize);
        let mut keys = vec![0.0; padded * dim];
        let mut values = vec![0.0; padded * dim];
        for position in 0..kv_len {
            let block = block_table.get(position / block_size).map(|block| *block as usize);
            let block = block.filter(|block| *block < self.num_blocks).ok_or_else(|| {
                let reason = format!("position {position} of {kv_len} has no block of the cache");
                KernelError::Input { field: "block_tables", reason }
            })?;
            let token = block * block_size + position % block_size;
            let from = token * self.token_len() + head * dim;
            keys[position * dim..][..dim].copy_from_slice(&layer.keys[from..from + dim]);
            values[position * dim..][..dim].copy_from_slice(&layer.values[from..from + dim]);
        }
        Ok((keys, values))
    }

    pub(super) fn zero(&mut self, blocks: &[BlockId]) -> Result<()> {
        for block in blocks {
            let range = self.block_range("zero_blocks", *block)?;
            for layer in &mut self.layers {
                layer.keys[range.clone()].fill(0.0);
                layer.values[range.clone()].fill(0.0);
            }
        }
        Ok(())
    }

    pub(super) fn copy(&mut self, copies: &[BlockCopy]) -> Result<()> {
        for copy in copies {
            let from = self.block_range("block_copies", copy.from)?;
            let to = self.block_range("block_copies", copy.to)?.start;
            for layer in &mut self.layers {
                layer.keys.copy_within(from.clone(), to);
                layer.values.copy_within(from.clone(), to);
            }
        }
        Ok(())
    }

    fn block_range(&self, field: &'static str, block: BlockId) -> Result<std::ops::Range<usize>> {
        if block.index() >= self.num_blocks {
            let reason =
                format!("block {block} lies outside of a cache of {} blocks", self.num_blocks);
            return Err(KernelError::Input { field, reason });
        }
        let len = block_len(&self.spec);
        Ok(block.index() * len..(block.index() + 1) * len)
    }
}

/// Elements of one block of one layer, keys or values.
fn block_len(spec: &KvSpec) -> usize {
    spec.block_size as usize * spec.num_kv_heads as usize * spec.head_dim as usize
}
