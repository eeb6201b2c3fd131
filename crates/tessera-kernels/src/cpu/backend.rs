//! The operations of [`CpuBackend`], in terms of slots, inputs and kernels.

use std::time::Instant;

use tessera_collective::Communicator;
use tessera_types::{LateInputs, SequenceSlot};

use super::linear::Output;
use super::rope::rotate_rows;
use super::{CpuBackend, CpuKv, CpuLinear, CpuNorm, CpuTicket, paged, segments};
use crate::act::{Act, ActKind, SlotSpec};
use crate::backend::{Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, Segments};
use crate::error::Result;
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits,
    VisionInputs,
};
use crate::progress::Progress;
use crate::reference::rope::{DecoderRope, VisionRope};
use crate::reference::{collective, expect, host};
use crate::weights::{LinearSpec, NormSpec, SliceReader};

impl Backend for CpuBackend {
    type Linear = CpuLinear;
    type Norm = CpuNorm;
    type Kv = CpuKv;
    type Ticket = CpuTicket;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn progress(&self) -> Progress {
        self.host.progress.clone()
    }

    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<CpuLinear> {
        CpuLinear::load(spec, src, self.format, &self.compute)
    }

    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<CpuNorm> {
        CpuNorm::load(spec, src)
    }

    fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport> {
        Ok(self.host.plan(slots, max))
    }

    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<CpuKv> {
        host::check_kv(spec)?;
        CpuKv::new(spec, self.format, num_blocks)
    }

    fn set_communicator(&mut self, communicator: Option<Communicator>) -> Result<()> {
        self.host.set_communicator(communicator);
        Ok(())
    }

    fn upload(&mut self, inputs: &StepInputs) -> Result<()> {
        self.decoder_angles.clear();
        self.host.upload(inputs)
    }

    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        self.vision_angles.clear();
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

    fn submit(&mut self) -> Result<CpuTicket> {
        Ok(CpuTicket(self.host.submit()))
    }

    fn wait(&mut self, ticket: CpuTicket, _deadline: Instant) -> Result<Readback> {
        Ok(ticket.0)
    }

    fn input_kind(&self, _linear: &CpuLinear) -> ActKind {
        ActKind::Native
    }

    fn layer_done(&mut self) {
        self.host.progress.bump();
    }

    fn embed_merge(&mut self, table: &CpuLinear, visual: Act, x: Act) -> Result<()> {
        expect("embed_merge", "table columns", x.cols as usize, table.in_features())?;
        self.host.embed_merge(visual, x, |token, row| {
            table.embedding_row(token, row);
            Ok(())
        })
    }

    fn all_reduce_norm(&mut self, residual: Act, norm: &CpuNorm, y: Act) -> Result<()> {
        self.host.all_reduce("all_reduce_norm", residual)?;
        self.rms_norm(residual, norm, y)
    }

    fn row_parallel_add_norm(
        &mut self,
        x: Act,
        linear: &CpuLinear,
        residual: Act,
        norm: &CpuNorm,
        y: Act,
    ) -> Result<()> {
        let operation = "row_parallel_add_norm";
        expect(operation, "outputs", residual.cols as usize, linear.out_features())?;
        self.partial.reserve(residual.len())?;
        let sum = &mut self.partial[..residual.len()];
        let x = self.host.slots.get(x)?;
        linear.apply(operation, &mut self.compute, x, Output::Plain, sum)?;
        self.host.communicator.all_reduce_sum(sum).map_err(collective(operation))?;
        let (residual, y) = self.host.slots.pair_mut(residual, y)?;
        norm.add_apply(&self.compute, sum, residual, y)
    }

    fn rms_norm(&mut self, x: Act, norm: &CpuNorm, y: Act) -> Result<()> {
        let (x, y) = self.host.slots.pair(x, y)?;
        norm.apply(&self.compute, x, y)
    }

    fn linear(&mut self, x: Act, linear: &CpuLinear, epilogue: Epilogue, y: Act) -> Result<()> {
        expect("linear", "outputs", y.cols as usize, linear.out_features())?;
        let output = match epilogue {
            Epilogue::None | Epilogue::F32Out => Output::Plain,
            Epilogue::GeluErf => Output::GeluErf,
        };
        let (x, y) = self.host.slots.pair(x, y)?;
        linear.apply("linear", &mut self.compute, x, output, y)
    }

    fn linear_swiglu(&mut self, x: Act, gate_up: &CpuLinear, y: Act) -> Result<()> {
        expect("linear_swiglu", "outputs", 2 * y.cols as usize, gate_up.out_features())?;
        let (x, y) = self.host.slots.pair(x, y)?;
        gate_up.apply("linear_swiglu", &mut self.compute, x, Output::SwiGlu, y)
    }

    fn rope_kv_write(&mut self, qkv: Act, kv: &mut CpuKv, layer: u32) -> Result<()> {
        paged::check_heads("rope_kv_write", qkv.cols as usize, kv)?;
        expect("rope_kv_write", "tokens", self.host.inputs.positions.len(), qkv.rows as usize)?;
        let spec = *kv.spec();
        let (dim, kv_heads) = (spec.head_dim as usize, spec.num_kv_heads as usize);
        let rows = || {
            let rope = DecoderRope::new(&spec.rope, spec.head_dim);
            self.host.inputs.positions.iter().map(move |position| rope.angles(*position))
        };
        let angles = self.decoder_angles.of((spec.rope, spec.head_dim), rows);
        let (data, cols) = (self.host.slots.get_mut(qkv)?, qkv.cols as usize);
        let rotated = cols - kv_heads * dim;
        rotate_rows(&self.compute, data, cols, rotated, dim, angles);
        for (row, slot) in data.chunks_exact(cols).zip(&self.host.inputs.slot_mapping) {
            if *slot >= 0 {
                let (keys, values) = (&row[rotated - kv_heads * dim..rotated], &row[rotated..]);
                kv.write(layer, *slot, keys, values)?;
            }
        }
        Ok(())
    }

    fn attention_paged(&mut self, qkv: Act, kv: &CpuKv, layer: u32, out: Act) -> Result<()> {
        paged::check_heads("attention_paged", qkv.cols as usize, kv)?;
        host::check_paged(&self.host.inputs, qkv, kv.spec(), out)?;
        let (data, out) = self.host.slots.pair(qkv, out)?;
        paged::paged(&self.compute, &self.host.inputs, data, qkv.cols as usize, kv, layer, out)
    }

    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()> {
        let hidden = host::check_vision("rope_2d", &self.host.vision, qkv, heads)?;
        let dim = heads.head_dim as usize;
        let rows = || {
            let rope = VisionRope::new(heads);
            self.host.vision.row_col.iter().map(move |row_col| rope.angles(*row_col))
        };
        let angles = self.vision_angles.of(heads, rows);
        let data = self.host.slots.get_mut(qkv)?;
        rotate_rows(&self.compute, data, 3 * hidden, 2 * hidden, dim, angles);
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
        segments::varlen(&self.compute, self.format, cu, qkv, heads, out)
    }

    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        self.host.gather_rows(x, rows, y)
    }

    fn zero_blocks(&mut self, kv: &mut CpuKv) -> Result<()> {
        kv.zero(&self.host.inputs.zero_blocks)
    }

    fn copy_blocks(&mut self, kv: &mut CpuKv) -> Result<()> {
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
        self.host.sample(logits, rows, late, &self.compute.for_rows())
    }

    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()> {
        self.host.score_rows(logits, rows, &self.compute.for_rows())
    }
}
