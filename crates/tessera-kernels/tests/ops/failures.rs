//! Bad uploads, bad handles and aborted epochs end in typed errors.

use tessera_collective::CollectiveError;
use tessera_kernels::{
    Backend, KernelError, KvSpec, RopeSpec, SampleRow, SamplerSequence, StepInputs, StepLimits,
    TokenSource, VisionInputs,
};
use tessera_types::{BlockId, LateInputs, SamplingParams, SequenceId, SequenceSlot};

use crate::support::*;

backend_tests!(
    contradicting_step_inputs_are_refused_by_field,
    segments_that_miss_patches_are_refused,
    unknown_slots_wide_views_and_overlaps_are_refused,
    tokens_and_blocks_outside_of_their_tables_are_refused,
    an_aborted_epoch_fails_the_operation_that_reduces,
    a_new_epoch_starts_without_tokens_of_the_last,
    layers_are_counted_where_another_thread_can_see_it,
);

fn step(tokens: usize) -> StepInputs {
    StepInputs {
        token_source: vec![TokenSource::Host(0); tokens],
        positions: vec![[0; 3]; tokens],
        slot_mapping: vec![-1; tokens],
        visual_row: vec![-1; tokens],
        cu_q: vec![0, tokens as u32],
        kv_len: vec![tokens as u32],
        block_tables: vec![0, 1],
        block_table_stride: 2,
        ..StepInputs::default()
    }
}

fn contradicting_step_inputs_are_refused_by_field<B: TestBackend>() {
    type Edit = fn(&mut StepInputs);
    let cases: [(&str, Edit); 10] = [
        ("positions", |inputs| inputs.positions.truncate(1)),
        ("slot_mapping", |inputs| inputs.slot_mapping.push(0)),
        ("visual_row", |inputs| inputs.visual_row.clear()),
        ("cu_q", |inputs| inputs.cu_q = vec![0]),
        ("cu_q", |inputs| inputs.cu_q = vec![1, 3]),
        ("cu_q", |inputs| (inputs.cu_q[1], inputs.kv_len[0]) = (9, 9)),
        ("kv_len", |inputs| inputs.kv_len[0] = 2),
        ("block_tables", |inputs| inputs.block_tables.truncate(1)),
        ("logit_rows", |inputs| inputs.logit_rows = vec![0, 3]),
        ("token_source", |inputs| *inputs = step(513)),
    ];
    for (expected, edit) in cases {
        let mut inputs = step(3);
        planned::<B>(LIMITS).upload(&inputs).unwrap();
        edit(&mut inputs);
        let error = planned::<B>(LIMITS).upload(&inputs).unwrap_err();
        let found = matches!(&error, KernelError::Input { field, .. } if *field == expected);
        assert!(found, "{expected}: {error}");
    }
}

fn segments_that_miss_patches_are_refused<B: TestBackend>() {
    let good = VisionInputs {
        row_col: vec![[0, 0]; 8],
        cu_window: vec![0, 4, 8],
        cu_full: vec![0, 8],
        inverse: vec![1, 0],
    };
    planned::<B>(LIMITS).upload_vision(&good).unwrap();
    let bad = [
        VisionInputs { cu_full: vec![0, 7], ..good.clone() },
        VisionInputs { cu_window: vec![0, 8, 4], ..good.clone() },
        VisionInputs { inverse: vec![0, 2], ..good.clone() },
    ];
    for inputs in bad {
        let error = planned::<B>(LIMITS).upload_vision(&inputs).unwrap_err();
        assert!(matches!(error, KernelError::Input { .. }), "{error}");
    }
}

fn unknown_slots_wide_views_and_overlaps_are_refused<B: TestBackend>() {
    let mut b = planned::<B>(LIMITS);
    let norm = {
        let mut weights = MemoryWeights::default();
        weights.add("norm.weight", &[8], &mut Noise::new(50));
        b.load_norm(&norm_spec("norm.weight", 8), &weights).unwrap()
    };
    let error = b.download(act(9, 1, 8)).unwrap_err();
    assert!(matches!(error, KernelError::UnknownSlot(slot) if slot.0 == 9));
    let error = b.download(act(0, 513, 768)).unwrap_err();
    assert!(matches!(error, KernelError::SlotTooSmall { capacity: 393216, .. }));
    let error = b.rms_norm(act(1, 2, 8), &norm, native(&b, 1, 2, 8)).unwrap_err();
    assert!(matches!(error, KernelError::SlotOverlap { .. }));
}

fn tokens_and_blocks_outside_of_their_tables_are_refused<B: TestBackend>() {
    let mut b = planned::<B>(LIMITS);
    let (mut noise, mut weights) = (Noise::new(51), MemoryWeights::default());
    weights.add("embed.weight", &[16, 8], &mut noise);
    let spec = stacked(vec![part("embed", [16, 8], 0..16, 0..8, false)]);
    let embed = b.load_linear(&spec, &weights).unwrap();
    let mut inputs = step(1);
    inputs.token_source[0] = TokenSource::LastSampled(SequenceSlot(3));
    b.upload(&inputs).unwrap();
    let error = b.embed_merge(&embed, act(1, 0, 8), act(0, 1, 8)).unwrap_err();
    assert!(matches!(error, KernelError::VacantSlot { slot: SequenceSlot(3) }));

    let rope = RopeSpec { theta: 100.0, sections: [2, 1, 1], yarn: None };
    let spec = KvSpec { num_layers: 1, num_kv_heads: 1, head_dim: 8, block_size: 4, rope };
    let mut kv = b.alloc_kv(&spec, 2).unwrap();
    inputs.slot_mapping[0] = 8;
    b.upload(&inputs).unwrap();
    let qkv = native(&b, 0, 1, 24);
    set(&mut b, qkv, &[0.5; 24]);
    let error = b.rope_kv_write(qkv, &mut kv, 0).unwrap_err();
    assert!(matches!(error, KernelError::Input { field: "slot_mapping", .. }));
    inputs.zero_blocks = vec![BlockId(2)];
    b.upload(&inputs).unwrap();
    assert!(matches!(b.zero_blocks(&mut kv), Err(KernelError::Input { field: "zero_blocks", .. })));
}

fn an_aborted_epoch_fails_the_operation_that_reduces<B: TestBackend>() {
    let aborted = on_ranks(2, |communicator| {
        let mut b = planned::<B>(LIMITS);
        let mut weights = MemoryWeights::default();
        weights.add("norm.weight", &[8], &mut Noise::new(52));
        let norm = b.load_norm(&norm_spec("norm.weight", 8), &weights).unwrap();
        set(&mut b, act(0, 1, 8), &[1.0; 8]);
        let (is_first, handle) = (communicator.rank().0 == 0, communicator.abort_handle());
        b.set_communicator(Some(communicator)).unwrap();
        // Rank 0 never comes: it ends the epoch while rank 1 waits in the sum.
        if is_first {
            handle.abort("planted");
        }
        b.all_reduce_norm(act(0, 1, 8), &norm, act(1, 1, 8)).unwrap_err()
    });
    for error in aborted {
        let KernelError::Communicator { operation, source } = error else { panic!("{error}") };
        assert_eq!(operation, "all_reduce_norm");
        assert!(matches!(source, CollectiveError::Aborted { .. }), "{source}");
    }
}

fn a_new_epoch_starts_without_tokens_of_the_last<B: TestBackend>() {
    let mut b = planned::<B>(StepLimits { num_real_tokens: 8, ..LIMITS });
    let params = SamplingParams::default();
    let slot = SequenceSlot(1);
    let sequence = SamplerSequence {
        slot,
        prompt: &[1],
        output: &[],
        params: &params,
        eos_token_ids: &[],
        seed: 0,
    };
    b.sampler_admit(sequence).unwrap();
    set(&mut b, act(0, 1, 8), &[0.0; 8]);
    let row = SampleRow { slot, sequence: SequenceId(1), output_index: 0 };
    b.sample(act(0, 1, 8), &[row], &LateInputs::default()).unwrap();
    b.set_communicator(None).unwrap();
    let ticket = b.submit().unwrap();
    assert_eq!(b.wait(ticket, soon()).unwrap().tokens, []);
    let error = b.sample(act(0, 1, 8), &[row], &LateInputs::default()).unwrap_err();
    assert!(matches!(error, KernelError::VacantSlot { slot: SequenceSlot(1) }));
}

fn layers_are_counted_where_another_thread_can_see_it<B: TestBackend>() {
    let mut b = planned::<B>(LIMITS);
    let progress = b.progress();
    b.layer_done();
    b.layer_done();
    let ticket = b.submit().unwrap();
    b.wait(ticket, soon()).unwrap();
    assert_eq!(std::thread::spawn(move || progress.count()).join().unwrap(), 2);
}
