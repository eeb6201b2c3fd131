//! How the model tells a backend which weights to load: published tensors by name, the slices of this
//! rank, and the padding around them. Layout in memory is the backend's own.

use std::ops::Range;

use half::bf16;

use crate::error::WeightError;

/// A rectangle of one published tensor. The tensor is seen as a matrix `[shape[0], shape[1] · shape[2] ·
/// …]`; a vector `[n]` as `[n, 1]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSlice<'a> {
    /// Published name, in the style without `language_model`.
    pub tensor: &'a str,
    /// Shape the whole tensor must have.
    pub shape: &'a [usize],
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl TensorSlice<'_> {
    /// Columns of the whole tensor seen as a matrix.
    pub fn matrix_cols(&self) -> usize {
        self.shape.get(1..).unwrap_or_default().iter().product()
    }

    /// Number of elements in the rectangle.
    pub fn len(&self) -> usize {
        self.rows.len() * self.cols.len()
    }

    /// Whether the rectangle holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Source of weights: a checkpoint, or random values. Reads exactly what is asked for, for any number of
/// threads at once.
pub trait SliceReader: Sync {
    /// Fills `out` with the slice, row-major and dense. `out.len()` equals `slice.len()`.
    ///
    /// # Errors
    /// A missing tensor, another shape, a type that does not convert to f32, a failed read.
    fn read_f32(&self, slice: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError>;

    /// The same, rounded to nearest even where the stored type is wider than BF16.
    ///
    /// # Errors
    /// As for [`SliceReader::read_f32`].
    fn read_bf16(&self, slice: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError>;
}

/// How the weights of a linear are stored in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// One float tensor `{module}.weight`, shape `[out, in]`.
    Dense,
}

/// How the parts of a linear relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PartLayout {
    /// Outputs of the parts follow each other (q|k|v).
    Stacked,
    /// Two parts of equal size, gate and up: only [`crate::Backend::linear_swiglu`] reads them, so a
    /// backend may interleave their rows in tiles.
    GateUp,
}

/// This rank's share of one published linear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearPart {
    /// Published name without `.weight`, `.bias`, `.qweight` and so on.
    pub module: String,
    /// Published shape of the dense weight, output axis first; further axes are flattened into the input.
    pub shape: Vec<usize>,
    /// Output rows of this rank. May be empty where the padding of a rank is all it has.
    pub rows: Range<usize>,
    /// Input columns of this rank.
    pub cols: Range<usize>,
    /// Output rows after padding with zeros; at least `rows.len()`.
    pub padded_rows: usize,
    /// Load `{module}.bias` `[out]` too, the same rows. Off on every rank but 0 where the output is summed
    /// over ranks.
    pub bias: bool,
}

impl LinearPart {
    /// A whole linear, without padding: nothing is split.
    pub fn whole(module: impl Into<String>, out: usize, cols: usize, bias: bool) -> Self {
        Self {
            module: module.into(),
            shape: vec![out, cols],
            rows: 0..out,
            cols: 0..cols,
            padded_rows: out,
            bias,
        }
    }

    /// Name of the dense weight.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// Name of the bias.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.module)
    }
}

/// A linear as one rank holds it: parts stacked over the output axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    pub parts: Vec<LinearPart>,
    /// Input columns after padding with zeros; the same for all parts.
    pub padded_cols: usize,
    pub layout: PartLayout,
    pub format: WeightFormat,
}

impl LinearSpec {
    /// Outputs N of this rank, padding included.
    pub fn out_features(&self) -> usize {
        self.parts.iter().map(|part| part.padded_rows).sum()
    }

    /// Inputs K of this rank, padding included.
    pub fn in_features(&self) -> usize {
        self.padded_cols
    }
}

/// An RMSNorm weight `[hidden]`.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Published tensor name.
    pub tensor: String,
    pub size: usize,
    pub eps: f64,
}
