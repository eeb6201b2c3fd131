//! The paged KV cache in words of the backend's format.

use tessera_types::{BlockCopy, BlockId};

use super::gemm::PANEL;
use super::memory::Buffer;
use super::word::{CpuFormat, Pairs, Singles, Word};
use crate::backend::KvSpec;
use crate::error::{KernelError, Result};

/// Positions of one tile of keys and values, aligned to absolute multiples.
pub(super) const TILE: usize = 128;

/// Keys (rotated) and values of every layer. A block holds, per head, keys `[words][block_size]`, so that a
/// tile of keys is a right operand after plain copies, and values `[block_size][words]`.
#[derive(Debug)]
pub struct CpuKv {
    spec: KvSpec,
    format: CpuFormat,
    num_blocks: usize,
    /// Words of one head's key or value.
    words: usize,
    layers: Vec<LayerKv>,
}

#[derive(Debug)]
struct LayerKv {
    keys: Buffer<u32>,
    values: Buffer<u32>,
}

impl CpuKv {
    pub(super) fn new(spec: &KvSpec, format: CpuFormat, num_blocks: u32) -> Result<Self> {
        let words = match format {
            CpuFormat::Bf16 => (spec.head_dim as usize).div_ceil(2),
            CpuFormat::F32 => spec.head_dim as usize,
        };
        let num_blocks = num_blocks as usize;
        let len = num_blocks * spec.block_size as usize * spec.num_kv_heads as usize * words;
        let layer = || Ok(LayerKv { keys: Buffer::zeroed(len)?, values: Buffer::zeroed(len)? });
        let layers = (0..spec.num_layers).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Self { spec: *spec, format, num_blocks, words, layers })
    }

    pub(super) fn spec(&self) -> &KvSpec {
        &self.spec
    }

    pub(super) fn format(&self) -> CpuFormat {
        self.format
    }

    fn block_size(&self) -> usize {
        self.spec.block_size as usize
    }

    /// Words of keys, or of values, in one block of one layer.
    fn block_words(&self) -> usize {
        self.spec.num_kv_heads as usize * self.head_words()
    }

    fn head_words(&self) -> usize {
        self.block_size() * self.words
    }

    pub(super) fn layer_index(&self, layer: u32) -> Result<usize> {
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
        match self.format {
            CpuFormat::Bf16 => self.write_words::<Pairs>(layer, slot, key, value),
            CpuFormat::F32 => self.write_words::<Singles>(layer, slot, key, value),
        }
    }

    fn write_words<W: Word>(
        &mut self,
        layer: u32,
        slot: i64,
        key: &[f32],
        value: &[f32],
    ) -> Result<()> {
        let layer = self.layer_index(layer)?;
        let (block_size, words, dim) = (self.block_size(), self.words, self.spec.head_dim as usize);
        let slots = self.num_blocks * block_size;
        let at = usize::try_from(slot).ok().filter(|at| *at < slots).ok_or_else(|| {
            let reason = format!("slot {slot} lies outside of a cache of {slots} tokens");
            KernelError::Input { field: "slot_mapping", reason }
        })?;
        let (block, offset) = (at / block_size, at % block_size);
        let (block, head_words) = (block * self.block_words(), self.head_words());
        let LayerKv { keys, values } = &mut self.layers[layer];
        let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
        for (head, (key, value)) in heads.enumerate() {
            let head = block + head * head_words;
            // The row of values serves as the place where the key is packed first.
            let row = &mut values[head + offset * words..][..words];
            W::pack(key, row);
            let column = keys[head + offset..][..head_words - offset].iter_mut();
            column.step_by(block_size).zip(&*row).for_each(|(to, word)| *to = *word);
            W::pack(value, row);
        }
        Ok(())
    }

    /// Checks that the first `kv_len` positions of a sequence lie in blocks of this cache.
    pub(super) fn check_blocks(&self, block_table: &[u32], kv_len: usize) -> Result<()> {
        let needed = kv_len.div_ceil(self.block_size());
        let known = block_table.iter().take(needed);
        let inside = known.take_while(|block| (**block as usize) < self.num_blocks).count();
        if inside == needed {
            return Ok(());
        }
        let position = inside * self.block_size();
        let reason = format!("position {position} of {kv_len} has no block of the cache");
        Err(KernelError::Input { field: "block_tables", reason })
    }

    /// Collects positions `first..first + count` of one head as right operands: keys
    /// `[TILE/32][words][32]`, values `[panels of head_dim][TILE/PER_WORD][32]`. Places beyond `count` keep
    /// what they held, but for the second half of a last pair of values, which is zero.
    #[inline(always)]
    pub(super) fn gather_tile<W: Word>(
        &self,
        from: &HeadBlocks<'_>,
        first: usize,
        count: usize,
        keys: &mut [u32],
        values: &mut [u32],
    ) {
        let layer = &self.layers[from.layer];
        let (block_size, words) = (self.block_size(), self.words);
        let head = |position: usize| {
            let block = from.block_table[position / block_size] as usize;
            block * self.block_words() + from.head * self.head_words()
        };
        let mut at = 0;
        while at < count {
            let (position, lane) = (first + at, at % PANEL);
            let offset = position % block_size;
            let run = (block_size - offset).min(PANEL - lane).min(count - at);
            let block = &layer.keys[head(position)..][..self.head_words()];
            let panel = &mut keys[at / PANEL * words * PANEL..][..words * PANEL];
            let rows = panel.chunks_exact_mut(PANEL).zip(block.chunks_exact(block_size));
            match run {
                // The usual block: a run is one cache line.
                16 => rows.for_each(|(to, from)| {
                    to[lane..lane + 16].copy_from_slice(&from[offset..offset + 16]);
                }),
                run => rows.for_each(|(to, from)| {
                    to[lane..lane + run].copy_from_slice(&from[offset..offset + run]);
                }),
            }
            at += run;
        }
        let row = |at: usize| {
            let start = head(first + at) + (first + at) % block_size * words;
            &layer.values[start..start + words]
        };
        for (pair, at) in (0..count).step_by(W::PER_WORD).enumerate() {
            let second = (at + 1 < count && W::PER_WORD == 2).then(|| row(at + 1));
            value_row::<W>(row(at), second, pair, values);
        }
    }

    pub(super) fn zero(&mut self, blocks: &[BlockId]) -> Result<()> {
        for block in blocks {
            let range = self.block_range("zero_blocks", *block)?;
            for layer in &mut self.layers {
                layer.keys[range.clone()].fill(0);
                layer.values[range.clone()].fill(0);
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
        let len = self.block_words();
        Ok(block.index() * len..(block.index() + 1) * len)
    }
}

/// Where one head of one sequence lies.
#[derive(Clone, Copy)]
pub(super) struct HeadBlocks<'a> {
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) block_table: &'a [u32],
}

/// Puts one row of words along K (one value row, or two) into the tile's panels of values.
#[inline(always)]
pub(super) fn value_row<W: Word>(
    first: &[u32],
    second: Option<&[u32]>,
    row: usize,
    tile: &mut [u32],
) {
    let (panel_words, step) = (TILE / W::PER_WORD * PANEL, PANEL / W::PER_WORD);
    for (panel, words) in first.chunks(step).enumerate() {
        let second = second.map(|second| &second[panel * step..][..words.len()]);
        let to = &mut tile[panel * panel_words + row * PANEL..][..PANEL];
        W::interleave(words, second, &mut to[..words.len() * W::PER_WORD]);
    }
}
