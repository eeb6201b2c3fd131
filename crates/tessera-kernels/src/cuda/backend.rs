//! The operations of [`CudaBackend`]: checks on the host, then launches.

use std::time::Instant;

use tessera_collective::Communicator;
use tessera_types::{LateInputs, SequenceSlot};

use super::attention::{self, PagedPtrs, PagedShape, VarlenPtrs};
use super::drawing::Drawing;
use super::elements::{self, EmbeddingTable, NormArgs, RopeDims};
use super::gemm::Product;
use super::slots::expect_dtype;
use super::{CudaBackend, CudaKv, CudaLinear, CudaNorm, CudaTicket, DevicePtr, NAME};
use crate::act::{Act, ActKind, DType, SlotSpec};
use crate::backend::{Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, Segments};
use crate::error::{KernelError, Result};
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits,
    VisionInputs,
};
use crate::progress::Progress;
use crate::reference::{collective, expect, host, validate};
use crate::weights::{LinearSpec, NormSpec, PartLayout, SliceReader};

impl Backend for CudaBackend {
    type Linear = CudaLinear;
    type Norm = CudaNorm;
    type Kv = CudaKv;
    type Ticket = CudaTicket;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn progress(&self) -> Progress {
        self.progress.clone()
    }

    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<CudaLinear> {
        let linear = self.loader.load(spec, src, self.dtype, &self.gpu, &mut self.staging)?;
        if spec.layout == PartLayout::GateUp {
            self.widest_gate_up = self.widest_gate_up.max(linear.outputs);
        }
        Ok(linear)
    }

    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<CudaNorm> {
        CudaNorm::load(spec, src, &self.gpu, &mut self.staging)
    }

    fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport> {
        self.plan_memory(slots, max)
    }

    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<CudaKv> {
        host::check_kv(spec)?;
        self.graphs.clear();
        CudaKv::new(&self.gpu, spec, num_blocks, self.dtype)
    }

    fn set_communicator(&mut self, communicator: Option<Communicator>) -> Result<()> {
        self.join(communicator.unwrap_or_else(Communicator::single))
    }

    fn upload(&mut self, inputs: &StepInputs) -> Result<()> {
        let drawing = &self.drawing;
        self.uploaded.upload(&self.gpu, inputs, &|slot| drawing.last_token(slot))
    }

    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        self.uploaded.upload_vision(&self.gpu, inputs)
    }

    fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()> {
        let operation = "upload_rows";
        expect(operation, "columns", dst.cols as usize, rows.cols as usize)?;
        let slot = self.slots.get(dst)?;
        let at = at as usize * dst.cols as usize;
        let (what, expected, found) = ("end", dst.len(), at + rows.values.len());
        if found > expected {
            return Err(KernelError::Shape { operation, what, expected, found });
        }
        let target = slot + (at * dst.dtype.size_bytes()) as u64;
        self.staging.send_values(&self.gpu, target, rows.values, dst.dtype)
    }

    fn download(&mut self, src: Act) -> Result<Vec<f32>> {
        let mut values = vec![0.0; src.len()];
        let from = self.slots.get(src)?;
        self.staging.receive_values(&self.gpu, from, &mut values, src.dtype)?;
        Ok(values)
    }

    fn run(&mut self, key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        self.run_step(key, body)
    }

    fn submit(&mut self) -> Result<CudaTicket> {
        self.submit_step()
    }

    fn wait(&mut self, ticket: CudaTicket, deadline: Instant) -> Result<Readback> {
        self.wait_step(ticket, deadline)
    }

    fn input_kind(&self, _linear: &CudaLinear) -> ActKind {
        ActKind::Native
    }

    fn layer_done(&mut self) {
        if let Err(error) = elements::bump_counter(&self.gpu, self.layers.device_ptr()) {
            self.failed.get_or_insert(error);
        }
    }

    fn embed_merge(&mut self, table: &CudaLinear, visual: Act, x: Act) -> Result<()> {
        let operation = "embed_merge";
        expect(operation, "table columns", x.cols as usize, table.inputs as usize)?;
        expect(operation, "tokens", self.uploaded.inputs.token_source.len(), x.rows as usize)?;
        expect(operation, "visual columns", x.cols as usize, visual.cols as usize)?;
        expect_dtype(operation, x, DType::F32)?;
        expect_dtype(operation, visual, DType::F32)?;
        let is_leader = self.communicator.rank().0 == 0;
        self.checks.embeds = true;
        self.checks.visual_rows = is_leader.then_some(visual.rows);
        self.uploaded.check_sources(|slot| self.drawing.is_held(slot))?;
        if is_leader {
            self.uploaded.check_visual(visual.rows)?;
        }
        let (visual, x) = self.slots.pair(visual, x)?;
        let table = EmbeddingTable {
            rows: table.weight.ptr(),
            first_token: table.first_rows.start as u32,
            num_rows: table.first_rows.len() as u32,
            hidden: table.inputs,
        };
        let (step, last) = (&self.uploaded.ptrs, self.drawing.last_sampled());
        let visual = is_leader.then_some(visual);
        elements::embed_merge(&self.gpu, self.dtype, &table, step, last, visual, x)
    }

    fn all_reduce_norm(&mut self, residual: Act, norm: &CudaNorm, y: Act) -> Result<()> {
        expect_dtype("all_reduce_norm", residual, DType::F32)?;
        let data = self.slots.get(residual)?;
        self.all_reduce("all_reduce_norm", data, residual.len())?;
        self.rms_norm(residual, norm, y)
    }

    fn row_parallel_add_norm(
        &mut self,
        x: Act,
        linear: &CudaLinear,
        residual: Act,
        norm: &CudaNorm,
        y: Act,
    ) -> Result<()> {
        let operation = "row_parallel_add_norm";
        expect(operation, "outputs", residual.cols as usize, linear.outputs as usize)?;
        expect(operation, "rows", residual.rows as usize, x.rows as usize)?;
        let args = self.norm_args(operation, residual, norm, y)?;
        let partial = self.reserve_partial(residual.len())?;
        self.multiply(operation, x, linear, (partial, DType::F32))?;
        self.all_reduce(operation, partial, residual.len())?;
        let (residual_at, y) = self.slots.pair(residual, y)?;
        let rows = residual.rows;
        elements::add_rms_norm(&self.gpu, self.dtype, partial, residual_at, &args, y, rows)
    }

    fn rms_norm(&mut self, x: Act, norm: &CudaNorm, y: Act) -> Result<()> {
        let args = self.norm_args("rms_norm", x, norm, y)?;
        let (from, to) = self.slots.pair(x, y)?;
        elements::rms_norm(&self.gpu, self.dtype, from, &args, to, x.rows)
    }

    fn linear(&mut self, x: Act, linear: &CudaLinear, epilogue: Epilogue, y: Act) -> Result<()> {
        let operation = "linear";
        expect(operation, "outputs", y.cols as usize, linear.outputs as usize)?;
        expect(operation, "rows", x.rows as usize, y.rows as usize)?;
        expect_layout(operation, linear, PartLayout::Stacked)?;
        if epilogue == Epilogue::F32Out {
            expect_dtype(operation, y, DType::F32)?;
        }
        let (_, to) = self.slots.pair(x, y)?;
        self.multiply(operation, x, linear, (to, y.dtype))?;
        match epilogue {
            Epilogue::None | Epilogue::F32Out => Ok(()),
            Epilogue::GeluErf => elements::gelu_erf(&self.gpu, y.dtype, to, y.rows, y.cols),
        }
    }

    fn linear_swiglu(&mut self, x: Act, gate_up: &CudaLinear, y: Act) -> Result<()> {
        let operation = "linear_swiglu";
        expect(operation, "outputs", 2 * y.cols as usize, gate_up.outputs as usize)?;
        expect(operation, "rows", x.rows as usize, y.rows as usize)?;
        expect_layout(operation, gate_up, PartLayout::GateUp)?;
        expect_dtype(operation, y, self.dtype)?;
        let (_, to) = self.slots.pair(x, y)?;
        let both = self.reserve_gate_up(2 * y.len())?;
        self.multiply(operation, x, gate_up, (both, self.dtype))?;
        elements::swiglu(&self.gpu, self.dtype, both, to, y.rows, y.cols)
    }

    fn rope_kv_write(&mut self, qkv: Act, kv: &mut CudaKv, layer: u32) -> Result<()> {
        let operation = "rope_kv_write";
        let heads = kv.query_heads(operation, qkv.cols)?;
        expect(operation, "tokens", self.uploaded.inputs.positions.len(), qkv.rows as usize)?;
        expect_dtype(operation, qkv, self.dtype)?;
        self.checks.kv = Some(kv.bounds);
        self.uploaded.check_kv(kv.bounds)?;
        let (data, cache) = (self.slots.get(qkv)?, kv.layer(layer)?);
        let KvSpec { num_kv_heads, head_dim, block_size, .. } = kv.spec;
        let dims = RopeDims { num_heads: heads, num_kv_heads, head_dim, block_size };
        let step = &self.uploaded.ptrs;
        elements::rope_kv_write(&self.gpu, self.dtype, data, step, cache, &kv.rope, &dims)
    }

    fn attention_paged(&mut self, qkv: Act, kv: &CudaKv, layer: u32, out: Act) -> Result<()> {
        let operation = "attention_paged";
        let KvSpec { num_kv_heads, head_dim, block_size, .. } = kv.spec;
        kv.query_heads(operation, qkv.cols)?;
        host::check_paged(&self.uploaded.inputs, qkv, &kv.spec, out)?;
        expect_dtype(operation, qkv, self.dtype)?;
        expect_dtype(operation, out, self.dtype)?;
        self.uploaded.check_kv(kv.bounds)?;
        let shape = PagedShape::new(qkv.cols, num_kv_heads, head_dim, block_size, self.dtype)?;
        self.uploaded.plan_paged(&self.gpu, &shape, self.is_capturing)?;
        let (qkv, out) = self.slots.pair(qkv, out)?;
        let (k_cache, v_cache) = kv.layer(layer)?;
        let ptrs = PagedPtrs {
            qkv,
            k_cache,
            v_cache,
            block_tables: self.uploaded.ptrs.block_tables,
            plan: self.uploaded.ptrs.plan,
            workspace: self.reserve_attention()?,
            out,
        };
        let plan = &self.uploaded.paged;
        attention::attention_paged(&self.gpu, &shape, &ptrs, plan, self.is_capturing)
    }

    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()> {
        host::check_vision("rope_2d", &self.uploaded.vision, qkv, heads)?;
        expect_dtype("rope_2d", qkv, self.dtype)?;
        let data = self.slots.get(qkv)?;
        let row_col = self.uploaded.vision_ptrs.row_col;
        if self.vision_rope.as_ref().is_none_or(|(of, _)| *of != heads) {
            self.vision_rope = Some((heads, elements::vision_frequencies(&self.gpu, heads)?));
        }
        let (_, frequencies) = self.vision_rope.as_ref().expect("just made where it was missing");
        elements::rope_2d(&self.gpu, self.dtype, data, row_col, frequencies, heads, qkv.rows)
    }

    fn attention_varlen(
        &mut self,
        qkv: Act,
        heads: HeadShape,
        segments: Segments,
        out: Act,
    ) -> Result<()> {
        host::segments(&self.uploaded.vision, qkv, heads, segments, out)?;
        expect_dtype("attention_varlen", qkv, self.dtype)?;
        expect_dtype("attention_varlen", out, self.dtype)?;
        let (qkv, out) = self.slots.pair(qkv, out)?;
        let ptrs = VarlenPtrs { qkv, plan: self.uploaded.vision_ptrs.plan, out };
        let plan = &self.uploaded.varlen;
        attention::attention_varlen(&self.gpu, self.dtype, heads, &ptrs, plan, segments)
    }

    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        let operation = "gather_rows";
        let (step, vision) = (&self.uploaded.ptrs, &self.uploaded.vision_ptrs);
        let inputs = &self.uploaded.inputs;
        let (wanted, list) = match rows {
            GatherRows::Logits => (&inputs.logit_rows[..], step.logit_rows),
            GatherRows::Scores { from } => {
                let first = step.score_rows + u64::from(from) * size_of::<u32>() as u64;
                (validate::score_tile(inputs, from, y.rows)?, first)
            }
            GatherRows::InverseWindow => (&self.uploaded.vision.inverse[..], vision.inverse),
        };
        expect(operation, "rows", wanted.len(), y.rows as usize)?;
        expect(operation, "columns", x.cols as usize, y.cols as usize)?;
        expect_dtype(operation, y, x.dtype)?;
        if let Some(row) = wanted.iter().find(|row| **row >= x.rows) {
            let reason = format!("row {row} lies outside of the slot's rows");
            return Err(KernelError::Input { field: operation, reason });
        }
        let (from, to) = self.slots.pair(x, y)?;
        elements::gather_rows(&self.gpu, x.dtype, from, list, to, y.rows, y.cols)
    }

    fn zero_blocks(&mut self, kv: &mut CudaKv) -> Result<()> {
        kv.bounds.check_zeros(&self.uploaded.inputs.zero_blocks)?;
        let step = &self.uploaded.ptrs;
        elements::zero_blocks(&self.gpu, &kv.planes(), step.zero_blocks, step.num_zero_blocks())
    }

    fn copy_blocks(&mut self, kv: &mut CudaKv) -> Result<()> {
        kv.bounds.check_copies(&self.uploaded.inputs.block_copies)?;
        let step = &self.uploaded.ptrs;
        elements::copy_blocks(&self.gpu, &kv.planes(), step.block_copies, step.num_block_copies())
    }

    fn barrier(&mut self) -> Result<()> {
        self.gpu.synchronize()?;
        self.communicator.barrier().map_err(collective("barrier"))
    }

    fn sampler_admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        self.drawing.admit(&self.gpu, sequence)
    }

    fn sampler_release(&mut self, slot: SequenceSlot) {
        self.drawing.release(slot);
    }

    fn sample(&mut self, logits: Act, rows: &[SampleRow], late: &LateInputs) -> Result<()> {
        expect("sample", "logit rows", rows.len(), logits.rows as usize)?;
        expect_dtype("sample", logits, DType::F32)?;
        let from = self.slots.get(logits)?;
        let (gpu, communicator) = (&self.gpu, &mut self.communicator);
        match &mut self.drawing {
            Drawing::Device(sampler) => sampler.sample(gpu, (from, logits.cols), rows, late),
            Drawing::Host(sampler) => {
                let mut values = vec![0.0; logits.len()];
                self.staging.receive_values(gpu, from, &mut values, DType::F32)?;
                sampler.sample(communicator, &values, rows, late)
            }
        }
    }

    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()> {
        expect("score_rows", "logit rows", rows.len(), logits.rows as usize)?;
        expect_dtype("score_rows", logits, DType::F32)?;
        let from = self.slots.get(logits)?;
        let (gpu, communicator) = (&self.gpu, &mut self.communicator);
        match &mut self.drawing {
            Drawing::Device(sampler) => sampler.score(gpu, (from, logits.cols), rows),
            Drawing::Host(sampler) => {
                let mut values = vec![0.0; logits.len()];
                self.staging.receive_values(gpu, from, &mut values, DType::F32)?;
                sampler.score(communicator, &values, rows)
            }
        }
    }
}

fn expect_layout(operation: &'static str, linear: &CudaLinear, layout: PartLayout) -> Result<()> {
    if linear.layout == layout {
        return Ok(());
    }
    let what = format!("{operation} of a linear laid out as {:?}", linear.layout);
    Err(KernelError::Unsupported { backend: NAME, what })
}

/// Steps of operations that several share.
impl CudaBackend {
    /// y of `output.1` = x · Wᵀ + bias.
    fn multiply(
        &mut self,
        operation: &'static str,
        x: Act,
        linear: &CudaLinear,
        (y, output): (DevicePtr, DType),
    ) -> Result<()> {
        expect(operation, "inputs", linear.inputs as usize, x.cols as usize)?;
        expect_dtype(operation, x, linear.dtype)?;
        let product = Product {
            weight: linear.weight.ptr(),
            bias: linear.bias(output),
            x: self.slots.get(x)?,
            y,
            rows: x.rows,
            outputs: linear.outputs,
            inputs: linear.inputs,
            dtype: linear.dtype,
            output,
        };
        self.gemm.multiply(&self.gpu, &product)
    }

    /// Checks the operands of a norm.
    fn norm_args(
        &self,
        operation: &'static str,
        x: Act,
        norm: &CudaNorm,
        y: Act,
    ) -> Result<NormArgs> {
        expect(operation, "columns", norm.size as usize, x.cols as usize)?;
        expect(operation, "output elements", x.len(), y.len())?;
        expect_dtype(operation, x, DType::F32)?;
        expect_dtype(operation, y, self.dtype)?;
        Ok(NormArgs { weight: norm.weight.ptr(), eps: norm.eps, cols: norm.size })
    }
}
