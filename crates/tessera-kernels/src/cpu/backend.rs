//! The operations of [`CpuBackend`], in terms of slots, inputs and kernels.

use std::time::Instant;

use tessera_collective::Communicator;
use tessera_types::{LateInputs, SequenceSlot, TokenId};

use super::linear::Output;
use super::rope::rotate_rows;
use super::{CpuBackend, CpuKv, CpuLinear, CpuNorm, CpuTicket, NAME, paged, segments};
use crate::act::{Act, ActKind, SlotSpec};
use crate::backend::{Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, Segments};
use crate::error::{KernelError, Result};
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs,
    StepLimits,
    VisionInputs,
};
use crate::progress::Progress;
use crate::reference::rope::{DecoderRope, VisionRope};
use crate::reference::sampler::Sampler;
use crate::reference::slots::Slots;
use crate::reference::{collective, expect, validate};
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
        self.progress.clone()
    }

    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<CpuLinear> {
        CpuLinear::load(spec, src, self.format, &self.compute)
    }

    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<CpuNorm> {
        CpuNorm::load(spec, src)
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

    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<CpuKv> {
        let sections = spec.rope.sections.iter().sum::<u32>() as usize;
        expect("alloc_kv", "sum of rope sections", spec.head_dim as usize / 2, sections)?;
        CpuKv::new(spec, self.format, num_blocks)
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
        self.decoder_angles.clear();
        Ok(())
    }

    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        validate::vision(inputs, &self.limits)?;
        self.vision.clone_from(inputs);
        self.vision_angles.clear();
        Ok(())
    }

    fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()> {
        expect("upload_rows", "columns", dst.cols as usize, rows.cols as usize)?;
        let (at, data) = (at as usize * dst.cols as usize, self.slots.get_mut(dst)?);
        let found = at + rows.values.len();
        let (operation, what, expected) = ("upload_rows", "end", dst.len());
        let target = data.get_mut(at..found);
        let target = target.ok_or(KernelError::Shape { operation, what, expected, found })?;
        target.copy_from_slice(rows.values);
        Ok(())
    }

    fn download(&mut self, src: Act) -> Result<Vec<f32>> {
        Ok(self.slots.get(src)?.to_vec())
    }

    fn run(&mut self, _key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        body(self)
    }

    fn submit(&mut self) -> Result<CpuTicket> {
        Ok(CpuTicket(std::mem::take(&mut self.readback)))
    }

    fn wait(&mut self, ticket: CpuTicket, _deadline: Instant) -> Result<Readback> {
        Ok(ticket.0)
    }

    fn input_kind(&self, _linear: &CpuLinear) -> ActKind {
        ActKind::Native
    }

    fn layer_done(&mut self) {
        self.progress.bump();
    }

    fn embed_merge(&mut self, table: &CpuLinear, visual: Act, x: Act) -> Result<()> {
        let hidden = x.cols as usize;
        expect("embed_merge", "tokens", self.inputs.token_source.len(), x.rows as usize)?;
        expect("embed_merge", "visual columns", hidden, visual.cols as usize)?;
        expect("embed_merge", "table columns", hidden, table.in_features())?;
        let sources = self.inputs.token_source.iter().zip(&self.inputs.visual_row);
        let tokens: Vec<(TokenId, i32)> = sources
            .map(|(source, visual_row)| Ok((self.token(*source)?, *visual_row)))
            .collect::<Result<_>>()?;
        let is_leader = self.communicator.rank().0 == 0;
        let (visual, x) = self.slots.pair(visual, x)?;
        for (row, (token, visual_row)) in x.chunks_exact_mut(hidden).zip(tokens) {
            row.fill(0.0);
            let Ok(visual_row) = usize::try_from(visual_row) else {
                table.embedding_row(token, row);
                continue;
            };
            if is_leader {
                row.copy_from_slice(picked(visual, hidden, visual_row, "visual_row")?);
            }
        }
        Ok(())
    }

    fn all_reduce_norm(&mut self, residual: Act, norm: &CpuNorm, y: Act) -> Result<()> {
        let data = self.slots.get_mut(residual)?;
        self.communicator.all_reduce_sum(data).map_err(collective("all_reduce_norm"))?;
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
        let x = self.slots.get(x)?;
        linear.apply(operation, &mut self.compute, x, Output::Plain, sum)?;
        self.communicator.all_reduce_sum(sum).map_err(collective(operation))?;
        let (residual, y) = self.slots.pair_mut(residual, y)?;
        norm.add_apply(&self.compute, sum, residual, y)
    }

    fn rms_norm(&mut self, x: Act, norm: &CpuNorm, y: Act) -> Result<()> {
        let (x, y) = self.slots.pair(x, y)?;
        norm.apply(&self.compute, x, y)
    }

    fn linear(&mut self, x: Act, linear: &CpuLinear, epilogue: Epilogue, y: Act) -> Result<()> {
        expect("linear", "outputs", y.cols as usize, linear.out_features())?;
        let output = match epilogue {
            Epilogue::None | Epilogue::F32Out => Output::Plain,
            Epilogue::GeluErf => Output::GeluErf,
        };
        let (x, y) = self.slots.pair(x, y)?;
        linear.apply("linear", &mut self.compute, x, output, y)
    }

    fn linear_swiglu(&mut self, x: Act, gate_up: &CpuLinear, y: Act) -> Result<()> {
        expect("linear_swiglu", "outputs", 2 * y.cols as usize, gate_up.out_features())?;
        let (x, y) = self.slots.pair(x, y)?;
        gate_up.apply("linear_swiglu", &mut self.compute, x, Output::SwiGlu, y)
    }

    fn rope_kv_write(&mut self, qkv: Act, kv: &mut CpuKv, layer: u32) -> Result<()> {
        paged::check_heads("rope_kv_write", qkv.cols as usize, kv)?;
        expect("rope_kv_write", "tokens", self.inputs.positions.len(), qkv.rows as usize)?;
        let spec = *kv.spec();
        let (dim, kv_heads) = (spec.head_dim as usize, spec.num_kv_heads as usize);
        let rope = DecoderRope::new(&spec.rope, spec.head_dim);
        let rows = self.inputs.positions.iter().map(|position| rope.angles(*position));
        let angles = self.decoder_angles.of((spec.rope, spec.head_dim), rows);
        let (data, cols) = (self.slots.get_mut(qkv)?, qkv.cols as usize);
        let rotated = cols - kv_heads * dim;
        rotate_rows(&self.compute, data, cols, rotated, dim, angles);
        for (row, slot) in data.chunks_exact(cols).zip(&self.inputs.slot_mapping) {
            if *slot >= 0 {
                let (keys, values) = (&row[rotated - kv_heads * dim..rotated], &row[rotated..]);
                kv.write(layer, *slot, keys, values)?;
            }
        }
        Ok(())
    }

    fn attention_paged(&mut self, qkv: Act, kv: &CpuKv, layer: u32, out: Act) -> Result<()> {
        let operation = "attention_paged";
        paged::check_heads(operation, qkv.cols as usize, kv)?;
        let query_cols = qkv.cols - 2 * kv.spec().num_kv_heads * kv.spec().head_dim;
        expect(operation, "output columns", query_cols as usize, out.cols as usize)?;
        expect(operation, "tokens", self.inputs.positions.len(), qkv.rows as usize)?;
        expect(operation, "output rows", qkv.rows as usize, out.rows as usize)?;
        let (data, out) = self.slots.pair(qkv, out)?;
        paged::paged(&self.compute, &self.inputs, data, qkv.cols as usize, kv, layer, out)
    }

    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()> {
        let (dim, hidden) = (heads.head_dim as usize, (heads.num_heads * heads.head_dim) as usize);
        expect("rope_2d", "columns", 3 * hidden, qkv.cols as usize)?;
        expect("rope_2d", "patches", self.vision.row_col.len(), qkv.rows as usize)?;
        let rope = VisionRope::new(heads);
        let rows = self.vision.row_col.iter().map(|row_col| rope.angles(*row_col));
        let angles = self.vision_angles.of(heads, rows);
        let data = self.slots.get_mut(qkv)?;
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
        let operation = "attention_varlen";
        let hidden = (heads.num_heads * heads.head_dim) as usize;
        expect(operation, "columns", 3 * hidden, qkv.cols as usize)?;
        expect(operation, "output columns", hidden, out.cols as usize)?;
        expect(operation, "patches", self.vision.row_col.len(), qkv.rows as usize)?;
        expect(operation, "output rows", qkv.rows as usize, out.rows as usize)?;
        let cu = match segments {
            Segments::Window => &self.vision.cu_window,
            Segments::Full => &self.vision.cu_full,
        };
        let (qkv, out) = self.slots.pair(qkv, out)?;
        segments::varlen(&self.compute, self.format, cu, qkv, heads, out)
    }

    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        let wanted = match rows {
            GatherRows::Logits => &self.inputs.logit_rows[..],
            GatherRows::Scores { from } => {
                validate::score_tile(&self.inputs, from, y.rows)?
            }
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

    fn zero_blocks(&mut self, kv: &mut CpuKv) -> Result<()> {
        kv.zero(&self.inputs.zero_blocks)
    }

    fn copy_blocks(&mut self, kv: &mut CpuKv) -> Result<()> {
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
        let pool = &self.compute.pool;
        let for_rows = |rows: usize, body: &(dyn Fn(usize) + Sync)| {
            pool.run(rows, &|_, row| body(row));
        };
        let communicator = &mut self.communicator;
        let tokens = self.sampler.sample(communicator, data, rows, late, &for_rows)?;
        self.readback.tokens.extend(tokens);
        Ok(())
    }

    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()> {
        expect("score_rows", "logit rows", rows.len(), logits.rows as usize)?;
        let data = self.slots.get(logits)?;
        let pool = &self.compute.pool;
        let for_rows = |rows: usize, body: &(dyn Fn(usize) + Sync)| {
            pool.run(rows, &|_, row| body(row));
        };
        let scores = self.sampler.score(&mut self.communicator, data, rows, &for_rows)?;
        self.readback.scores.extend(scores);
        Ok(())
    }
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
