//! The step at hand: its inputs on the host, for checks, and on the device.

use tessera_types::{SequenceSlot, TokenId};

use super::attention::{PagedPlan, PagedShape, VarlenPlan};
use super::device::Gpu;
use super::graph::StepChecks;
use super::kv::KvBounds;
use super::step::{StepArea, StepPtrs, VisionPtrs};
use crate::error::{KernelError, Result};
use crate::inputs::{StepInputs, StepLimits, TokenSource, VisionInputs};
use crate::reference::validate;

/// A plan of no work.
const EMPTY_PLAN_BYTES: usize = 64;

/// What the last upload brought. Without room until [`Uploaded::plan`].
#[derive(Debug, Default)]
pub(super) struct Uploaded {
    limits: StepLimits,
    area: Option<StepArea>,
    pub(super) inputs: StepInputs,
    pub(super) ptrs: StepPtrs,
    pub(super) vision: VisionInputs,
    pub(super) vision_ptrs: VisionPtrs,
    pub(super) paged: PagedPlan,
    pub(super) varlen: VarlenPlan,
    /// Of the attention that was last asked for: its next plan travels with the inputs.
    shape: Option<PagedShape>,
    /// Whether `paged` is that of the step at hand, for `shape`.
    is_planned: bool,
    /// A cache that the step at hand is known to stay within.
    within: Option<KvBounds>,
    /// Largest row of visual rows that a token takes; −1 for none.
    last_visual_row: i32,
}

impl Uploaded {
    /// Makes room for steps up to `limits`.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn plan(gpu: &Gpu, limits: &StepLimits) -> Result<Self> {
        let plan_bytes = PagedPlan::max_bytes(limits).max(VarlenPlan::max_bytes(limits));
        let area = Some(StepArea::new(gpu, limits, plan_bytes)?);
        Ok(Self { limits: *limits, area, ..Self::default() })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.area.as_ref().map_or(0, StepArea::bytes)
    }

    /// Checks a decoder step and enqueues its copy. `last_token`: what the host knows of a slot's last token.
    ///
    /// # Errors
    /// Contradictions in the inputs; what the device reports.
    pub(super) fn upload(
        &mut self,
        gpu: &Gpu,
        inputs: &StepInputs,
        last_token: &dyn Fn(SequenceSlot) -> Option<TokenId>,
    ) -> Result<()> {
        validate::step(inputs, &self.limits)?;
        self.inputs.clone_from(inputs);
        self.within = None;
        self.is_planned = self.shape.is_some();
        if let Some(shape) = &self.shape {
            self.paged.build(gpu, inputs, shape);
        }
        let words = if self.is_planned { self.paged.words() } else { &[] };
        let shape_limits = StepLimits {
            max_tokens: inputs.token_source.len() as u32,
            max_sequences: inputs.kv_len.len() as u32,
            ..self.limits
        };
        let plan = (words, PagedPlan::max_bytes(&shape_limits).max(EMPTY_PLAN_BYTES));
        let area = self.area.as_mut().ok_or_else(not_planned)?;
        self.ptrs = area.upload(gpu, inputs, plan, last_token)?;
        self.last_visual_row = inputs.visual_row.iter().copied().max().unwrap_or(-1);
        Ok(())
    }

    /// Checks a vision step and enqueues its copy.
    ///
    /// # Errors
    /// As for [`Uploaded::upload`].
    pub(super) fn upload_vision(&mut self, gpu: &Gpu, inputs: &VisionInputs) -> Result<()> {
        validate::vision(inputs, &self.limits)?;
        self.vision.clone_from(inputs);
        self.varlen.build(&inputs.cu_window, &inputs.cu_full);
        let area = self.area.as_mut().ok_or_else(not_planned)?;
        self.vision_ptrs = area.upload_vision(gpu, inputs, self.varlen.words())?;
        Ok(())
    }

    /// Has the step's plan for attention of this shape on the device. The first call builds and copies it, later
    /// steps bring theirs with the inputs.
    ///
    /// # Errors
    /// What the device reports; another shape than before inside of a capture.
    pub(super) fn plan_paged(
        &mut self,
        gpu: &Gpu,
        shape: &PagedShape,
        is_capturing: bool,
    ) -> Result<()> {
        if self.is_planned && self.shape.as_ref() == Some(shape) {
            return Ok(());
        }
        if is_capturing {
            let what = "attention of another shape in a captured step".to_owned();
            return Err(KernelError::Unsupported { backend: super::NAME, what });
        }
        self.paged.build(gpu, &self.inputs, shape);
        let area = self.area.as_mut().ok_or_else(not_planned)?;
        area.upload_plan(gpu, &self.ptrs, self.paged.words())?;
        (self.shape, self.is_planned) = (Some(*shape), true);
        Ok(())
    }

    /// Checks once per step that it stays within a cache.
    ///
    /// # Errors
    /// A slot or block outside of it.
    pub(super) fn check_kv(&mut self, bounds: KvBounds) -> Result<()> {
        if self.within != Some(bounds) {
            bounds.check_slots(&self.inputs)?;
            bounds.check_tables(&self.inputs)?;
            self.within = Some(bounds);
        }
        Ok(())
    }

    /// Every visual row that a token takes is one of `rows`.
    pub(super) fn check_visual(&self, rows: u32) -> Result<()> {
        if i64::from(self.last_visual_row) < i64::from(rows) {
            return Ok(());
        }
        let reason = format!("row {} lies outside of the slot's rows", self.last_visual_row);
        Err(KernelError::Input { field: "visual_row", reason })
    }

    /// Every slot whose last token is wanted holds a sequence.
    pub(super) fn check_sources(&self, is_held: impl Fn(SequenceSlot) -> bool) -> Result<()> {
        let vacant = self.inputs.token_source.iter().find_map(|source| match source {
            TokenSource::LastSampled(slot) if !is_held(*slot) => Some(*slot),
            _ => None,
        });
        vacant.map_or(Ok(()), |slot| Err(KernelError::VacantSlot { slot }))
    }

    /// All that the operations of a captured step checked when they were captured.
    pub(super) fn check(
        &mut self,
        checks: &StepChecks,
        is_held: impl Fn(SequenceSlot) -> bool,
    ) -> Result<()> {
        if checks.embeds {
            self.check_sources(is_held)?;
        }
        checks.visual_rows.map_or(Ok(()), |rows| self.check_visual(rows))?;
        checks.kv.map_or(Ok(()), |bounds| self.check_kv(bounds))
    }
}

fn not_planned() -> KernelError {
    KernelError::Input { field: "token_source", reason: "no step was planned for".to_owned() }
}
