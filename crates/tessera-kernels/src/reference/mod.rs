//! The reference backend: f32 on the host, written to be obviously right. Parity tests and every other
//! backend's kernels are held against it.
//!
//! It computes at once, in the calling thread (candle spreads large products over cores), so a ticket
//! is the finished result. Sums that decide accuracy (norms, softmax) run in f64.

mod attention;
pub(crate) mod host;
mod kv;
pub(crate) mod linear;
mod matmul;
mod norm;
mod numerics;
pub(crate) mod rope;
pub(crate) mod sampler;
pub(crate) mod slots;
pub(crate) mod validate;

use std::time::Instant;

use tessera_collective::Communicator;
use tessera_types::{LateInputs, SequenceSlot};

use self::host::HostState;
use self::rope::{DecoderRope, VisionRope};
use crate::act::{Act, ActKind, DType, SlotSpec};
use crate::backend::{Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, Segments};
use crate::error::{KernelError, Result};
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits,
    VisionInputs,
};
use crate::progress::Progress;
use crate::weights::{LinearSpec, NormSpec, SliceReader};

pub use self::kv::ReferenceKv;
pub use self::linear::ReferenceLinear;
pub use self::norm::ReferenceNorm;

/// Name in [`Caps`], logs and errors.
const NAME: &str = "reference";

/// A finished step. Steps end in the order of submission.
#[derive(Debug)]
pub struct ReferenceTicket(Readback);

/// The host backend in f32. One per rank thread.
#[derive(Debug)]
pub struct ReferenceBackend {
    caps: Caps,
    host: HostState,
}

impl ReferenceBackend {
    /// A backend without slots, weights or peers.
    pub fn new() -> Self {
        let caps = Caps {
            name: NAME,
            weight_dtypes: vec![DType::F32],
            activation_dtype: DType::F32,
            kv_dtype: DType::F32,
            block_sizes: Vec::new(),
            decode_buckets: Vec::new(),
            numerics_id: numerics::numerics_id(),
        };
        Self { caps, host: HostState::new(NAME) }
    }
}

impl Default for ReferenceBackend {
    fn default() -> Self {
        Self::new()
    }
}

/// Names the operation in which a communicator failed.
pub(crate) fn collective(
    operation: &'static str,
) -> impl Fn(tessera_collective::CollectiveError) -> KernelError {
    move |source| KernelError::Communicator { operation, source }
}

pub(crate) fn expect(
    operation: &'static str,
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<()> {
    match expected == found {
        true => Ok(()),
        false => Err(KernelError::Shape { operation, what, expected, found }),
    }
}

impl Backend for ReferenceBackend {
    type Linear = ReferenceLinear;
    type Norm = ReferenceNorm;
    type Kv = ReferenceKv;
    type Ticket = ReferenceTicket;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn progress(&self) -> Progress {
        self.host.progress.clone()
    }

    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<ReferenceLinear> {
        ReferenceLinear::load(spec, src)
    }

    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<ReferenceNorm> {
        ReferenceNorm::load(spec, src)
    }

    fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport> {
        Ok(self.host.plan(slots, max))
    }

    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<ReferenceKv> {
        host::check_kv(spec)?;
        Ok(ReferenceKv::new(spec, num_blocks))
    }

    fn set_communicator(&mut self, communicator: Option<Communicator>) -> Result<()> {
        self.host.set_communicator(communicator);
        Ok(())
    }

    fn upload(&mut self, inputs: &StepInputs) -> Result<()> {
        self.host.upload(inputs)
    }

    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        self.host.upload_vision(inputs)
    }

    fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()> {
        self.host.upload_rows(dst, at, rows)
    }

    fn download(&mut self, src: Act) -> Result<Vec<f32>> {
        self.host.download(src)
    }

    fn run(&mut self, _key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        body(self)
    }

    fn submit(&mut self) -> Result<ReferenceTicket> {
        Ok(ReferenceTicket(self.host.submit()))
    }

    fn wait(&mut self, ticket: ReferenceTicket, _deadline: Instant) -> Result<Readback> {
        Ok(ticket.0)
    }

    fn input_kind(&self, _linear: &ReferenceLinear) -> ActKind {
        ActKind::Native
    }

    fn layer_done(&mut self) {
        self.host.progress.bump();
    }

    fn embed_merge(&mut self, table: &ReferenceLinear, visual: Act, x: Act) -> Result<()> {
        self.host.embed_merge(visual, x, |token, row| table.embedding_row(token, row).map(drop))
    }

    fn all_reduce_norm(&mut self, residual: Act, norm: &ReferenceNorm, y: Act) -> Result<()> {
        self.host.all_reduce("all_reduce_norm", residual)?;
        self.rms_norm(residual, norm, y)
    }

    fn row_parallel_add_norm(
        &mut self,
        x: Act,
        linear: &ReferenceLinear,
        residual: Act,
        norm: &ReferenceNorm,
        y: Act,
    ) -> Result<()> {
        let operation = "row_parallel_add_norm";
        expect(operation, "outputs", residual.cols as usize, linear.out_features()?)?;
        let mut sum = vec![0.0; residual.len()];
        linear.apply(operation, self.host.slots.get(x)?, Epilogue::None, &mut sum)?;
        self.host.communicator.all_reduce_sum(&mut sum).map_err(collective(operation))?;
        for (residual, sum) in self.host.slots.get_mut(residual)?.iter_mut().zip(&sum) {
            *residual += sum;
        }
        self.rms_norm(residual, norm, y)
    }

    fn rms_norm(&mut self, x: Act, norm: &ReferenceNorm, y: Act) -> Result<()> {
        let (x, y) = self.host.slots.pair(x, y)?;
        norm.apply(x, y)
    }

    fn linear(
        &mut self,
        x: Act,
        linear: &ReferenceLinear,
        epilogue: Epilogue,
        y: Act,
    ) -> Result<()> {
        expect("linear", "outputs", y.cols as usize, linear.out_features()?)?;
        let (x, y) = self.host.slots.pair(x, y)?;
        linear.apply("linear", x, epilogue, y)
    }

    fn linear_swiglu(&mut self, x: Act, gate_up: &ReferenceLinear, y: Act) -> Result<()> {
        expect("linear_swiglu", "outputs", 2 * y.cols as usize, gate_up.out_features()?)?;
        let (x, y) = self.host.slots.pair(x, y)?;
        gate_up.apply_swiglu(x, y)
    }

    fn rope_kv_write(&mut self, qkv: Act, kv: &mut ReferenceKv, layer: u32) -> Result<()> {
        attention::check_heads("rope_kv_write", qkv.cols as usize, kv)?;
        expect("rope_kv_write", "tokens", self.host.inputs.positions.len(), qkv.rows as usize)?;
        let (dim, kv_heads) = (kv.spec().head_dim as usize, kv.spec().num_kv_heads as usize);
        let rope = DecoderRope::new(&kv.spec().rope, kv.spec().head_dim);
        let rows = self.host.slots.get_mut(qkv)?.chunks_exact_mut(qkv.cols as usize);
        for (token, row) in rows.enumerate() {
            let (rotated, value) = row.split_at_mut(row.len() - kv_heads * dim);
            let angles = rope.angles(self.host.inputs.positions[token]);
            rotated.chunks_exact_mut(dim).for_each(|head| rope::rotate(head, &angles));
            let slot = self.host.inputs.slot_mapping[token];
            if slot >= 0 {
                let key = &rotated[rotated.len() - kv_heads * dim..];
                kv.write(layer, slot, key, value)?;
            }
        }
        Ok(())
    }

    fn attention_paged(&mut self, qkv: Act, kv: &ReferenceKv, layer: u32, out: Act) -> Result<()> {
        attention::check_heads("attention_paged", qkv.cols as usize, kv)?;
        host::check_paged(&self.host.inputs, qkv, kv.spec(), out)?;
        let (data, out) = self.host.slots.pair(qkv, out)?;
        attention::paged(&self.host.inputs, data, qkv.cols as usize, kv, layer, out)
    }

    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()> {
        let hidden = host::check_vision("rope_2d", &self.host.vision, qkv, heads)?;
        let rope = VisionRope::new(heads);
        let rows = self.host.slots.get_mut(qkv)?.chunks_exact_mut(3 * hidden);
        for (row, row_col) in rows.zip(&self.host.vision.row_col) {
            let angles = rope.angles(*row_col);
            let rotated = row[..2 * hidden].chunks_exact_mut(heads.head_dim as usize);
            rotated.for_each(|head| rope::rotate(head, &angles));
        }
        Ok(())
    }

    fn attention_varlen(
        &mut self,
        qkv: Act,
        heads: HeadShape,
        segments: Segments,
        out: Act,
    ) -> Result<()> {
        let cu = host::segments(&self.host.vision, qkv, heads, segments, out)?;
        let (qkv, out) = self.host.slots.pair(qkv, out)?;
        attention::varlen(cu, qkv, heads, out)
    }

    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        self.host.gather_rows(x, rows, y)
    }

    fn zero_blocks(&mut self, kv: &mut ReferenceKv) -> Result<()> {
        kv.zero(&self.host.inputs.zero_blocks)
    }

    fn copy_blocks(&mut self, kv: &mut ReferenceKv) -> Result<()> {
        kv.copy(&self.host.inputs.block_copies)
    }

    fn barrier(&mut self) -> Result<()> {
        self.host.barrier()
    }

    fn sampler_admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        self.host.sampler.admit(sequence)
    }

    fn sampler_release(&mut self, slot: SequenceSlot) {
        self.host.sampler.release(slot);
    }

    fn sample(&mut self, logits: Act, rows: &[SampleRow], late: &LateInputs) -> Result<()> {
        self.host.sample(logits, rows, late, &for_rows)
    }

    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()> {
        self.host.score_rows(logits, rows, &for_rows)
    }
}

/// One row after the other.
fn for_rows(rows: usize, body: &(dyn Fn(usize) + Sync)) {
    (0..rows).for_each(body);
}
