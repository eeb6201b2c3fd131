//! What a rank loads of the language model, as specs for the backend and as a flat list of slices. The
//! loader and the writer of pre-sharded checkpoints follow the same list.

use std::ops::Range;

use tessera_kernels::{LinearPart, LinearSpec, NormSpec, PartLayout, TensorSlice};

use crate::config::TextConfig;
use crate::parallel::{Module, column_parallel, row_parallel};
use crate::split::TpSplit;
use crate::tensors::{self, EMBED_TOKENS, FINAL_NORM, LM_HEAD, TensorSpec};

/// A rectangle of one published tensor, seen as a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    pub tensor: String,
    /// Of the whole tensor.
    pub shape: Vec<usize>,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl Slice {
    pub(crate) fn whole(spec: &TensorSpec) -> Self {
        let rows = 0..spec.shape.first().copied().unwrap_or(1);
        let cols = 0..spec.shape.iter().skip(1).product();
        Self { tensor: spec.name.clone(), shape: spec.shape.clone(), rows, cols }
    }

    pub(crate) fn view(&self) -> TensorSlice<'_> {
        TensorSlice {
            tensor: &self.tensor,
            shape: &self.shape,
            rows: self.rows.clone(),
            cols: self.cols.clone(),
        }
    }

    fn of_part(part: &LinearPart) -> impl Iterator<Item = Self> {
        let rows = part.rows.clone();
        let bias = part.bias.then(|| Self {
            tensor: part.bias_name(),
            shape: vec![part.shape[0]],
            rows: rows.clone(),
            cols: 0..1,
        });
        let weight = Self {
            tensor: part.weight_name(),
            shape: part.shape.clone(),
            rows,
            cols: part.cols.clone(),
        };
        std::iter::once(weight).chain(bias)
    }
}

/// One rank's linears and norms, in the order they are loaded.
pub(crate) struct LanguageSpecs {
    pub embed: LinearSpec,
    pub first_norm: NormSpec,
    pub layers: Vec<LayerSpecs>,
    /// `None` where the head is the embedding table.
    pub lm_head: Option<LinearSpec>,
}

/// The linears and norms of one layer.
pub(crate) struct LayerSpecs {
    pub qkv: LinearSpec,
    pub o_proj: LinearSpec,
    /// The norm between attention and MLP.
    pub post_attention_norm: NormSpec,
    pub gate_up: LinearSpec,
    pub down: LinearSpec,
    /// The norm that follows this layer: the next layer's first, or the final one.
    pub next_norm: NormSpec,
}

impl LanguageSpecs {
    pub(crate) fn new(config: &TextConfig, split: &TpSplit) -> Self {
        let vocab = |name| {
            let module = Module::new(name, config.vocab_size, config.hidden_size, false);
            column_parallel(vec![module.rows(&split.vocab)], PartLayout::Stacked)
        };
        Self {
            embed: vocab(EMBED_TOKENS),
            first_norm: norm(config, first_norm_of(0)),
            layers: (0..config.num_layers).map(|i| LayerSpecs::new(config, split, i)).collect(),
            lm_head: (!config.tie_word_embeddings).then(|| vocab(LM_HEAD)),
        }
    }

    /// Every slice once, in the order of loading.
    pub(crate) fn slices(&self) -> Vec<Slice> {
        let mut slices = Slices::default();
        slices.linear(&self.embed);
        slices.norm(&self.first_norm);
        for layer in &self.layers {
            slices.linear(&layer.qkv);
            slices.linear(&layer.o_proj);
            slices.norm(&layer.post_attention_norm);
            slices.linear(&layer.gate_up);
            slices.linear(&layer.down);
            slices.norm(&layer.next_norm);
        }
        self.lm_head.iter().for_each(|head| slices.linear(head));
        slices.0
    }
}

#[derive(Default)]
struct Slices(Vec<Slice>);

impl Slices {
    fn linear(&mut self, spec: &LinearSpec) {
        self.0.extend(spec.parts.iter().flat_map(Slice::of_part));
    }

    fn norm(&mut self, spec: &NormSpec) {
        let (tensor, shape) = (spec.tensor.clone(), vec![spec.size]);
        self.0.push(Slice { tensor, shape, rows: 0..spec.size, cols: 0..1 });
    }
}

impl LayerSpecs {
    fn new(config: &TextConfig, split: &TpSplit, index: usize) -> Self {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (query, kv) = (config.num_heads * head_dim, config.num_kv_heads * head_dim);
        let layer = tensors::layer(index);
        let module =
            |name: &str, out, cols, bias| Module::new(format!("{layer}.{name}"), out, cols, bias);
        let query_rows = split.query_heads.scaled(head_dim);
        let kv_rows = split.kv_shard().scaled(head_dim);
        let qkv = vec![
            module("self_attn.q_proj", query, hidden, true).rows(&query_rows),
            module("self_attn.k_proj", kv, hidden, true).rows(&kv_rows),
            module("self_attn.v_proj", kv, hidden, true).rows(&kv_rows),
        ];
        let inner = config.intermediate_size;
        let gate_up = ["mlp.gate_proj", "mlp.up_proj"];
        let gate_up = gate_up.map(|name| module(name, inner, hidden, false).rows(&split.mlp));
        let is_first = split.rank.0 == 0;
        let o_proj = module("self_attn.o_proj", hidden, query, false);
        let down = module("mlp.down_proj", hidden, inner, false);
        let next_norm = match index + 1 == config.num_layers {
            true => FINAL_NORM.to_owned(),
            false => first_norm_of(index + 1),
        };
        Self {
            qkv: column_parallel(qkv, PartLayout::Stacked),
            o_proj: row_parallel(&o_proj, &query_rows, is_first),
            post_attention_norm: norm(config, format!("{layer}.post_attention_layernorm.weight")),
            gate_up: column_parallel(gate_up.to_vec(), PartLayout::GateUp),
            down: row_parallel(&down, &split.mlp, is_first),
            next_norm: norm(config, next_norm),
        }
    }
}

fn first_norm_of(layer: usize) -> String {
    format!("{}.input_layernorm.weight", tensors::layer(layer))
}

fn norm(config: &TextConfig, tensor: String) -> NormSpec {
    NormSpec { tensor, size: config.hidden_size, eps: config.rms_norm_eps }
}
