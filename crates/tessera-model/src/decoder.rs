//! The language model (specification §9): Qwen2 with M-RoPE, in the order of the paper. Written once
//! over a [`Backend`]; tensor parallelism changes shapes only.

use tessera_kernels::{
    Act, Backend, DType, Epilogue, GatherRows, KvSpec, MemoryReport, RopeSpec, SlotId, SlotSpec,
    StepLimits,
};

use crate::config::TextConfig;
use crate::error::Result;
use crate::specs::{LanguageSpecs, LayerSpecs};
use crate::split::TpSplit;
use crate::tensors;
use crate::weights::Weights;

/// Rows of prompt that are scored at a time: their logits are as large as the vocabulary.
const MAX_SCORED_ROWS: u32 = 256;

/// One rank's share of the language model, loaded, with its activation slots planned.
pub struct Decoder<B: Backend> {
    embed: B::Linear,
    first_norm: B::Norm,
    layers: Vec<Layer<B>>,
    /// `None` where the head is the embedding table.
    lm_head: Option<B::Linear>,
    slots: DecoderSlots,
    memory: MemoryReport,
    num_kv_heads: u32,
    head_dim: u32,
    rope: RopeSpec,
}

struct Layer<B: Backend> {
    qkv: B::Linear,
    o_proj: B::Linear,
    /// The norm between attention and MLP.
    post_attention_norm: B::Norm,
    gate_up: B::Linear,
    down: B::Linear,
    /// The norm that follows this layer: the next layer's first, or the final one.
    next_norm: B::Norm,
}

/// Activation slots of the decoder; `T` tokens, `R` logit rows.
struct DecoderSlots {
    /// `[T, hidden]` f32.
    residual: SlotSpec,
    /// `[T, hidden]` what attention and MLP read.
    hidden: SlotSpec,
    /// `[T, (hq + 2·hkv)·head_dim]`
    qkv: SlotSpec,
    /// `[T, hq·head_dim]`
    attention: SlotSpec,
    /// `[T, local intermediate]`
    inner: SlotSpec,
    /// `[visual rows, hidden]` f32, uploaded on rank 0.
    visual: SlotSpec,
    /// `[R, hidden]`
    last: SlotSpec,
    /// `[R, V/tp]` f32.
    logits: SlotSpec,
}

impl DecoderSlots {
    fn new(config: &TextConfig, split: &TpSplit, limits: &StepLimits, activation: DType) -> Self {
        let query = split.query_heads.padded * config.head_dim;
        let kv = split.kv_heads.len() * config.head_dim;
        let slot = |id, max_rows, cols: usize, dtype| SlotSpec {
            slot: SlotId(id),
            max_rows,
            cols: cols as u32,
            dtype,
        };
        let (tokens, rows) = (limits.max_tokens, limits.max_sequences);
        Self {
            residual: slot(0, tokens, config.hidden_size, DType::F32),
            hidden: slot(1, tokens, config.hidden_size, activation),
            qkv: slot(2, tokens, query + 2 * kv, activation),
            attention: slot(3, tokens, query, activation),
            inner: slot(4, tokens, split.mlp.padded, activation),
            visual: slot(5, limits.max_visual_rows, config.hidden_size, DType::F32),
            last: slot(6, rows, config.hidden_size, activation),
            logits: slot(7, rows, split.vocab.padded, DType::F32),
        }
    }

    fn all(&self) -> [SlotSpec; 8] {
        let Self { residual, hidden, qkv, attention, inner, visual, last, logits } = self;
        [*residual, *hidden, *qkv, *attention, *inner, *visual, *last, *logits]
    }
}

impl<B: Backend> Decoder<B> {
    /// Checks every tensor of the language model, loads this rank's slices and plans the slots of steps
    /// up to `limits`.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or unreadable, by file and name; a pre-sharded checkpoint of
    /// another degree; what the backend reports.
    pub fn load(
        backend: &mut B,
        config: &TextConfig,
        split: &TpSplit,
        limits: &StepLimits,
        weights: &mut Weights,
    ) -> Result<Self> {
        weights.select(split)?;
        weights.check(&tensors::language(config))?;
        let specs = LanguageSpecs::new(config, split);
        weights.announce(&specs.slices())?;
        let embed = backend.load_linear(&specs.embed, weights)?;
        let first_norm = backend.load_norm(&specs.first_norm, weights)?;
        let layers = specs.layers.iter().map(|specs| Layer::load(backend, specs, weights));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let lm_head = specs.lm_head.as_ref().map(|head| backend.load_linear(head, weights));
        let lm_head = lm_head.transpose()?;
        let slots = DecoderSlots::new(config, split, limits, backend.caps().activation_dtype);
        Ok(Self {
            embed,
            first_norm,
            layers,
            lm_head,
            memory: backend.plan(&slots.all(), limits)?,
            slots,
            num_kv_heads: split.kv_heads.len() as u32,
            head_dim: config.head_dim as u32,
            rope: config.rope(),
        })
    }

    /// What planning set aside.
    pub fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// This rank's KV cache, for [`Backend::alloc_kv`].
    pub fn kv_spec(&self, block_size: u32) -> KvSpec {
        KvSpec {
            num_layers: self.layers.len() as u32,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            block_size,
            rope: self.rope,
        }
    }

    /// Where rank 0 uploads visual rows `[max_visual_rows, hidden]`; `StepInputs::visual_row` counts in it.
    pub fn visual(&self) -> Act {
        Act::of(&self.slots.visual, self.slots.visual.max_rows)
    }

    /// Enqueues one forward pass over the uploaded step of `tokens` tokens and `rows` logit rows, and
    /// returns the logits `[rows, V/tp]` f32 of this rank.
    ///
    /// # Errors
    /// What the backend reports; a failed communicator.
    pub fn forward(
        &self,
        b: &mut B,
        kv: &mut B::Kv,
        tokens: u32,
        rows: u32,
    ) -> tessera_kernels::Result<Act> {
        let residual = Act::of(&self.slots.residual, tokens);
        let hidden = Act::of(&self.slots.hidden, tokens);
        let qkv = Act::of(&self.slots.qkv, tokens);
        let attention = Act::of(&self.slots.attention, tokens);
        let inner = Act::of(&self.slots.inner, tokens);
        b.embed_merge(&self.embed, self.visual(), residual)?;
        let mut x = hidden.of_kind(self.layer_input(b, 0));
        b.all_reduce_norm(residual, &self.first_norm, x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            b.linear(x, &layer.qkv, Epilogue::None, qkv)?;
            b.rope_kv_write(qkv, kv, index as u32)?;
            let attended = attention.of_kind(b.input_kind(&layer.o_proj));
            b.attention_paged(qkv, kv, index as u32, attended)?;
            x = hidden.of_kind(b.input_kind(&layer.gate_up));
            b.row_parallel_add_norm(
                attended,
                &layer.o_proj,
                residual,
                &layer.post_attention_norm,
                x,
            )?;
            let inner = inner.of_kind(b.input_kind(&layer.down));
            b.linear_swiglu(x, &layer.gate_up, inner)?;
            x = hidden.of_kind(self.layer_input(b, index + 1));
            b.row_parallel_add_norm(inner, &layer.down, residual, &layer.next_norm, x)?;
            b.layer_done();
        }
        self.logits(b, x, GatherRows::Logits, rows)
    }

    /// Most rows that one [`Decoder::score`] takes.
    pub fn max_scored_rows(&self) -> u32 {
        self.slots.logits.max_rows.min(MAX_SCORED_ROWS)
    }

    /// Logits `[rows, V/tp]` f32 of the step's rows to be scored, from number `from` on. They take the place
    /// of those that [`Decoder::forward`] gave, and may be had until the next step is uploaded.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn score(
        &self,
        b: &mut B,
        tokens: u32,
        from: u32,
        rows: u32,
    ) -> tessera_kernels::Result<Act> {
        let last_layer = self.layer_input(b, self.layers.len());
        let x = Act::of(&self.slots.hidden, tokens).of_kind(last_layer);
        self.logits(b, x, GatherRows::Scores { from }, rows)
    }

    /// The head over some rows of the last layer's result `x`.
    fn logits(
        &self,
        b: &mut B,
        x: Act,
        picked: GatherRows,
        rows: u32,
    ) -> tessera_kernels::Result<Act> {
        let last = Act::of(&self.slots.last, rows).of_kind(x.kind);
        let logits = Act::of(&self.slots.logits, rows);
        b.gather_rows(x, picked, last)?;
        b.linear(last, self.lm_head(), Epilogue::F32Out, logits)?;
        Ok(logits)
    }

    fn lm_head(&self) -> &B::Linear {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }

    /// What the first linear of layer `index` reads; the head's input after the last layer.
    fn layer_input(&self, b: &B, index: usize) -> tessera_kernels::ActKind {
        b.input_kind(self.layers.get(index).map_or(self.lm_head(), |layer| &layer.qkv))
    }
}

impl<B: Backend> Layer<B> {
    fn load(backend: &mut B, specs: &LayerSpecs, weights: &Weights) -> Result<Self> {
        Ok(Self {
            qkv: backend.load_linear(&specs.qkv, weights)?,
            o_proj: backend.load_linear(&specs.o_proj, weights)?,
            post_attention_norm: backend.load_norm(&specs.post_attention_norm, weights)?,
            gate_up: backend.load_linear(&specs.gate_up, weights)?,
            down: backend.load_linear(&specs.down, weights)?,
            next_norm: backend.load_norm(&specs.next_norm, weights)?,
        })
    }
}
