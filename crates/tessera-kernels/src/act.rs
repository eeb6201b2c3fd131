//! Activation slots and the handles that ops pass around.

/// Element type of an activation, a weight or a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    Bf16,
}

impl DType {
    /// Bytes per element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// The name safetensors and configs use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// What a linear reads: activations as they are, or quantised with one scale per row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ActKind {
    #[default]
    Native,
    Fp8PerToken,
    Int8PerToken,
}

/// Index of a planned activation slot; small numbers, counted from 0 by the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SlotId(pub u32);

/// Size of one activation slot, planned for the largest step: room for `max_rows · cols` elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotSpec {
    pub slot: SlotId,
    pub max_rows: u32,
    pub cols: u32,
    pub dtype: DType,
}

/// Handle to the front of a slot seen as a row-major matrix `[rows, cols]`. Copying it copies no data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Act {
    pub slot: SlotId,
    pub rows: u32,
    pub cols: u32,
    pub dtype: DType,
    /// How the producer writes it, which is what the linear that reads it wants.
    pub kind: ActKind,
}

impl Act {
    /// The first `rows` rows of a planned slot.
    pub fn of(spec: &SlotSpec, rows: u32) -> Self {
        let SlotSpec { slot, cols, dtype, .. } = *spec;
        Self { slot, rows, cols, dtype, kind: ActKind::Native }
    }

    /// The same view, written in the form that its reader wants ([`crate::Backend::input_kind`]).
    #[must_use]
    pub fn of_kind(self, kind: ActKind) -> Self {
        Self { kind, ..self }
    }

    /// Every `group` consecutive rows seen as one row `[rows / group, cols · group]`.
    #[must_use]
    pub fn merge_rows(self, group: u32) -> Self {
        Self { rows: self.rows / group, cols: self.cols * group, ..self }
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.rows as usize * self.cols as usize
    }

    /// Whether the view holds no element.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}
