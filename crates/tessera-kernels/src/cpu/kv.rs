//! The paged KV cache in words of the backend's format.

use tessera_types::{BlockCopy, BlockId};

use super::attention::{check_dim, packed_tile, value_cols};
use super::memory::Buffer;
use super::products::{GROUP, MAX_HEAD_WORDS, TileRef};
use super::word::{CpuFormat, Pairs, Singles, Word, place_row};
use crate::backend::KvSpec;
use crate::error::{KernelError, Result};

/// Keys (rotated) and values of every layer. A block holds, per head, keys `[words][block_size]` and values
/// `[block_size / PER_WORD][value columns]`, a word the values of successive positions: right operands as they
/// lie, where blocks are whole groups of positions.
#[derive(Debug)]
pub struct CpuKv {
    spec: KvSpec,
    format: CpuFormat,
    num_blocks: usize,
    /// Words of one head's key.
    words: usize,
    /// Words of one head in a block: keys, values.
    head_words: (usize, usize),
    layers: Vec<LayerKv>,
}

#[derive(Debug)]
struct LayerKv {
    keys: Buffer<u32>,
    values: Buffer<u32>,
}

impl CpuKv {
    pub(super) fn new(spec: &KvSpec, format: CpuFormat, num_blocks: u32) -> Result<Self> {
        let (dim, block_size) = (spec.head_dim as usize, spec.block_size as usize);
        let per_word = match format {
            CpuFormat::Bf16 => {
                check_dim::<Pairs>(dim)?;
                Pairs::PER_WORD
            }
            CpuFormat::F32 => {
                check_dim::<Singles>(dim)?;
                Singles::PER_WORD
            }
        };
        let words = dim.div_ceil(per_word);
        let head_words = (words * block_size, block_size.div_ceil(per_word) * value_cols(dim));
        let heads = num_blocks as usize * spec.num_kv_heads as usize;
        let layer = || {
            let keys = Buffer::zeroed(heads * head_words.0)?;
            Ok(LayerKv { keys, values: Buffer::zeroed(heads * head_words.1)? })
        };
        let layers = (0..spec.num_layers).map(|_| layer()).collect::<Result<_>>()?;
        let num_blocks = num_blocks as usize;
        Ok(Self { spec: *spec, format, num_blocks, words, head_words, layers })
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
        let LayerKv { keys, values } = &mut self.layers[layer];
        let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
        for (head, (key, value)) in heads.enumerate() {
            let head = block * self.spec.num_kv_heads as usize + head;
            let mut packed = [0; MAX_HEAD_WORDS];
            W::pack(key, &mut packed[..words]);
            let keys = &mut keys[head * self.head_words.0..][..self.head_words.0];
            let column = keys[offset..].iter_mut().step_by(block_size);
            column.zip(packed).for_each(|(to, word)| *to = word);
            let row = head * self.head_words.1 + offset / W::PER_WORD * value_cols(dim);
            place_row::<W>(value, offset % W::PER_WORD, &mut values[row..row + dim]);
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

    /// Whether tiles can be read as they lie in the blocks.
    pub(super) fn has_whole_groups(&self) -> bool {
        self.block_size().is_multiple_of(GROUP)
    }

    /// Positions `first..first + count` of one head as they lie; for a cache of whole groups.
    #[inline(always)]
    pub(super) fn tile<W: Word>(
        &self,
        from: &HeadBlocks<'_>,
        first: usize,
        count: usize,
    ) -> TileRef {
        let layer = &self.layers[from.layer];
        let (block_size, value_cols) = (self.block_size(), value_cols(self.spec.head_dim as usize));
        let group = |group: usize| {
            // Groups beyond the count are not read.
            let position = first + group.min((count - 1) / GROUP) * GROUP;
            (self.head(from, position), position % block_size)
        };
        TileRef {
            keys: std::array::from_fn(|index| {
                let (head, offset) = group(index);
                layer.keys[head * self.head_words.0..][offset..self.head_words.0].as_ptr()
            }),
            key_stride: block_size,
            values: std::array::from_fn(|index| {
                let (head, offset) = group(index);
                let row = offset / W::PER_WORD * value_cols;
                layer.values[head * self.head_words.1..][row..self.head_words.1].as_ptr()
            }),
            value_stride: value_cols,
        }
    }

    /// Copies positions `first..first + count` of one head into a packed tile; for any size of blocks.
    pub(super) fn gather_tile<W: Word>(
        &self,
        from: &HeadBlocks<'_>,
        first: usize,
        count: usize,
        keys: &mut [u32],
        values: &mut [u32],
    ) -> TileRef {
        let layer = &self.layers[from.layer];
        let (block_size, dim) = (self.block_size(), self.spec.head_dim as usize);
        let value_cols = value_cols(dim);
        for at in 0..count {
            let (head, offset) = (self.head(from, first + at), (first + at) % block_size);
            let column = layer.keys[head * self.head_words.0 + offset..].iter();
            let group = &mut keys[at / GROUP * self.words * GROUP..][..self.words * GROUP];
            let places = group[at % GROUP..].iter_mut().step_by(GROUP);
            places.zip(column.step_by(block_size)).for_each(|(to, word)| *to = *word);
            let row = head * self.head_words.1 + offset / W::PER_WORD * value_cols;
            let to = &mut values[at / W::PER_WORD * value_cols..][..dim];
            for (to, word) in to.iter_mut().zip(&layer.values[row..row + dim]) {
                W::place(W::pick(*word, offset % W::PER_WORD), at % W::PER_WORD, to);
            }
        }
        packed_tile::<W>(keys, values, dim)
    }

    /// Index of the head of the block that holds a position.
    #[inline(always)]
    fn head(&self, from: &HeadBlocks<'_>, position: usize) -> usize {
        let block = from.block_table[position / self.block_size()] as usize;
        block * self.spec.num_kv_heads as usize + from.head
    }

    pub(super) fn zero(&mut self, blocks: &[BlockId]) -> Result<()> {
        for block in blocks {
            let index = self.block_index("zero_blocks", *block)?;
            let [keys, values] = self.block_words();
            for layer in &mut self.layers {
                layer.keys[index * keys..][..keys].fill(0);
                layer.values[index * values..][..values].fill(0);
            }
        }
        Ok(())
    }

    pub(super) fn copy(&mut self, copies: &[BlockCopy]) -> Result<()> {
        for copy in copies {
            let from = self.block_index("block_copies", copy.from)?;
            let to = self.block_index("block_copies", copy.to)?;
            let [keys, values] = self.block_words();
            for layer in &mut self.layers {
                layer.keys.copy_within(from * keys..(from + 1) * keys, to * keys);
                layer.values.copy_within(from * values..(from + 1) * values, to * values);
            }
        }
        Ok(())
    }

    /// Words of keys and of values in one block of one layer.
    fn block_words(&self) -> [usize; 2] {
        let (keys, values) = self.head_words;
        [keys, values].map(|words| words * self.spec.num_kv_heads as usize)
    }

    fn block_index(&self, field: &'static str, block: BlockId) -> Result<usize> {
        if block.index() < self.num_blocks {
            return Ok(block.index());
        }
        let reason = format!("block {block} lies outside of a cache of {} blocks", self.num_blocks);
        Err(KernelError::Input { field, reason })
    }
}

/// Where one head of one sequence lies.
#[derive(Clone, Copy)]
pub(super) struct HeadBlocks<'a> {
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) block_table: &'a [u32],
}
