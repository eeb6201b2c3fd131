//! The vision tower (specification §7): patches of several images and videos in one packed sequence.
//! Replicated on every encoder, never split: its backend has no communicator.

mod window;

use std::time::Instant;

use tessera_kernels::{
    Act, Backend, DType, Epilogue, GatherRows, GraphKey, HeadShape, HostRows, LinearSpec,
    MemoryReport, NormSpec, PartLayout, Segments, SlotId, SlotSpec, StepKind, StepLimits,
};
use tessera_types::GridThw;

use crate::config::VisionConfig;
use crate::error::{ModelError, Result};
use crate::parallel::{Module, column_parallel, replicated, row_parallel};
use crate::specs::Slice;
use crate::split::Shard;
use crate::tensors::{self, MERGER_IN, MERGER_NORM, MERGER_OUT, PATCH_EMBED};
use crate::weights::Weights;

pub use self::window::{WindowOrder, window_order};

/// Epsilon of every norm in the tower; no config field gives it.
const NORM_EPS: f64 = 1e-6;
/// The MLP is padded to a multiple of this with zeros, the width of a BF16 tile.
const MLP_UNIT: usize = 16;

/// One image or video of a batch.
#[derive(Debug, Clone, Copy)]
pub struct VisionItem<'a> {
    pub grid: GridThw,
    /// `[grid.num_patches(), channels · frames · patch²]` in the order of the specification §6: merge
    /// units in raster order, four consecutive rows each.
    pub pixel_values: &'a [f32],
}

/// The tower, loaded, with its activation slots planned.
pub struct VisionTower<B: Backend> {
    patch_embed: B::Linear,
    first_norm: B::Norm,
    blocks: Vec<Block<B>>,
    merger_in: B::Linear,
    merger_out: B::Linear,
    slots: VisionSlots,
    memory: MemoryReport,
    config: VisionConfig,
}

struct Block<B: Backend> {
    segments: Segments,
    qkv: B::Linear,
    proj: B::Linear,
    /// The norm between attention and MLP.
    norm2: B::Norm,
    gate_up: B::Linear,
    down: B::Linear,
    /// The norm that follows this block: the next block's first, or the merger's.
    next_norm: B::Norm,
}

/// Activation slots of the tower; `P` patches, `M` merged rows.
struct VisionSlots {
    /// `[P, patch_len]`
    pixels: SlotSpec,
    /// `[P, hidden]` f32.
    residual: SlotSpec,
    /// `[P, hidden]`
    hidden: SlotSpec,
    /// `[P, 3·hidden]`
    qkv: SlotSpec,
    /// `[P, hidden]`
    attention: SlotSpec,
    /// `[P, padded intermediate]`
    inner: SlotSpec,
    /// `[M, merge_unit·hidden]`
    merged: SlotSpec,
    /// `[M, out_hidden]` f32, in window order.
    windowed: SlotSpec,
    /// `[M, out_hidden]` f32, in raster order.
    output: SlotSpec,
}

impl VisionSlots {
    fn new(config: &VisionConfig, max_patches: u32, activation: DType) -> Self {
        let hidden = config.hidden_size;
        let slot = |id, max_rows, cols: usize, dtype| SlotSpec {
            slot: SlotId(id),
            max_rows,
            cols: cols as u32,
            dtype,
        };
        let max_merged = max_patches / config.merge_unit() as u32;
        Self {
            pixels: slot(0, max_patches, config.patch_len(), activation),
            residual: slot(1, max_patches, hidden, DType::F32),
            hidden: slot(2, max_patches, hidden, activation),
            qkv: slot(3, max_patches, 3 * hidden, activation),
            attention: slot(4, max_patches, hidden, activation),
            inner: slot(5, max_patches, mlp_shard(config).padded, activation),
            merged: slot(6, max_merged, hidden * config.merge_unit(), activation),
            windowed: slot(7, max_merged, config.out_hidden_size, DType::F32),
            output: slot(8, max_merged, config.out_hidden_size, DType::F32),
        }
    }

    fn all(&self) -> [SlotSpec; 9] {
        let Self { pixels, residual, hidden, qkv, attention, inner, merged, windowed, output } =
            self;
        [*pixels, *residual, *hidden, *qkv, *attention, *inner, *merged, *windowed, *output]
    }
}

impl<B: Backend> VisionTower<B> {
    /// Checks every tensor of the tower, loads it and plans the slots of batches up to `max_patches`.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or unreadable, by file and name; what the backend reports.
    pub fn load(
        backend: &mut B,
        config: &VisionConfig,
        max_patches: u32,
        weights: &mut Weights,
    ) -> Result<Self> {
        let tensors = tensors::vision(config);
        weights.check(&tensors)?;
        weights.announce(&tensors.iter().map(Slice::whole).collect::<Vec<_>>())?;
        let mut patch_embed =
            replicated(&Module::new(PATCH_EMBED, config.hidden_size, config.patch_len(), false));
        patch_embed.parts[0].shape = tensors::patch_embed_shape(config).to_vec();
        let merged = config.hidden_size * config.merge_unit();
        let merger_in = replicated(&Module::new(MERGER_IN, merged, merged, true));
        let merger_out = replicated(&Module::new(MERGER_OUT, config.out_hidden_size, merged, true));
        let blocks = (0..config.depth).map(|index| Block::load(backend, config, index, weights));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let slots = VisionSlots::new(config, max_patches, backend.caps().activation_dtype);
        let max_visual_rows = max_patches / config.merge_unit() as u32;
        let limits =
            StepLimits { max_tokens: max_patches, max_visual_rows, ..StepLimits::default() };
        Ok(Self {
            patch_embed: backend.load_linear(&patch_embed, weights)?,
            first_norm: backend.load_norm(&norm(config, first_norm_of(0)), weights)?,
            blocks,
            merger_in: backend.load_linear(&merger_in, weights)?,
            merger_out: backend.load_linear(&merger_out, weights)?,
            memory: backend.plan(&slots.all(), &limits)?,
            slots,
            config: config.clone(),
        })
    }

    /// What planning set aside.
    pub fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// Largest batch in patches.
    pub fn max_patches(&self) -> u32 {
        self.slots.pixels.max_rows
    }

    /// Runs the tower over a batch of items and returns the visual rows of each,
    /// `[num_visual_tokens, out_hidden]` in raster order. A row depends on its own item alone.
    ///
    /// # Errors
    /// An item whose pixels and grid disagree, a batch beyond `max_patches`, what the backend reports.
    pub fn encode(
        &self,
        b: &mut B,
        items: &[VisionItem<'_>],
        deadline: Instant,
    ) -> Result<Vec<Vec<f32>>> {
        self.check_batch(items)?;
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let grids: Vec<GridThw> = items.iter().map(|item| item.grid).collect();
        let order = window_order(&grids, &self.config);
        let patches = order.patches.len() as u32;
        b.upload_vision(&order.inputs)?;
        let pixels = Act::of(&self.slots.pixels, patches);
        let values = self.permuted_pixels(items, &order);
        b.upload_rows(pixels, 0, HostRows { values: &values, cols: pixels.cols })?;
        let key =
            GraphKey { tokens: patches, seqs: items.len() as u32, rows: 0, kind: StepKind::Vision };
        b.run(key, &mut |b| self.forward(b, patches))?;
        let ticket = b.submit()?;
        b.wait(ticket, deadline)?;
        let rows = b.download(self.output(patches))?;
        let mut rest = rows.as_slice();
        let split = grids.iter().map(|grid| {
            let num_rows = grid.num_patches() as usize / self.config.merge_unit();
            let (item, after) = rest.split_at(num_rows * self.config.out_hidden_size);
            rest = after;
            item.to_vec()
        });
        Ok(split.collect())
    }

    /// Enqueues the tower over the uploaded patches; the rows end in [`VisionTower::output`].
    fn forward(&self, b: &mut B, patches: u32) -> tessera_kernels::Result<()> {
        let residual = Act::of(&self.slots.residual, patches);
        let hidden = Act::of(&self.slots.hidden, patches);
        let qkv = Act::of(&self.slots.qkv, patches);
        let attention = Act::of(&self.slots.attention, patches);
        let inner = Act::of(&self.slots.inner, patches);
        let heads = HeadShape {
            num_heads: self.config.num_heads as u32,
            head_dim: self.config.head_dim() as u32,
        };
        let pixels = Act::of(&self.slots.pixels, patches);
        b.linear(pixels, &self.patch_embed, Epilogue::F32Out, residual)?;
        b.rms_norm(residual, &self.first_norm, hidden)?;
        for block in &self.blocks {
            b.linear(hidden, &block.qkv, Epilogue::None, qkv)?;
            b.rope_2d(qkv, heads)?;
            b.attention_varlen(qkv, heads, block.segments, attention)?;
            b.row_parallel_add_norm(attention, &block.proj, residual, &block.norm2, hidden)?;
            b.linear_swiglu(hidden, &block.gate_up, inner)?;
            b.row_parallel_add_norm(inner, &block.down, residual, &block.next_norm, hidden)?;
            b.layer_done();
        }
        let units = hidden.merge_rows(self.config.merge_unit() as u32);
        let merged = Act::of(&self.slots.merged, units.rows);
        let windowed = Act::of(&self.slots.windowed, units.rows);
        b.linear(units, &self.merger_in, Epilogue::GeluErf, merged)?;
        b.linear(merged, &self.merger_out, Epilogue::F32Out, windowed)?;
        b.gather_rows(windowed, GatherRows::InverseWindow, self.output(patches))
    }

    fn output(&self, patches: u32) -> Act {
        Act::of(&self.slots.output, patches / self.config.merge_unit() as u32)
    }

    fn check_batch(&self, items: &[VisionItem<'_>]) -> Result<()> {
        let merge = self.config.spatial_merge_size as u32;
        for (index, item) in items.iter().enumerate() {
            let error = |reason| Err(ModelError::VisionItem { item: index, reason });
            let GridThw { t, h, w } = item.grid;
            let is_whole = h.is_multiple_of(merge) && w.is_multiple_of(merge);
            if item.grid.num_patches() == 0 || !is_whole {
                return error(format!(
                    "the grid {t}×{h}×{w} is empty or not a multiple of {merge}"
                ));
            }
            let expected = item.grid.num_patches() * self.config.patch_len() as u64;
            if item.pixel_values.len() as u64 != expected {
                let found = item.pixel_values.len();
                return error(format!("the grid needs {expected} pixel values, found {found}"));
            }
        }
        let patches: u64 = items.iter().map(|item| item.grid.num_patches()).sum();
        match patches <= u64::from(self.max_patches()) {
            true => Ok(()),
            false => Err(ModelError::VisionBatch { patches, max_patches: self.max_patches() }),
        }
    }

    /// Pixel rows of all items in window order.
    fn permuted_pixels(&self, items: &[VisionItem<'_>], order: &WindowOrder) -> Vec<f32> {
        let len = self.config.patch_len();
        let rows: Vec<&[f32]> =
            items.iter().flat_map(|item| item.pixel_values.chunks_exact(len)).collect();
        let mut permuted = Vec::with_capacity(rows.len() * len);
        order.patches.iter().for_each(|patch| permuted.extend_from_slice(rows[*patch as usize]));
        permuted
    }
}

impl<B: Backend> Block<B> {
    fn load(
        backend: &mut B,
        config: &VisionConfig,
        index: usize,
        weights: &Weights,
    ) -> Result<Self> {
        let name = tensors::block(index);
        let hidden = config.hidden_size;
        let (inner, padded) = (config.intermediate_size, mlp_shard(config));
        let module = |part: &str, out, cols| Module::new(format!("{name}.{part}"), out, cols, true);
        let gate_up = ["mlp.gate_proj", "mlp.up_proj"];
        let gate_up = gate_up.map(|part| module(part, inner, hidden).rows(&padded));
        let gate_up = column_parallel(gate_up.to_vec(), PartLayout::GateUp);
        let down: LinearSpec = row_parallel(&module("mlp.down_proj", hidden, inner), &padded, true);
        let next_norm = match index + 1 == config.depth {
            true => MERGER_NORM.to_owned(),
            false => first_norm_of(index + 1),
        };
        Ok(Self {
            segments: match config.full_attention_blocks.contains(&index) {
                true => Segments::Full,
                false => Segments::Window,
            },
            qkv: backend
                .load_linear(&replicated(&module("attn.qkv", 3 * hidden, hidden)), weights)?,
            proj: backend
                .load_linear(&replicated(&module("attn.proj", hidden, hidden)), weights)?,
            norm2: backend.load_norm(&norm(config, format!("{name}.norm2.weight")), weights)?,
            gate_up: backend.load_linear(&gate_up, weights)?,
            down: backend.load_linear(&down, weights)?,
            next_norm: backend.load_norm(&norm(config, next_norm), weights)?,
        })
    }
}

fn mlp_shard(config: &VisionConfig) -> Shard {
    Shard::of_units(config.intermediate_size, MLP_UNIT, 0, 1)
}

fn first_norm_of(block: usize) -> String {
    format!("{}.norm1.weight", tensors::block(block))
}

fn norm(config: &VisionConfig, tensor: String) -> NormSpec {
    NormSpec { tensor, size: config.hidden_size, eps: NORM_EPS }
}
