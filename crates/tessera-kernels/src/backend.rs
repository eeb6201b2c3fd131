//! The boundary between the model and a device: about twenty fused operations over planned slots.
//!
//! A backend is owned by one rank thread and is an in-order queue. Operations only enqueue, take no
//! host data and allocate nothing; all data of a step sits in one [`StepInputs`], uploaded before the
//! step. Activations are [`Act`]: copyable handles to slots planned once. Weights and KV are opaque, so
//! packing, scales and layout are the backend's own.
//!
//! A decoder step is, in this order: [`Backend::upload`], [`Backend::upload_rows`] of visual rows (rank
//! 0), [`Backend::run`] around the model's forward pass, [`Backend::sample`] outside of it (what it
//! takes may depend on the step before), [`Backend::submit`], and later [`Backend::wait`]. Between the
//! `sample` of one step and its `wait`, the next step's upload and forward may be enqueued.

use std::time::Instant;

use tessera_collective::Communicator;
use tessera_types::{LateInputs, NumericsId, SequenceSlot};

use crate::act::{Act, ActKind, DType, SlotSpec};
use crate::error::Result;
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits,
    VisionInputs,
};
use crate::progress::Progress;
use crate::weights::{LinearSpec, NormSpec, SliceReader};

/// Kind of step, a part of the key under which a captured graph is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StepKind {
    Decode,
    Mixed,
    Vision,
}

/// Names a step's shape; equal keys run the same operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GraphKey {
    pub tokens: u32,
    pub seqs: u32,
    pub rows: u32,
    pub kind: StepKind,
}

/// What a linear computes after the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    None,
    /// Exact (erf) GELU.
    GeluErf,
    /// The result is not rounded to the activation type: logits, visual rows, the first residual.
    F32Out,
}

/// Rotary embedding of the decoder: one frequency per pair, cut into runs that follow T, H and W
/// (chunked, not interleaved).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    /// Frequencies that use the T, H and W position; sums to `head_dim / 2`.
    pub sections: [u32; 3],
    /// Frequencies stretched to contexts beyond those of the training.
    pub yarn: Option<YarnSpec>,
}

/// YaRN (Peng et al. 2023, "NTK-by-parts"), the same at every length of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnSpec {
    /// How many times longer the context is than in training.
    pub factor: f64,
    /// Longest context of the training in tokens.
    pub original_context: f64,
    /// Cosine and sine are multiplied by it.
    pub attention_factor: f64,
    /// Frequencies that turn more often than this over the original context are kept.
    pub beta_fast: f64,
    /// Those that turn less often than this are divided by `factor`; those between are blended.
    pub beta_slow: f64,
}

/// KV cache of one rank. Keys are stored rotated, so their rotation belongs to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvSpec {
    pub num_layers: u32,
    /// KV heads held by this rank.
    pub num_kv_heads: u32,
    pub head_dim: u32,
    /// Tokens per block.
    pub block_size: u32,
    pub rope: RopeSpec,
}

impl KvSpec {
    /// Bytes of one block over all layers, keys and values, with elements of `dtype`.
    pub fn block_bytes(&self, dtype: DType) -> u64 {
        let per_token = 2 * u64::from(self.num_kv_heads) * u64::from(self.head_dim);
        u64::from(self.num_layers)
            * u64::from(self.block_size)
            * per_token
            * dtype.size_bytes() as u64
    }
}

/// Heads of attention without a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    pub num_heads: u32,
    pub head_dim: u32,
}

/// Which prefix sums bound attention in the vision tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segments {
    Window,
    Full,
}

/// Which index list [`Backend::gather_rows`] follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatherRows {
    Logits,
    /// As many of [`StepInputs::score_rows`] as the result has rows, from this one on.
    Scores {
        from: u32,
    },
    InverseWindow,
}

/// What a backend can do; fixed after construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caps {
    /// Short name for logs and metrics: `reference`, `cpu`, `cuda`.
    pub name: &'static str,
    pub weight_dtypes: Vec<DType>,
    pub activation_dtype: DType,
    pub kv_dtype: DType,
    /// Tokens per KV block that the backend accepts; empty accepts any.
    pub block_sizes: Vec<u32>,
    /// Numbers of sequences, ascending, that a step which only decodes is rounded up to, so that a captured graph
    /// serves several; larger steps run as they are. Empty where nothing is captured.
    pub decode_buckets: Vec<u32>,
    /// Hash of all that may change bits, except TP degree and weights, which the model mixes in.
    pub numerics_id: NumericsId,
}

/// A device that runs the model. See the module documentation for the rules all operations share.
///
/// Quantised linears need no other operations: [`LinearSpec::format`] says how a linear is stored in the
/// checkpoint, [`Backend::Linear`] holds codes and scales as the backend likes, [`Backend::input_kind`] says
/// whether its input is to be quantised per row, and the producer of that input writes it so ([`Act::kind`]). The
/// model passes all three on and branches on none.
///
/// Shapes are local to the rank. `T` tokens, `H` hidden, `I` local intermediate, `P` patches, `R` logit
/// rows, `V/tp` local vocabulary rows, `hq`/`hkv` local query/KV heads. The residual stream is f32.
pub trait Backend: Sized + 'static {
    /// One loaded linear, with its bias.
    type Linear;
    /// One loaded RMSNorm weight, with its epsilon.
    type Norm;
    /// The paged KV cache of all layers.
    type Kv;
    /// Names a submitted step until it is waited for.
    type Ticket;

    fn caps(&self) -> &Caps;
    /// The rank's layer counter; clones may be read from any thread.
    fn progress(&self) -> Progress;

    /// Loads one linear: its parts stacked over the output axis (q|k|v, gate|up), this rank's slices
    /// read straight from `src`, padded with zeros as the spec says.
    ///
    /// # Errors
    /// What `src` reports; a format the backend does not have.
    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<Self::Linear>;
    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<Self::Norm>;
    /// Sets aside every activation slot and input buffer, once, before the first step.
    fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport>;
    /// A zeroed cache.
    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<Self::Kv>;
    /// Installed per epoch; `None` drops the old one and leaves a world of one. Drops captured graphs,
    /// unread tokens and every sequence of the sampler's table; weights stay.
    fn set_communicator(&mut self, communicator: Option<Communicator>) -> Result<()>;

    fn upload(&mut self, inputs: &StepInputs) -> Result<()>;
    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()>;
    /// Writes rows into a slot (visual rows, pixels) from row `at` on.
    fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()>;
    /// Reads a slot back after [`Backend::wait`] (embeddings, logits in tests): `[rows, cols]` f32.
    fn download(&mut self, src: Act) -> Result<Vec<f32>>;
    /// Runs `body` eagerly, captures it, or replays what was captured under `key`.
    fn run(&mut self, key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()>;
    /// Marks the end of what was enqueued for a step.
    fn submit(&mut self) -> Result<Self::Ticket>;
    /// Waits for a step. Errors of what it enqueued may appear here first;
    /// [`crate::KernelError::DeadlineExceeded`] if it has not completed by `deadline`.
    fn wait(&mut self, ticket: Self::Ticket, deadline: Instant) -> Result<Readback>;
    /// What the producer of this linear's input should write.
    fn input_kind(&self, linear: &Self::Linear) -> ActKind;
    /// Marks the end of a layer: bumps the rank's progress counter when the layer has been computed.
    fn layer_done(&mut self);

    /// x `[T, H]` f32 = embedding rows of the step's token ids; ids of other ranks give 0. Rows of media
    /// tokens are the uploaded `visual` rows on rank 0 and 0 elsewhere.
    fn embed_merge(&mut self, table: &Self::Linear, visual: Act, x: Act) -> Result<()>;
    /// residual = Σ over ranks of residual; y = rms(residual)·norm. A plain norm in a world of one.
    fn all_reduce_norm(&mut self, residual: Act, norm: &Self::Norm, y: Act) -> Result<()>;
    /// residual += Σ over ranks of x·Wᵀ + bias; y = rms(residual)·norm. Only rank 0 holds a bias.
    fn row_parallel_add_norm(
        &mut self,
        x: Act,
        linear: &Self::Linear,
        residual: Act,
        norm: &Self::Norm,
        y: Act,
    ) -> Result<()>;
    /// y = rms(x)·norm, local (vision: no reduction).
    fn rms_norm(&mut self, x: Act, norm: &Self::Norm, y: Act) -> Result<()>;
    /// y `[M, N]` = x `[M, K]`·Wᵀ + bias, then the epilogue.
    fn linear(&mut self, x: Act, linear: &Self::Linear, epilogue: Epilogue, y: Act) -> Result<()>;
    /// y `[M, I]` = silu(x·Wgᵀ + bg) ∘ (x·Wuᵀ + bu), of a linear laid out as
    /// [`crate::PartLayout::GateUp`].
    fn linear_swiglu(&mut self, x: Act, gate_up: &Self::Linear, y: Act) -> Result<()>;
    /// Rotates q and k in place by the step's M-RoPE positions (f32 tables, half-split pairs) and writes
    /// k and v through `slot_mapping`. qkv `[T, (hq + 2·hkv)·head_dim]`.
    fn rope_kv_write(&mut self, qkv: Act, kv: &mut Self::Kv, layer: u32) -> Result<()>;
    /// out `[T, hq·head_dim]`: causal attention of any mix of prefill chunks and decode rows over the
    /// paged cache, scale head_dim^−0.5. Query head j reads KV head j / (hq / hkv).
    fn attention_paged(&mut self, qkv: Act, kv: &Self::Kv, layer: u32, out: Act) -> Result<()>;
    /// Rotates q and k of `[P, 3, heads, head_dim]` by (row, col), base 10000.
    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()>;
    /// out `[P, heads·head_dim]`: full attention inside each segment of `cu_window` or `cu_full`, scale
    /// head_dim^−0.5.
    fn attention_varlen(
        &mut self,
        qkv: Act,
        heads: HeadShape,
        segments: Segments,
        out: Act,
    ) -> Result<()>;
    /// y = rows of x picked by the step's `logit_rows`, or by `inverse` after the merger.
    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()>;
    /// Zeroes the blocks that the step names, in all layers.
    fn zero_blocks(&mut self, kv: &mut Self::Kv) -> Result<()>;
    /// Copies the blocks that the step names, in order, in all layers.
    fn copy_blocks(&mut self, kv: &mut Self::Kv) -> Result<()>;
    /// Waits until every rank has come here.
    fn barrier(&mut self) -> Result<()>;

    /// A sequence takes a row of the sampler's table (penalty state is rebuilt from prompt and output).
    fn sampler_admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()>;
    /// The row is free again. Releasing a vacant row does nothing.
    fn sampler_release(&mut self, slot: SequenceSlot);
    /// Draws one token per row from logits `[R, V/tp]` f32: gather, −inf padding, edits, masks, filters,
    /// draw, log probabilities; the token becomes the slot's last sampled token on all ranks. `rows` and
    /// `late` are the same on all ranks.
    fn sample(&mut self, logits: Act, rows: &[SampleRow], late: &LateInputs) -> Result<()>;
    /// Log probabilities under the model's own distribution of what `rows` names, by row of logits
    /// `[rows ≤ 256, V/tp]` f32, gathered over ranks. They come back with the step, on rank 0.
    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()>;
}
