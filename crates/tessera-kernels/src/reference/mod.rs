//! The reference backend: f32 on the host, written to be obviously right. Parity tests and every other
//! backend's kernels are held against it.
//!
//! It computes at once, in the calling thread (candle spreads large products over cores), so a ticket
//! is the finished result. Sums that decide accuracy (norms, softmax) run in f64.

mod attention;
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
use tessera_types::{LateInputs, SequenceSlot, TokenId};

use self::rope::{DecoderRope, VisionRope};
use self::sampler::Sampler;
use self::slots::Slots;
use crate::act::{Act, ActKind, DType, SlotSpec};
use crate::backend::{Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, Segments};
use crate::error::{KernelError, Result};
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs,
    StepLimits,
    TokenSource, VisionInputs,
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
    limits: StepLimits,
    slots: Slots,
    inputs: StepInputs,
    vision: VisionInputs,
    communicator: Communicator,
    sampler: Sampler,
    readback: Readback,
    progress: Progress,
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
            numerics_id: numerics::numerics_id(),
        };
        Self {
            caps,
            limits: StepLimits::default(),
            slots: Slots::new(NAME),
            inputs: StepInputs::default(),
            vision: VisionInputs::default(),
            communicator: Communicator::single(),
            sampler: Sampler::default(),
            readback: Readback::default(),
            progress: Progress::default(),
        }
    }

    fn token(&self, source: TokenSource) -> Result<TokenId> {
        match source {
            TokenSource::Host(token) => Ok(token),
            TokenSource::LastSampled(slot) => self.sampler.last_sampled(slot),
        }
    }

    fn is_leader(&self) -> bool {
        self.communicator.rank().0 == 0
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
        self.progress.clone()
    }

    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<ReferenceLinear> {
        ReferenceLinear::load(spec, src)
    }

    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<ReferenceNorm> {
        ReferenceNorm::load(spec, src)
    }

    fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport> {
        self.slots = Slots::plan(NAME, slots);
        self.limits = *max;
        self.sampler = Sampler::new(max);
        Ok(MemoryReport {
            activations_bytes: self.slots.bytes(),
            inputs_bytes: validate::inputs_bytes(max),
        })
    }

    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<ReferenceKv> {
        let sections = spec.rope.sections.iter().sum::<u32>() as usize;
        expect("alloc_kv", "sum of rope sections", spec.head_dim as usize / 2, sections)?;
        Ok(ReferenceKv::new(spec, num_blocks))
    }

    fn set_communicator(&mut self, communicator: Option<Communicator>) -> Result<()> {
        self.communicator = communicator.unwrap_or_else(Communicator::single);
        self.sampler = Sampler::new(&self.limits);
        // Tokens of a step that failed half-way must not appear in the next epoch.
        self.readback = Readback::default();
        Ok(())
    }

    fn upload(&mut self, inputs: &StepInputs) -> Result<()> {
        validate::step(inputs, &self.limits)?;
        self.inputs.clone_from(inputs);
        Ok(())
    }

    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        validate::vision(inputs, &self.limits)?;
        self.vision.clone_from(inputs);
        Ok(())
    }

    fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()> {
        expect("upload_rows", "columns", dst.cols as usize, rows.cols as usize)?;
        let (at, data) = ((at * dst.cols) as usize, self.slots.get_mut(dst)?);
        let found = at + rows.values.len();
        let Some(target) = data.get_mut(at..found) else {
            let expected = dst.len();
            return Err(KernelError::Shape {
                operation: "upload_rows",
                what: "end",
                expected,
                found,
            });
        };
        target.copy_from_slice(rows.values);
        Ok(())
    }

    fn download(&mut self, src: Act) -> Result<Vec<f32>> {
        Ok(self.slots.get(src)?.to_vec())
    }

    fn run(&mut self, _key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        body(self)
    }

    fn submit(&mut self) -> Result<ReferenceTicket> {
        Ok(ReferenceTicket(std::mem::take(&mut self.readback)))
    }

    fn wait(&mut self, ticket: ReferenceTicket, _deadline: Instant) -> Result<Readback> {
        Ok(ticket.0)
    }

    fn input_kind(&self, _linear: &ReferenceLinear) -> ActKind {
        ActKind::Native
    }

    fn layer_done(&mut self) {
        self.progress.bump();
    }

    fn embed_merge(&mut self, table: &ReferenceLinear, visual: Act, x: Act) -> Result<()> {
        let hidden = x.cols as usize;
        expect("embed_merge", "tokens", self.inputs.token_source.len(), x.rows as usize)?;
        expect("embed_merge", "visual columns", hidden, visual.cols as usize)?;
        let sources = self.inputs.token_source.iter().zip(&self.inputs.visual_row);
        let tokens: Vec<(TokenId, i32)> = sources
            .map(|(source, visual_row)| Ok((self.token(*source)?, *visual_row)))
            .collect::<Result<_>>()?;
        let is_leader = self.is_leader();
        let (visual, x) = self.slots.pair(visual, x)?;
        for (row, (token, visual_row)) in x.chunks_exact_mut(hidden).zip(tokens) {
            row.fill(0.0);
            let Ok(visual_row) = usize::try_from(visual_row) else {
                table.embedding_row(token, row)?;
                continue;
            };
            if is_leader {
                let source = visual.chunks_exact(hidden).nth(visual_row).ok_or_else(|| {
                    let reason = format!("row {visual_row} was not uploaded");
                    KernelError::Input { field: "visual_row", reason }
                })?;
                row.copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn all_reduce_norm(&mut self, residual: Act, norm: &ReferenceNorm, y: Act) -> Result<()> {
        let data = self.slots.get_mut(residual)?;
        self.communicator.all_reduce_sum(data).map_err(collective("all_reduce_norm"))?;
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
        linear.apply(operation, self.slots.get(x)?, Epilogue::None, &mut sum)?;
        self.communicator.all_reduce_sum(&mut sum).map_err(collective(operation))?;
        for (residual, sum) in self.slots.get_mut(residual)?.iter_mut().zip(&sum) {
            *residual += sum;
        }
        self.rms_norm(residual, norm, y)
    }

    fn rms_norm(&mut self, x: Act, norm: &ReferenceNorm, y: Act) -> Result<()> {
        let (x, y) = self.slots.pair(x, y)?;
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
        let (x, y) = self.slots.pair(x, y)?;
        linear.apply("linear", x, epilogue, y)
    }

    fn linear_swiglu(&mut self, x: Act, gate_up: &ReferenceLinear, y: Act) -> Result<()> {
        expect("linear_swiglu", "outputs", 2 * y.cols as usize, gate_up.out_features()?)?;
        let (x, y) = self.slots.pair(x, y)?;
        gate_up.apply_swiglu(x, y)
    }

    fn rope_kv_write(&mut self, qkv: Act, kv: &mut ReferenceKv, layer: u32) -> Result<()> {
        attention::check_heads("rope_kv_write", qkv.cols as usize, kv)?;
        expect("rope_kv_write", "tokens", self.inputs.positions.len(), qkv.rows as usize)?;
        let (dim, kv_heads) = (kv.spec().head_dim as usize, kv.spec().num_kv_heads as usize);
        let rope = DecoderRope::new(&kv.spec().rope, kv.spec().head_dim);
        let rows = self.slots.get_mut(qkv)?.chunks_exact_mut(qkv.cols as usize);
        for (token, row) in rows.enumerate() {
            let (rotated, value) = row.split_at_mut(row.len() - kv_heads * dim);
            let angles = rope.angles(self.inputs.positions[token]);
            rotated.chunks_exact_mut(dim).for_each(|head| rope::rotate(head, &angles));
            let slot = self.inputs.slot_mapping[token];
            if slot >= 0 {
                let key = &rotated[rotated.len() - kv_heads * dim..];
                kv.write(layer, slot, key, value)?;
            }
        }
        Ok(())
    }

    fn attention_paged(&mut self, qkv: Act, kv: &ReferenceKv, layer: u32, out: Act) -> Result<()> {
        attention::check_heads("attention_paged", qkv.cols as usize, kv)?;
        let query_cols = qkv.cols - 2 * kv.spec().num_kv_heads * kv.spec().head_dim;
        expect("attention_paged", "output columns", query_cols as usize, out.cols as usize)?;
        expect("attention_paged", "tokens", self.inputs.positions.len(), qkv.rows as usize)?;
        expect("attention_paged", "output rows", qkv.rows as usize, out.rows as usize)?;
        let (data, out) = self.slots.pair(qkv, out)?;
        attention::paged(&self.inputs, data, qkv.cols as usize, kv, layer, out)
    }

    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()> {
        let hidden = (heads.num_heads * heads.head_dim) as usize;
        expect("rope_2d", "columns", 3 * hidden, qkv.cols as usize)?;
        expect("rope_2d", "patches", self.vision.row_col.len(), qkv.rows as usize)?;
        let rope = VisionRope::new(heads);
        let rows = self.slots.get_mut(qkv)?.chunks_exact_mut(3 * hidden);
        for (row, row_col) in rows.zip(&self.vision.row_col) {
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
        let hidden = (heads.num_heads * heads.head_dim) as usize;
        expect("attention_varlen", "columns", 3 * hidden, qkv.cols as usize)?;
        expect("attention_varlen", "output columns", hidden, out.cols as usize)?;
        expect("attention_varlen", "patches", self.vision.row_col.len(), qkv.rows as usize)?;
        expect("attention_varlen", "output rows", qkv.rows as usize, out.rows as usize)?;
        let cu = match segments {
            Segments::Window => &self.vision.cu_window,
            Segments::Full => &self.vision.cu_full,
        };
        let (qkv, out) = self.slots.pair(qkv, out)?;
        attention::varlen(cu, qkv, heads, out)
    }

    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        let picked = match rows {
            GatherRows::Logits => &self.inputs.logit_rows[..],
            GatherRows::Scores { from } => {
                validate::score_tile(&self.inputs, from, y.rows)?
            }
            GatherRows::InverseWindow => &self.vision.inverse[..],
        };
        expect("gather_rows", "rows", picked.len(), y.rows as usize)?;
        expect("gather_rows", "columns", x.cols as usize, y.cols as usize)?;
        let cols = x.cols as usize;
        let (x, y) = self.slots.pair(x, y)?;
        for (y, row) in y.chunks_exact_mut(cols).zip(picked) {
            let source = x.chunks_exact(cols).nth(*row as usize).ok_or_else(|| {
                let reason = format!("row {row} lies outside of the batch");
                KernelError::Input { field: "gather_rows", reason }
            })?;
            y.copy_from_slice(source);
        }
        Ok(())
    }

    fn zero_blocks(&mut self, kv: &mut ReferenceKv) -> Result<()> {
        kv.zero(&self.inputs.zero_blocks)
    }

    fn copy_blocks(&mut self, kv: &mut ReferenceKv) -> Result<()> {
        kv.copy(&self.inputs.block_copies)
    }

    fn barrier(&mut self) -> Result<()> {
        self.communicator.barrier().map_err(collective("barrier"))
    }

    fn sampler_admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        self.sampler.admit(sequence)
    }

    fn sampler_release(&mut self, slot: SequenceSlot) {
        self.sampler.release(slot);
    }

    fn sample(&mut self, logits: Act, rows: &[SampleRow], late: &LateInputs) -> Result<()> {
        expect("sample", "logit rows", rows.len(), logits.rows as usize)?;
        let data = self.slots.get(logits)?;
        let for_rows = |rows: usize, body: &(dyn Fn(usize) + Sync)| (0..rows).for_each(body);
        let communicator = &mut self.communicator;
        let tokens = self.sampler.sample(communicator, data, rows, late, &for_rows)?;
        self.readback.tokens.extend(tokens);
        Ok(())
    }

    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()> {
        expect("score_rows", "logit rows", rows.len(), logits.rows as usize)?;
        let data = self.slots.get(logits)?;
        let for_rows = |rows: usize, body: &(dyn Fn(usize) + Sync)| (0..rows).for_each(body);
        let scores = self.sampler.score(&mut self.communicator, data, rows, &for_rows)?;
        self.readback.scores.extend(scores);
        Ok(())
    }
}
