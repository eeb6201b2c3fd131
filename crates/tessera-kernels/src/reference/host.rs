//! What every backend on the host keeps beside its kernels: slots, the step's inputs, the sampler's table and
//! the communicator. It checks what comes from above, once for all of them.

use tessera_collective::Communicator;
use tessera_types::{LateInputs, TokenId};

use super::sampler::{ForRows, Sampler};
use super::slots::Slots;
use super::{collective, expect, validate};
use crate::act::{Act, SlotSpec};
use crate::backend::{GatherRows, HeadShape, KvSpec, Segments};
use crate::error::{KernelError, Result};
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, ScoreRow, StepInputs, StepLimits, TokenSource,
    VisionInputs,
};
use crate::progress::Progress;

/// State of one rank on the host.
#[derive(Debug)]
pub(crate) struct HostState {
    /// Name of the backend, for errors.
    backend: &'static str,
    limits: StepLimits,
    pub(crate) slots: Slots,
    pub(crate) inputs: StepInputs,
    pub(crate) vision: VisionInputs,
    pub(crate) communicator: Communicator,
    pub(crate) sampler: Sampler,
    pub(crate) progress: Progress,
    readback: Readback,
}

impl HostState {
    /// Without slots or peers.
    pub(crate) fn new(backend: &'static str) -> Self {
        Self {
            backend,
            limits: StepLimits::default(),
            slots: Slots::new(backend),
            inputs: StepInputs::default(),
            vision: VisionInputs::default(),
            communicator: Communicator::single(),
            sampler: Sampler::default(),
            progress: Progress::default(),
            readback: Readback::default(),
        }
    }

    pub(crate) fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> MemoryReport {
        self.slots = Slots::plan(self.backend, slots);
        self.limits = *max;
        self.sampler = Sampler::new(max);
        MemoryReport {
            activations_bytes: self.slots.bytes(),
            inputs_bytes: validate::inputs_bytes(max),
        }
    }

    pub(crate) fn set_communicator(&mut self, communicator: Option<Communicator>) {
        self.communicator = communicator.unwrap_or_else(Communicator::single);
        self.sampler = Sampler::new(&self.limits);
        // Tokens of a step that failed half-way must not appear in the next epoch.
        self.readback = Readback::default();
    }

    pub(crate) fn upload(&mut self, inputs: &StepInputs) -> Result<()> {
        validate::step(inputs, &self.limits)?;
        self.inputs.clone_from(inputs);
        Ok(())
    }

    pub(crate) fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        validate::vision(inputs, &self.limits)?;
        self.vision.clone_from(inputs);
        Ok(())
    }

    pub(crate) fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()> {
        let operation = "upload_rows";
        expect(operation, "columns", dst.cols as usize, rows.cols as usize)?;
        let (at, data) = (at as usize * dst.cols as usize, self.slots.get_mut(dst)?);
        let (what, expected, found) = ("end", dst.len(), at + rows.values.len());
        let target = data.get_mut(at..found);
        let target = target.ok_or(KernelError::Shape { operation, what, expected, found })?;
        target.copy_from_slice(rows.values);
        Ok(())
    }

    pub(crate) fn download(&self, src: Act) -> Result<Vec<f32>> {
        Ok(self.slots.get(src)?.to_vec())
    }

    /// What the step gave so far.
    pub(crate) fn submit(&mut self) -> Readback {
        std::mem::take(&mut self.readback)
    }

    /// x = what `embed` writes for a token (into zeros), or a visual row on rank 0.
    pub(crate) fn embed_merge(
        &mut self,
        visual: Act,
        x: Act,
        mut embed: impl FnMut(TokenId, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let hidden = x.cols as usize;
        let StepInputs { token_source, visual_row, .. } = &self.inputs;
        expect("embed_merge", "tokens", token_source.len(), x.rows as usize)?;
        expect("embed_merge", "visual columns", hidden, visual.cols as usize)?;
        let is_leader = self.communicator.rank().0 == 0;
        let (visual, x) = self.slots.pair(visual, x)?;
        let tokens = token_source.iter().zip(visual_row);
        for (row, (source, visual_row)) in x.chunks_exact_mut(hidden).zip(tokens) {
            let token = match source {
                TokenSource::Host(token) => *token,
                TokenSource::LastSampled(slot) => self.sampler.last_sampled(*slot)?,
            };
            row.fill(0.0);
            match usize::try_from(*visual_row) {
                Err(_) => embed(token, row)?,
                Ok(at) if is_leader => {
                    row.copy_from_slice(picked(visual, hidden, at, "visual_row")?)
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    pub(crate) fn all_reduce(&mut self, operation: &'static str, data: Act) -> Result<()> {
        let data = self.slots.get_mut(data)?;
        self.communicator.all_reduce_sum(data).map_err(collective(operation))
    }

    pub(crate) fn barrier(&mut self) -> Result<()> {
        self.communicator.barrier().map_err(collective("barrier"))
    }

    pub(crate) fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        let wanted = match rows {
            GatherRows::Logits => &self.inputs.logit_rows[..],
            GatherRows::Scores { from } => validate::score_tile(&self.inputs, from, y.rows)?,
            GatherRows::InverseWindow => &self.vision.inverse[..],
        };
        expect("gather_rows", "rows", wanted.len(), y.rows as usize)?;
        expect("gather_rows", "columns", x.cols as usize, y.cols as usize)?;
        let cols = x.cols as usize;
        let (x, y) = self.slots.pair(x, y)?;
        for (y, row) in y.chunks_exact_mut(cols).zip(wanted) {
            y.copy_from_slice(picked(x, cols, *row as usize, "gather_rows")?);
        }
        Ok(())
    }

    pub(crate) fn sample(
        &mut self,
        logits: Act,
        rows: &[SampleRow],
        late: &LateInputs,
        for_rows: &ForRows<'_>,
    ) -> Result<()> {
        expect("sample", "logit rows", rows.len(), logits.rows as usize)?;
        let (data, communicator) = (self.slots.get(logits)?, &mut self.communicator);
        let tokens = self.sampler.sample(communicator, data, rows, late, for_rows)?;
        self.readback.tokens.extend(tokens);
        Ok(())
    }

    pub(crate) fn score_rows(
        &mut self,
        logits: Act,
        rows: &[ScoreRow],
        for_rows: &ForRows<'_>,
    ) -> Result<()> {
        expect("score_rows", "logit rows", rows.len(), logits.rows as usize)?;
        let (data, communicator) = (self.slots.get(logits)?, &mut self.communicator);
        let scores = self.sampler.score(communicator, data, rows, for_rows)?;
        self.readback.scores.extend(scores);
        Ok(())
    }
}

/// Checks that the rotary sections of a cache cover its heads.
pub(crate) fn check_kv(spec: &KvSpec) -> Result<()> {
    let sections = spec.rope.sections.iter().sum::<u32>() as usize;
    expect("alloc_kv", "sum of rope sections", spec.head_dim as usize / 2, sections)
}

/// Columns of queries in qkv `[T, (hq + 2·hkv)·hd]`, checked against what attention writes.
pub(crate) fn check_paged(inputs: &StepInputs, qkv: Act, kv: &KvSpec, out: Act) -> Result<()> {
    let operation = "attention_paged";
    let query_cols = qkv.cols - 2 * kv.num_kv_heads * kv.head_dim;
    expect(operation, "output columns", query_cols as usize, out.cols as usize)?;
    expect(operation, "tokens", inputs.positions.len(), qkv.rows as usize)?;
    expect(operation, "output rows", qkv.rows as usize, out.rows as usize)
}

/// Checks the columns of qkv `[P, 3, heads, hd]`, and returns the columns of one of the three.
pub(crate) fn check_vision(
    operation: &'static str,
    inputs: &VisionInputs,
    qkv: Act,
    heads: HeadShape,
) -> Result<usize> {
    let hidden = (heads.num_heads * heads.head_dim) as usize;
    expect(operation, "columns", 3 * hidden, qkv.cols as usize)?;
    expect(operation, "patches", inputs.row_col.len(), qkv.rows as usize)?;
    Ok(hidden)
}

/// The prefix sums that bound attention of `[P, 3, heads, hd]`, whose shapes are checked.
pub(crate) fn segments(
    inputs: &VisionInputs,
    qkv: Act,
    heads: HeadShape,
    segments: Segments,
    out: Act,
) -> Result<&[u32]> {
    let operation = "attention_varlen";
    let hidden = check_vision(operation, inputs, qkv, heads)?;
    expect(operation, "output columns", hidden, out.cols as usize)?;
    expect(operation, "output rows", qkv.rows as usize, out.rows as usize)?;
    Ok(match segments {
        Segments::Window => &inputs.cu_window,
        Segments::Full => &inputs.cu_full,
    })
}

/// Row `row` of a slot, or an error that names the input which asked for it.
fn picked<'a>(
    values: &'a [f32],
    cols: usize,
    row: usize,
    field: &'static str,
) -> Result<&'a [f32]> {
    values.get(row * cols..(row + 1) * cols).ok_or_else(|| {
        let reason = format!("row {row} lies outside of the slot's rows");
        KernelError::Input { field, reason }
    })
}
