//! Linears: packed weights, the product over all threads, and what follows it while the sums are warm.

use super::compute::{Compute, part_of};
use super::gemm::{PANEL, Tiling, multiply_panel, pack_row};
use super::isa::{Isa, Task};
use super::memory::{Buffer, SharedOut};
use super::pack::{num_panels, pack_weights, read_bias};
use super::word::{CpuFormat, Pairs, Singles, Word};
use crate::error::{KernelError, Result};
use crate::sampling::math::{exp, gelu};
use crate::weights::{LinearSpec, PartLayout, SliceReader, WeightFormat};

/// Rows that meet a panel before the next panel is read: their packed form stays in the shared cache.
const BLOCK_ROWS: usize = 512;

/// A linear in packed panels, padding included.
#[derive(Debug)]
pub struct CpuLinear {
    format: CpuFormat,
    /// `[num_panels][depth][32]`
    words: Buffer<u32>,
    /// `[num_panels · 32]`, in the order of the panels.
    bias: Option<Vec<f32>>,
    outputs: usize,
    inputs: usize,
    depth: usize,
    layout: PartLayout,
    /// Published rows that the first part holds, without padding: the ids of a vocabulary shard.
    first_rows: std::ops::Range<usize>,
}

/// What is written of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Plain,
    GeluErf,
    /// silu(gate) ∘ up, of a linear of gate and up.
    SwiGlu,
}

impl CpuLinear {
    /// Reads and packs this rank's slices.
    ///
    /// # Errors
    /// What the reader reports; no memory.
    pub(super) fn load(
        spec: &LinearSpec,
        src: &dyn SliceReader,
        format: CpuFormat,
        compute: &Compute,
    ) -> Result<Self> {
        match spec.format {
            WeightFormat::Dense => {}
        }
        let (outputs, inputs) = (spec.out_features(), spec.in_features());
        if spec.layout == PartLayout::GateUp && !outputs.is_multiple_of(2) {
            let what = "gate and up of different sizes".to_owned();
            return Err(KernelError::Unsupported { backend: super::NAME, what });
        }
        let (words, depth) = match format {
            CpuFormat::Bf16 => {
                (pack_weights::<Pairs>(spec, src, compute.pool.threads())?, inputs.div_ceil(2))
            }
            CpuFormat::F32 => (pack_weights::<Singles>(spec, src, compute.pool.threads())?, inputs),
        };
        let bias = read_bias(spec, src)?;
        let first_rows = spec.parts.first().map_or(0..0, |part| part.rows.clone());
        Ok(Self { format, words, bias, outputs, inputs, depth, layout: spec.layout, first_rows })
    }

    /// Outputs N, padding included.
    pub(super) fn out_features(&self) -> usize {
        self.outputs
    }

    /// Inputs K, padding included.
    pub(super) fn in_features(&self) -> usize {
        self.inputs
    }

    /// y `[M, N]` = x `[M, K]` · Wᵀ + bias and what `output` says; y is `[M, N / 2]` for SwiGLU.
    pub(super) fn apply(
        &self,
        operation: &'static str,
        compute: &mut Compute,
        x: &[f32],
        output: Output,
        y: &mut [f32],
    ) -> Result<()> {
        self.check_layout(operation, output)?;
        let y_cols = match output {
            Output::SwiGlu => self.outputs / 2,
            Output::Plain | Output::GeluErf => self.outputs,
        };
        if y_cols == 0 || y.is_empty() {
            return Ok(());
        }
        let rows = y.len() / y_cols;
        if x.len() != rows * self.inputs || y.len() != rows * y_cols {
            let (expected, found) = (rows * self.inputs, x.len());
            return Err(KernelError::Shape { operation, what: "input elements", expected, found });
        }
        let block = BLOCK_ROWS.min(rows);
        compute.packed.reserve(block, self.depth)?;
        compute.workspace.reserve(|scratch| scratch.sums.reserve(block * PANEL))?;
        for (x, y) in x.chunks(block * self.inputs.max(1)).zip(y.chunks_mut(block * y_cols)) {
            self.apply_block(compute, x, output, y_cols, y);
        }
        Ok(())
    }

    fn apply_block(
        &self,
        compute: &mut Compute,
        x: &[f32],
        output: Output,
        y_cols: usize,
        y: &mut [f32],
    ) {
        let tiling = Tiling::new(y.len() / y_cols, compute.path);
        self.pack_rows(compute, x, &tiling);
        let panels = num_panels(self.outputs, self.layout);
        let parts = compute.parts(panels);
        let (compute, y) = (&*compute, SharedOut::new(y));
        compute.pool.run(parts, &|thread, part| {
            let panels = part_of(panels, parts, part);
            let sums = &mut compute.workspace.of(thread).sums;
            let rows = compute.packed.words();
            let linear = self;
            compute.path.dispatch(Panels { linear, rows, tiling, panels, sums, output, y, y_cols });
        });
    }

    /// Packs one block of input rows, tile by tile.
    fn pack_rows(&self, compute: &mut Compute, x: &[f32], tiling: &Tiling) {
        /// Elements below which a second thread costs more than it saves.
        const SMALL: usize = 1 << 14;
        let tiles = tiling.tiles();
        let parts = if x.len() < SMALL { 1 } else { compute.parts(tiles) };
        let (path, format) = (compute.path, self.format);
        let packed = SharedOut::new(compute.packed.words_mut());
        compute.pool.run(parts, &|_, part| {
            let tiles = part_of(tiles, parts, part);
            let (inputs, depth) = (self.inputs, self.depth);
            path.dispatch(PackTiles { x, tiles, tiling, format, inputs, depth, packed });
        });
    }

    fn check_layout(&self, operation: &'static str, output: Output) -> Result<()> {
        let fits = (self.layout == PartLayout::GateUp) == (output == Output::SwiGlu);
        if fits {
            return Ok(());
        }
        let what = format!("{operation} of a linear laid out as {:?}", self.layout);
        Err(KernelError::Unsupported { backend: super::NAME, what })
    }

    /// Copies the row of `id` into `out` `[K]`; false where another rank holds it.
    pub(super) fn embedding_row(&self, id: u32, out: &mut [f32]) -> bool {
        let id = id as usize;
        if !self.first_rows.contains(&id) {
            return false;
        }
        let row = id - self.first_rows.start;
        let first = row / PANEL * self.depth * PANEL + row % PANEL;
        let words = self.words[first..].iter().copied().step_by(PANEL).take(self.depth);
        match self.format {
            CpuFormat::Bf16 => Pairs::unpack(words, out),
            CpuFormat::F32 => Singles::unpack(words, out),
        }
        true
    }
}

/// Packing of some tiles of rows.
struct PackTiles<'a> {
    x: &'a [f32],
    tiles: std::ops::Range<usize>,
    tiling: &'a Tiling,
    format: CpuFormat,
    inputs: usize,
    depth: usize,
    packed: SharedOut<'a, u32>,
}

impl PackTiles<'_> {
    #[inline(always)]
    fn pack<W: Word>(self) {
        for index in self.tiles.clone() {
            let rows = self.tiling.tile(index);
            // SAFETY: each tile is packed by the one thread that has it in its part.
            #[allow(unsafe_code)]
            let tile =
                unsafe { self.packed.slice(rows.start * self.depth, rows.len() * self.depth) };
            for (row, at) in rows.clone().enumerate() {
                let values = &self.x[at * self.inputs..(at + 1) * self.inputs];
                pack_row::<W>(values, row, rows.len(), tile);
            }
        }
    }
}

impl Task for PackTiles<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        match self.format {
            CpuFormat::Bf16 => self.pack::<Pairs>(),
            CpuFormat::F32 => self.pack::<Singles>(),
        }
    }
}

/// The product of all rows of a block with some panels.
struct Panels<'a> {
    linear: &'a CpuLinear,
    rows: &'a [u32],
    tiling: Tiling,
    panels: std::ops::Range<usize>,
    sums: &'a mut [f32],
    output: Output,
    y: SharedOut<'a, f32>,
    y_cols: usize,
}

impl Task for Panels<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        match self.linear.format {
            CpuFormat::Bf16 => unsafe { self.multiply::<I, Pairs>() },
            CpuFormat::F32 => unsafe { self.multiply::<I, Singles>() },
        }
    }
}

impl Panels<'_> {
    /// # Safety
    /// That of [`Isa`].
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn multiply<I: Isa, W: Word>(mut self) {
        let panel_words = self.linear.depth * PANEL;
        for index in self.panels.clone() {
            let panel = &self.linear.words[index * panel_words..(index + 1) * panel_words];
            if panel.is_empty() {
                self.sums.fill(0.0);
            }
            // SAFETY: the caller's promise.
            unsafe { multiply_panel::<I, W>(self.rows, &self.tiling, panel, self.sums) };
            self.write(index);
        }
    }

    /// Adds the bias and writes the outputs of one panel.
    #[inline(always)]
    fn write(&mut self, panel: usize) {
        let bias = self.linear.bias.as_ref().map(|bias| &bias[panel * PANEL..][..PANEL]);
        let width = if self.output == Output::SwiGlu { PANEL / 2 } else { PANEL };
        let first = panel * width;
        let width = width.min(self.y_cols - first);
        let rows = self.sums.chunks_exact_mut(PANEL).take(self.tiling.rows());
        for (row, sums) in rows.enumerate() {
            if let Some(bias) = bias {
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
            // SAFETY: the columns of a panel are written by the one thread that has it in its part.
            #[allow(unsafe_code)]
            let y = unsafe { self.y.slice(row * self.y_cols + first, width) };
            match self.output {
                Output::Plain => y.copy_from_slice(&sums[..width]),
                Output::GeluErf => y.iter_mut().zip(&*sums).for_each(|(y, sum)| *y = gelu(*sum)),
                Output::SwiGlu => {
                    let (gate, up) = sums.split_at(PANEL / 2);
                    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                        *y = gate / (1.0 + exp(-gate)) * up;
                    }
                }
            }
        }
    }
}
