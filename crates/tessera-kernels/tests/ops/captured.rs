//! Steps that only decode, which a backend may capture and replay: they give what they give otherwise, read every
//! step's own inputs, and still refuse bad ones.

use tessera_kernels::{
    Backend, Epilogue, GraphKey, KernelError, KvSpec, RopeSpec, SamplerSequence, StepInputs,
    StepKind, StepLimits, TokenSource,
};
use tessera_types::{SamplingParams, SequenceSlot};

use crate::support::*;

backend_tests!(
    replayed_steps_give_what_others_give,
    replayed_steps_refuse_bad_inputs,
    a_new_epoch_replays_nothing_of_the_last,
);

const VOCAB: usize = 40;
const HIDDEN: usize = 64;
/// Two query heads, a key and a value.
const COLS: usize = 4 * 32;
const SEQUENCES: usize = 3;
const BLOCK_SIZE: u32 = 16;
const SAMPLED: SequenceSlot = SequenceSlot(2);

/// One layer of a decoder.
struct Layer<B: Backend> {
    embed: B::Linear,
    norm: B::Norm,
    qkv: B::Linear,
    kv: B::Kv,
    /// How often its operations were called.
    calls: usize,
}

impl<B: Backend> Layer<B> {
    fn load(b: &mut B) -> Self {
        let (mut noise, mut weights) = (Noise::new(80), MemoryWeights::default());
        weights.add("embed.weight", &[VOCAB, HIDDEN], &mut noise);
        weights.add("norm.weight", &[HIDDEN], &mut noise);
        weights.add("qkv.weight", &[COLS, HIDDEN], &mut noise);
        weights.add("qkv.bias", &[COLS], &mut noise);
        let embed = stacked(vec![part("embed", [VOCAB, HIDDEN], 0..VOCAB, 0..HIDDEN, false)]);
        let qkv = stacked(vec![part("qkv", [COLS, HIDDEN], 0..COLS, 0..HIDDEN, true)]);
        let rope = RopeSpec { theta: 1e4, sections: [6, 5, 5], yarn: None };
        let (num_layers, num_kv_heads, head_dim) = (1, 1, 32);
        let kv = KvSpec { num_layers, num_kv_heads, head_dim, block_size: BLOCK_SIZE, rope };
        Self {
            embed: b.load_linear(&embed, &weights).unwrap(),
            norm: b.load_norm(&norm_spec("norm.weight", HIDDEN), &weights).unwrap(),
            qkv: b.load_linear(&qkv, &weights).unwrap(),
            kv: b.alloc_kv(&kv, 16).unwrap(),
            calls: 0,
        }
    }

    /// Runs the uploaded step; attention's rows end in slot 4.
    fn run(&mut self, b: &mut B, kind: StepKind) -> Result<(), KernelError> {
        let tokens = SEQUENCES;
        let count = tokens as u32;
        b.run(GraphKey { tokens: count, seqs: count, rows: count, kind }, &mut |b| {
            self.calls += 1;
            let (x, normed) = (act(1, tokens, HIDDEN), native(b, 2, tokens, HIDDEN));
            let (qkv, out) = (native(b, 3, tokens, COLS), native(b, 4, tokens, 2 * 32));
            b.embed_merge(&self.embed, act(0, 1, HIDDEN), x)?;
            b.all_reduce_norm(x, &self.norm, normed)?;
            b.linear(normed, &self.qkv, Epilogue::None, qkv)?;
            b.rope_kv_write(qkv, &mut self.kv, 0)?;
            b.attention_paged(qkv, &self.kv, 0, out)?;
            b.layer_done();
            Ok(())
        })
    }
}

/// Token `at` of every sequence. Block tables widen when a second block is needed.
fn inputs(at: u32) -> StepInputs {
    let block = |sequence: u32, index: u32| 5 * sequence + 3 * index;
    let stride = at / BLOCK_SIZE + 1;
    let sequences = 0..SEQUENCES as u32;
    let mut token_source: Vec<TokenSource> =
        sequences.clone().map(|i| TokenSource::Host((7 * i + 3 * at) % VOCAB as u32)).collect();
    if at % 2 == 1 {
        token_source[1] = TokenSource::LastSampled(SAMPLED);
    }
    let slot = |i: u32| block(i, at / BLOCK_SIZE) * BLOCK_SIZE + at % BLOCK_SIZE;
    StepInputs {
        token_source,
        positions: sequences.clone().map(|i| [at as i32, (at + i) as i32, at as i32]).collect(),
        slot_mapping: sequences.clone().map(|i| i64::from(slot(i))).collect(),
        visual_row: vec![-1; SEQUENCES],
        cu_q: (0..=SEQUENCES as u32).collect(),
        kv_len: vec![at + 1; SEQUENCES],
        block_tables: sequences
            .clone()
            .flat_map(|i| (0..stride).map(move |k| block(i, k)))
            .collect(),
        block_table_stride: stride,
        logit_rows: sequences.collect(),
        ..StepInputs::default()
    }
}

fn ready<B: TestBackend>() -> (B::Backend, Layer<B::Backend>) {
    let mut b = planned::<B>(StepLimits { num_real_tokens: VOCAB as u32, ..LIMITS });
    let layer = Layer::load(&mut b);
    admit(&mut b);
    (b, layer)
}

fn admit<B: Backend>(b: &mut B) {
    let params = SamplingParams::default();
    b.sampler_admit(SamplerSequence {
        slot: SAMPLED,
        prompt: &[9, 11],
        output: &[],
        params: &params,
        eos_token_ids: &[],
        seed: 0,
    })
    .unwrap();
}

fn replayed_steps_give_what_others_give<B: TestBackend>() {
    const STEPS: u32 = 20;
    let run = |kind| {
        let (mut b, mut layer) = ready::<B>();
        let mut rows = Vec::new();
        for at in 0..STEPS {
            b.upload(&inputs(at)).unwrap();
            layer.run(&mut b, kind).unwrap();
            let ticket = b.submit().unwrap();
            b.wait(ticket, soon()).unwrap();
            rows.push(b.download(native(&b, 4, SEQUENCES, 2 * 32)).unwrap());
        }
        assert_eq!(b.progress().count(), u64::from(STEPS), "layers are counted in every step");
        (rows, layer.calls)
    };
    let (expected, calls) = run(StepKind::Mixed);
    assert_eq!(calls, STEPS as usize);
    let (found, calls) = run(StepKind::Decode);
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(expected.iter().all(|value| value.is_finite()), "step {at}");
        assert_eq!(found, expected, "step {at}");
    }
    // Once as it is, once to be captured.
    assert_eq!(calls, if B::CAPTURES { 2 } else { STEPS as usize });
}

fn replayed_steps_refuse_bad_inputs<B: TestBackend>() {
    let (mut b, mut layer) = ready::<B>();
    for at in 0..4 {
        b.upload(&inputs(at)).unwrap();
        layer.run(&mut b, StepKind::Decode).unwrap();
    }
    let mut outside = inputs(4);
    outside.slot_mapping[1] = 16 * 16;
    b.upload(&outside).unwrap();
    let error = layer.run(&mut b, StepKind::Decode).unwrap_err();
    assert!(matches!(error, KernelError::Input { field: "slot_mapping", .. }), "{error}");
    let mut outside = inputs(4);
    outside.block_tables[2] = 16;
    b.upload(&outside).unwrap();
    let error = layer.run(&mut b, StepKind::Decode).unwrap_err();
    assert!(matches!(error, KernelError::Input { field: "block_tables", .. }), "{error}");
    b.sampler_release(SAMPLED);
    b.upload(&inputs(5)).unwrap();
    let error = layer.run(&mut b, StepKind::Decode).unwrap_err();
    assert!(matches!(error, KernelError::VacantSlot { slot: SAMPLED }), "{error}");
}

fn a_new_epoch_replays_nothing_of_the_last<B: TestBackend>() {
    let (mut b, mut layer) = ready::<B>();
    let mut rows = Vec::new();
    for _ in 0..2 {
        for at in 0..6 {
            b.upload(&inputs(at)).unwrap();
            layer.run(&mut b, StepKind::Decode).unwrap();
        }
        rows.push(b.download(native(&b, 4, SEQUENCES, 2 * 32)).unwrap());
        let calls = std::mem::take(&mut layer.calls);
        assert_eq!(calls, if B::CAPTURES { 2 } else { 6 });
        b.set_communicator(None).unwrap();
        admit(&mut b);
        // Elsewhere in memory, while the old one still is where it was.
        let old = std::mem::replace(&mut layer, Layer::load(&mut b));
        drop(old);
    }
    assert_eq!(rows[0], rows[1]);
}
