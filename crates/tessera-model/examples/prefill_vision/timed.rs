//! A backend that keeps the time of each kind of operation.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tessera_collective::Communicator;
use tessera_kernels::cpu::{CpuKv, CpuLinear, CpuNorm, CpuTicket};
use tessera_kernels::{
    Act, ActKind, Backend, Caps, CpuBackend, Epilogue, GatherRows, GraphKey, HeadShape, HostRows,
    KvSpec, LinearSpec, MemoryReport, NormSpec, Progress, Readback, Result, SampleRow,
    SamplerSequence, Segments, SliceReader, SlotSpec, StepInputs, StepLimits, VisionInputs,
};
use tessera_types::{LateInputs, SequenceSlot, TokenId};

/// The CPU backend, timed.
pub struct Timed {
    inner: CpuBackend,
    /// By operation and the columns of its input and output.
    seconds: BTreeMap<String, f64>,
    /// When each layer ended.
    pub layer_ends: Vec<Instant>,
}

impl Timed {
    pub fn new(inner: CpuBackend) -> Self {
        Self { inner, seconds: BTreeMap::new(), layer_ends: Vec::new() }
    }

    pub fn clear(&mut self) {
        self.seconds.clear();
    }

    /// Milliseconds per run of each kind of operation, over `runs` runs.
    pub fn print(&self, runs: usize) {
        for (operation, seconds) in &self.seconds {
            println!("{operation:<34} {:>9.1} ms", seconds * 1e3 / runs as f64);
        }
    }

    fn time(
        &mut self,
        operation: String,
        body: impl FnOnce(&mut CpuBackend) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        let result = body(&mut self.inner);
        let spent: Duration = start.elapsed();
        *self.seconds.entry(operation).or_default() += spent.as_secs_f64();
        result
    }
}

/// Operations that are timed under their name and shape.
macro_rules! timed {
    ($($name:ident($($argument:ident: $kind:ty),*), $input:ident => $output:ident;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> Result<()> {
            let operation = format!("{} {} → {}", stringify!($name), $input.cols, $output.cols);
            self.time(operation, |inner| inner.$name($($argument),*))
        })*
    };
}

/// Operations that are passed on.
macro_rules! passed {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner.$name($($argument),*)
        })*
    };
}

impl Backend for Timed {
    type Linear = CpuLinear;
    type Norm = CpuNorm;
    type Kv = CpuKv;
    type Ticket = CpuTicket;

    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn progress(&self) -> Progress {
        self.inner.progress()
    }

    fn input_kind(&self, linear: &CpuLinear) -> ActKind {
        self.inner.input_kind(linear)
    }

    fn run(&mut self, _key: GraphKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        body(self)
    }

    fn layer_done(&mut self) {
        self.layer_ends.push(Instant::now());
        self.inner.layer_done();
    }

    fn attention_varlen(
        &mut self,
        qkv: Act,
        heads: HeadShape,
        segments: Segments,
        out: Act,
    ) -> Result<()> {
        let operation = format!("attention_varlen {segments:?}");
        self.time(operation, |inner| inner.attention_varlen(qkv, heads, segments, out))
    }

    timed! {
        embed_merge(table: &CpuLinear, visual: Act, x: Act), visual => x;
        all_reduce_norm(residual: Act, norm: &CpuNorm, y: Act), residual => y;
        row_parallel_add_norm(x: Act, linear: &CpuLinear, residual: Act, norm: &CpuNorm, y: Act), x => y;
        rms_norm(x: Act, norm: &CpuNorm, y: Act), x => y;
        linear(x: Act, linear: &CpuLinear, epilogue: Epilogue, y: Act), x => y;
        linear_swiglu(x: Act, gate_up: &CpuLinear, y: Act), x => y;
        rope_kv_write(qkv: Act, kv: &mut CpuKv, layer: u32), qkv => qkv;
        attention_paged(qkv: Act, kv: &CpuKv, layer: u32, out: Act), qkv => out;
        rope_2d(qkv: Act, heads: HeadShape), qkv => qkv;
        gather_rows(x: Act, rows: GatherRows, y: Act), x => y;
    }

    passed! {
        load_linear(spec: &LinearSpec, src: &mut dyn SliceReader) -> Result<CpuLinear>;
        load_norm(spec: &NormSpec, src: &mut dyn SliceReader) -> Result<CpuNorm>;
        plan(slots: &[SlotSpec], max: &StepLimits) -> Result<MemoryReport>;
        alloc_kv(spec: &KvSpec, num_blocks: u32) -> Result<CpuKv>;
        set_communicator(communicator: Option<Communicator>) -> Result<()>;
        upload(inputs: &StepInputs) -> Result<()>;
        upload_vision(inputs: &VisionInputs) -> Result<()>;
        upload_rows(dst: Act, at: u32, rows: HostRows<'_>) -> Result<()>;
        download(src: Act) -> Result<Vec<f32>>;
        submit() -> Result<CpuTicket>;
        wait(ticket: CpuTicket, deadline: Instant) -> Result<Readback>;
        zero_blocks(kv: &mut CpuKv) -> Result<()>;
        copy_blocks(kv: &mut CpuKv) -> Result<()>;
        barrier() -> Result<()>;
        sampler_admit(sequence: SamplerSequence<'_>) -> Result<()>;
        sampler_release(slot: SequenceSlot) -> ();
        sample(logits: Act, rows: &[SampleRow], late: &LateInputs) -> Result<()>;
        score_rows(logits: Act, targets: &[TokenId]) -> Result<Vec<f32>>;
    }
}
