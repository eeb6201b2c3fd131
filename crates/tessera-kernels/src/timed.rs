//! A backend that measures another: how long each kind of operation keeps the rank thread. On a backend that
//! computes at once this is the whole time; on one that enqueues it is what enqueuing costs.

use std::time::{Duration, Instant};

use tessera_collective::Communicator;
use tessera_types::{LateInputs, SequenceSlot};

use crate::act::{Act, ActKind, SlotSpec};
use crate::backend::{Backend, Caps, Epilogue, GatherRows, GraphKey, HeadShape, KvSpec, Segments};
use crate::error::Result;
use crate::inputs::{
    HostRows, MemoryReport, Readback, SampleRow, SamplerSequence, ScoreRow, StepInputs, StepLimits,
    VisionInputs,
};
use crate::progress::Progress;
use crate::weights::{LinearSpec, NormSpec, SliceReader};

/// Time spent in one operation at one width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpTime {
    pub operation: &'static str,
    /// Columns of what the operation reads and of what it writes; 0 where it has no such thing.
    pub cols: [u32; 2],
    pub calls: u32,
    pub time: Duration,
}

/// `B`, measured. Operations outside of [`OpTime`] (loading, planning, the sampler's table) are passed on.
#[derive(Debug)]
pub struct Timed<B> {
    inner: B,
    times: Vec<OpTime>,
}

impl<B: Backend> Timed<B> {
    pub fn new(inner: B) -> Self {
        Self { inner, times: Vec::new() }
    }

    /// What was measured since the last call, in the order in which operations first ran.
    pub fn take(&mut self) -> Vec<OpTime> {
        std::mem::take(&mut self.times)
    }

    fn time<T>(
        &mut self,
        operation: &'static str,
        cols: [u32; 2],
        run: impl FnOnce(&mut B) -> T,
    ) -> T {
        let start = Instant::now();
        let result = run(&mut self.inner);
        let time = start.elapsed();
        let same = |known: &&mut OpTime| known.operation == operation && known.cols == cols;
        match self.times.iter_mut().find(same) {
            Some(known) => (known.calls, known.time) = (known.calls + 1, known.time + time),
            None => self.times.push(OpTime { operation, cols, calls: 1, time }),
        }
        result
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Linear = B::Linear;
    type Norm = B::Norm;
    type Kv = B::Kv;
    type Ticket = B::Ticket;

    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn progress(&self) -> Progress {
        self.inner.progress()
    }

    fn load_linear(&mut self, spec: &LinearSpec, src: &dyn SliceReader) -> Result<B::Linear> {
        self.inner.load_linear(spec, src)
    }

    fn load_norm(&mut self, spec: &NormSpec, src: &dyn SliceReader) -> Result<B::Norm> {
        self.inner.load_norm(spec, src)
    }

    fn plan(&mut self, slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport> {
        self.inner.plan(slots, max)
    }

    fn alloc_kv(&mut self, spec: &KvSpec, num_blocks: u32) -> Result<B::Kv> {
        self.inner.alloc_kv(spec, num_blocks)
    }

    fn set_communicator(&mut self, communicator: Option<Communicator>) -> Result<()> {
        self.inner.set_communicator(communicator)
    }

    fn upload(&mut self, inputs: &StepInputs) -> Result<()> {
        self.time("upload", [0, 0], |b| b.upload(inputs))
    }

    fn upload_vision(&mut self, inputs: &VisionInputs) -> Result<()> {
        self.time("upload_vision", [0, 0], |b| b.upload_vision(inputs))
    }

    fn upload_rows(&mut self, dst: Act, at: u32, rows: HostRows<'_>) -> Result<()> {
        self.time("upload_rows", [0, dst.cols], |b| b.upload_rows(dst, at, rows))
    }

    fn download(&mut self, src: Act) -> Result<Vec<f32>> {
        self.time("download", [src.cols, 0], |b| b.download(src))
    }

    /// Runs `body` eagerly: operations are measured one by one, so none may be captured.
    fn run(&mut self, _key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        body(self)
    }

    fn submit(&mut self) -> Result<B::Ticket> {
        self.inner.submit()
    }

    fn wait(&mut self, ticket: B::Ticket, deadline: Instant) -> Result<Readback> {
        self.time("wait", [0, 0], |b| b.wait(ticket, deadline))
    }

    fn input_kind(&self, linear: &B::Linear) -> ActKind {
        self.inner.input_kind(linear)
    }

    fn layer_done(&mut self) {
        self.inner.layer_done();
    }

    fn embed_merge(&mut self, table: &B::Linear, visual: Act, x: Act) -> Result<()> {
        self.time("embed_merge", [0, x.cols], |b| b.embed_merge(table, visual, x))
    }

    fn all_reduce_norm(&mut self, residual: Act, norm: &B::Norm, y: Act) -> Result<()> {
        let cols = [residual.cols, y.cols];
        self.time("all_reduce_norm", cols, |b| b.all_reduce_norm(residual, norm, y))
    }

    fn row_parallel_add_norm(
        &mut self,
        x: Act,
        linear: &B::Linear,
        residual: Act,
        norm: &B::Norm,
        y: Act,
    ) -> Result<()> {
        self.time("row_parallel_add_norm", [x.cols, y.cols], |b| {
            b.row_parallel_add_norm(x, linear, residual, norm, y)
        })
    }

    fn rms_norm(&mut self, x: Act, norm: &B::Norm, y: Act) -> Result<()> {
        self.time("rms_norm", [x.cols, y.cols], |b| b.rms_norm(x, norm, y))
    }

    fn linear(&mut self, x: Act, linear: &B::Linear, epilogue: Epilogue, y: Act) -> Result<()> {
        self.time("linear", [x.cols, y.cols], |b| b.linear(x, linear, epilogue, y))
    }

    fn linear_swiglu(&mut self, x: Act, gate_up: &B::Linear, y: Act) -> Result<()> {
        self.time("linear_swiglu", [x.cols, y.cols], |b| b.linear_swiglu(x, gate_up, y))
    }

    fn rope_kv_write(&mut self, qkv: Act, kv: &mut B::Kv, layer: u32) -> Result<()> {
        self.time("rope_kv_write", [qkv.cols, 0], |b| b.rope_kv_write(qkv, kv, layer))
    }

    fn attention_paged(&mut self, qkv: Act, kv: &B::Kv, layer: u32, out: Act) -> Result<()> {
        let cols = [qkv.cols, out.cols];
        self.time("attention_paged", cols, |b| b.attention_paged(qkv, kv, layer, out))
    }

    fn rope_2d(&mut self, qkv: Act, heads: HeadShape) -> Result<()> {
        self.time("rope_2d", [qkv.cols, 0], |b| b.rope_2d(qkv, heads))
    }

    fn attention_varlen(
        &mut self,
        qkv: Act,
        heads: HeadShape,
        segments: Segments,
        out: Act,
    ) -> Result<()> {
        let operation = match segments {
            Segments::Window => "attention_varlen (window)",
            Segments::Full => "attention_varlen (full)",
        };
        let cols = [qkv.cols, out.cols];
        self.time(operation, cols, |b| b.attention_varlen(qkv, heads, segments, out))
    }

    fn gather_rows(&mut self, x: Act, rows: GatherRows, y: Act) -> Result<()> {
        self.time("gather_rows", [x.cols, y.cols], |b| b.gather_rows(x, rows, y))
    }

    fn zero_blocks(&mut self, kv: &mut B::Kv) -> Result<()> {
        self.time("zero_blocks", [0, 0], |b| b.zero_blocks(kv))
    }

    fn copy_blocks(&mut self, kv: &mut B::Kv) -> Result<()> {
        self.time("copy_blocks", [0, 0], |b| b.copy_blocks(kv))
    }

    fn barrier(&mut self) -> Result<()> {
        self.time("barrier", [0, 0], B::barrier)
    }

    fn sampler_admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        self.inner.sampler_admit(sequence)
    }

    fn sampler_release(&mut self, slot: SequenceSlot) {
        self.inner.sampler_release(slot);
    }

    fn sample(&mut self, logits: Act, rows: &[SampleRow], late: &LateInputs) -> Result<()> {
        self.time("sample", [logits.cols, 0], |b| b.sample(logits, rows, late))
    }

    fn score_rows(&mut self, logits: Act, rows: &[ScoreRow]) -> Result<()> {
        self.time("score_rows", [logits.cols, 0], |b| b.score_rows(logits, rows))
    }
}
