//! What [`CudaBackend`] keeps, and the parts of its operations that are about steps as a whole.

use std::sync::Arc;
use std::time::Instant;

use tessera_collective::Communicator;
use tessera_types::{Hash256, NumericsId};

use super::collective::HostStage;
use super::device::Gpu;
use super::drawing::{Drawing, StepDraws};
use super::event::Event;
use super::gemm::Gemm;
use super::graph::{CapturedStep, Course, Graphs, StepChecks};
use super::layer_counter::LayerCounter;
use super::library;
use super::linear::Loader;
use super::memory::DeviceBuffer;
use super::scratch::Scratch;
use super::slots::Slots;
use super::staging::StagingRing;
use super::uploaded::Uploaded;
use super::{DevicePtr, NAME, attention};
use crate::act::{DType, SlotSpec};
use crate::backend::{Caps, GraphKey, HeadShape, StepKind};
use crate::device::{CudaFormat, CudaOptions};
use crate::error::{KernelError, Result};
use crate::inputs::{MemoryReport, Readback, StepLimits};
use crate::progress::Progress;
use crate::reference::expect;

/// Pinned memory for rows that the host writes and reads: two buffers of this size.
const STAGING_BYTES: usize = 8 << 20;
/// Few enough to be captured soon, close enough to waste little.
const DECODE_BUCKETS: [u32; 16] = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256];

/// A submitted step.
#[derive(Debug)]
pub struct CudaTicket {
    done: Event,
    draws: StepDraws,
}

/// One rank on one GPU.
pub struct CudaBackend {
    pub(super) caps: Caps,
    pub(super) dtype: DType,
    pub(super) gemm: Gemm,
    pub(super) loader: Loader,
    pub(super) staging: StagingRing,
    pub(super) slots: Slots,
    pub(super) uploaded: Uploaded,
    limits: StepLimits,
    /// Outputs of the widest linear of gate and up.
    pub(super) widest_gate_up: u32,
    /// Partial result of a row-parallel linear.
    partial: Scratch,
    gate_up: Scratch,
    attention: Scratch,
    pub(super) vision_rope: Option<(HeadShape, DeviceBuffer)>,
    pub(super) drawing: Drawing,
    pub(super) communicator: Communicator,
    /// `None` for a rank without peers.
    stage: Option<HostStage>,
    pub(super) graphs: Graphs,
    pub(super) is_capturing: bool,
    /// What the operations of the step at hand checked.
    pub(super) checks: StepChecks,
    /// An error of an operation that reports none, told with the step.
    pub(super) failed: Option<KernelError>,
    pub(super) layers: Arc<LayerCounter>,
    pub(super) progress: Progress,
    pub(super) gpu: Gpu,
}

impl CudaBackend {
    /// A backend without slots, weights or peers on GPU `ordinal`.
    ///
    /// # Errors
    /// No driver or library, or too old a one; no such GPU; too little memory.
    pub fn new(ordinal: u32, format: CudaFormat) -> Result<Self> {
        Self::with_options(&CudaOptions { ordinal, format, deterministic: false })
    }

    /// The same with every choice made.
    ///
    /// # Errors
    /// As for [`CudaBackend::new`].
    pub fn with_options(options: &CudaOptions) -> Result<Self> {
        let gpu = Gpu::open(options.ordinal)?;
        let dtype = match options.format {
            CudaFormat::Bf16 => DType::Bf16,
            CudaFormat::F32 => DType::F32,
        };
        let caps = Caps {
            name: NAME,
            weight_dtypes: vec![dtype],
            activation_dtype: dtype,
            kv_dtype: dtype,
            block_sizes: Vec::new(),
            decode_buckets: DECODE_BUCKETS.to_vec(),
            numerics_id: numerics_id(&gpu, dtype, options.deterministic)?,
        };
        let layers = Arc::new(LayerCounter::new(&gpu)?);
        Ok(Self {
            caps,
            dtype,
            gemm: Gemm::new(&gpu, options.deterministic)?,
            loader: Loader::default(),
            staging: StagingRing::new(&gpu, 2, STAGING_BYTES)?,
            slots: Slots::default(),
            uploaded: Uploaded::default(),
            limits: StepLimits::default(),
            widest_gate_up: 0,
            partial: Scratch::default(),
            gate_up: Scratch::default(),
            attention: Scratch::default(),
            vision_rope: None,
            drawing: Drawing::new(&gpu, &StepLimits::default(), 1)?,
            communicator: Communicator::single(),
            stage: None,
            graphs: Graphs::default(),
            is_capturing: false,
            checks: StepChecks::default(),
            failed: None,
            progress: Progress::of_device(Arc::clone(&layers)),
            layers,
            gpu,
        })
    }

    pub(super) fn plan_memory(
        &mut self,
        slots: &[SlotSpec],
        max: &StepLimits,
    ) -> Result<MemoryReport> {
        self.graphs.clear();
        // Weights are loaded by now, and what came before goes first: the two need not fit side by side.
        (self.loader, self.slots) = (Loader::default(), Slots::default());
        self.uploaded = Uploaded::plan(&self.gpu, max)?;
        self.slots = Slots::plan(&self.gpu, slots)?;
        self.limits = *max;
        self.drawing = Drawing::new(&self.gpu, max, self.communicator.world_size())?;
        let residual_cols = |slot: &SlotSpec| {
            (slot.dtype == DType::F32 && slot.max_rows == max.max_tokens).then_some(slot.cols)
        };
        let residual_cols = slots.iter().filter_map(residual_cols).max().unwrap_or(0);
        let tokens = max.max_tokens as usize;
        self.reserve_partial(tokens * residual_cols as usize)?;
        self.reserve_gate_up(tokens * self.widest_gate_up as usize)?;
        self.reserve_attention()?;
        let scratch = [&self.partial, &self.gate_up, &self.attention];
        let scratch_bytes: usize = scratch.iter().map(|scratch| scratch.bytes()).sum();
        Ok(MemoryReport {
            activations_bytes: self.slots.bytes() + scratch_bytes as u64,
            inputs_bytes: self.uploaded.bytes() + self.drawing.bytes(),
        })
    }

    /// `len` f32 of partial results.
    pub(super) fn reserve_partial(&mut self, len: usize) -> Result<DevicePtr> {
        self.partial.reserve(&self.gpu, len * DType::F32.size_bytes())
    }

    /// `len` activations of gate and up.
    pub(super) fn reserve_gate_up(&mut self, len: usize) -> Result<DevicePtr> {
        self.gate_up.reserve(&self.gpu, len * self.dtype.size_bytes())
    }

    pub(super) fn reserve_attention(&mut self) -> Result<DevicePtr> {
        let bytes = attention::workspace_bytes(&self.gpu, &self.limits);
        self.attention.reserve(&self.gpu, bytes)
    }

    /// Becomes a rank of `communicator`: nothing of the epoch before is left but weights and slots.
    pub(super) fn join(&mut self, communicator: Communicator) -> Result<()> {
        self.graphs.clear();
        self.drawing.reset(&self.gpu, &self.limits, communicator.world_size())?;
        self.failed = None;
        self.stage = match communicator.world_size() {
            1 => None,
            _ => Some(HostStage::new(&self.gpu)?),
        };
        self.communicator = communicator;
        Ok(())
    }

    /// Puts the sum over ranks in the place of `len` f32 values.
    pub(super) fn all_reduce(
        &mut self,
        operation: &'static str,
        data: DevicePtr,
        len: usize,
    ) -> Result<()> {
        let (gpu, communicator) = (&self.gpu, &mut self.communicator);
        match &mut self.stage {
            None => Ok(()),
            Some(stage) => stage.all_reduce_sum(gpu, communicator, operation, data, len),
        }
    }

    /// Runs a step, captures it, or replays it. Only steps that decode and have no peers on the host are captured.
    pub(super) fn run_step(
        &mut self,
        key: GraphKey,
        body: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.checks = StepChecks::default();
        if key.kind != StepKind::Decode || self.stage.is_some() {
            return body(self);
        }
        let inputs = &self.uploaded.inputs;
        expect("run", "tokens", inputs.token_source.len(), key.tokens as usize)?;
        expect("run", "sequences", inputs.kv_len.len(), key.seqs as usize)?;
        expect("run", "logit rows", inputs.logit_rows.len(), key.rows as usize)?;
        match self.graphs.course(&key) {
            Course::Eager => body(self),
            Course::Capture => self.capture(key, body),
            Course::Replay(step) => {
                self.uploaded.check(&step.checks, |slot| self.drawing.is_held(slot))?;
                step.graph.launch(&self.gpu)
            }
        }
    }

    fn capture(
        &mut self,
        key: GraphKey,
        body: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.gpu.begin_capture()?;
        self.is_capturing = true;
        let enqueued = body(self);
        self.is_capturing = false;
        // Ended also after a failure, whose cause is the error to tell.
        let graph = self.gpu.end_capture();
        enqueued?;
        let step = CapturedStep { graph: graph?, checks: self.checks };
        step.graph.launch(&self.gpu)?;
        self.graphs.insert(key, step);
        Ok(())
    }

    pub(super) fn submit_step(&mut self) -> Result<CudaTicket> {
        let draws = self.drawing.submit(&self.gpu)?;
        match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(CudaTicket { done: self.gpu.record()?, draws }),
        }
    }

    pub(super) fn wait_step(&mut self, ticket: CudaTicket, deadline: Instant) -> Result<Readback> {
        ticket.done.wait(deadline)?;
        self.drawing.read(ticket.draws)
    }
}

/// Hash of build, backend, GPU, libraries, types and mode (ENGINE §3).
fn numerics_id(gpu: &Gpu, dtype: DType, is_deterministic: bool) -> Result<NumericsId> {
    let library = library::cublaslt();
    let library =
        library.map_err(|source| KernelError::Cuda { operation: "open", source })?.version;
    let info = gpu.info();
    let mut hasher = blake3::Hasher::new();
    let mut part = |part: &str| {
        hasher.update(part.as_bytes());
        hasher.update(&[0]);
    };
    part(env!("CARGO_PKG_VERSION"));
    part(NAME);
    part(&info.name);
    part(&format!("{:?}", info.capability));
    part(&library.to_string());
    // Weights are dense; activations, KV and weights share the type.
    part("dense");
    part(dtype.name());
    part(if is_deterministic { "deterministic" } else { "fastest" });
    Ok(NumericsId(Hash256(*hasher.finalize().as_bytes())))
}
