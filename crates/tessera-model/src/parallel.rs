//! Column-, row- and vocab-parallel linears (Shoeybi et al. 2019), as specs for the backend: which rows
//! and columns of the published weights a rank loads, and what pads them.

use tessera_kernels::{LinearPart, LinearSpec, PartLayout, WeightFormat};

use crate::split::Shard;

/// A published linear: module name and shape `[out, cols]`.
#[derive(Debug, Clone)]
pub struct Module {
    pub name: String,
    pub out: usize,
    pub cols: usize,
    pub bias: bool,
}

impl Module {
    pub fn new(name: impl Into<String>, out: usize, cols: usize, bias: bool) -> Self {
        Self { name: name.into(), out, cols, bias }
    }

    /// The rows of `shard`, with all columns.
    pub fn rows(&self, shard: &Shard) -> LinearPart {
        LinearPart {
            module: self.name.clone(),
            shape: vec![self.out, self.cols],
            rows: shard.range.clone(),
            cols: 0..self.cols,
            padded_rows: shard.padded,
            bias: self.bias,
        }
    }
}

/// Outputs are split: each part gives the rows of its shard. No communication.
pub fn column_parallel(parts: Vec<LinearPart>, layout: PartLayout) -> LinearSpec {
    let padded_cols = parts.first().map_or(0, |part| part.cols.len());
    LinearSpec { parts, padded_cols, layout, format: WeightFormat::Dense }
}

/// Inputs are split: the outputs of all ranks are partial sums. The bias, where there is one, is loaded
/// by `holds_bias` (rank 0) only, so that the sum has it once.
pub fn row_parallel(module: &Module, cols: &Shard, holds_bias: bool) -> LinearSpec {
    let part = LinearPart {
        cols: cols.range.clone(),
        bias: module.bias && holds_bias,
        ..module.rows(&Shard::whole(module.out))
    };
    let (layout, format) = (PartLayout::Stacked, WeightFormat::Dense);
    LinearSpec { parts: vec![part], padded_cols: cols.padded, layout, format }
}

/// A whole linear on every rank.
pub fn replicated(module: &Module) -> LinearSpec {
    column_parallel(vec![module.rows(&Shard::whole(module.out))], PartLayout::Stacked)
}
