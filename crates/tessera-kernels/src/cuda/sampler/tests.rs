//! The device's draws against the host's, over random rows and parameters. They need a driver, or the emulated one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_types::{LateInputs, SamplingParams, SequenceId, SequenceSlot, TokenMask};

use super::*;
use crate::cuda_error::CudaError;
use crate::sampling::{DrawError, SamplerState, logprobs, process_row};

/// Numbers without pattern.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// In 0..end.
    fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 33) as usize) % end
    }

    /// In [−0.5, 0.5).
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5
    }

    /// About normal, of variance 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.value()).sum()
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }

    /// A row of logits: smooth, with ties, flat, peaked, or mostly barred.
    fn row(&mut self, vocab: usize) -> Vec<f32> {
        let spread = self.pick(&[0.5, 2.0, 6.0]);
        let grid = self.pick(&[0.0, 0.0, 0.5]);
        let kind = self.below(6);
        let mut row: Vec<f32> = (0..vocab)
            .map(|_| {
                let value = self.normal() * spread;
                if grid > 0.0 { (value / grid).round() * grid } else { value }
            })
            .collect();
        match kind {
            0 => row.fill(1.25),
            1 => {
                let at = self.below(vocab);
                row[at] += 30.0;
            }
            2 => row.iter_mut().for_each(|logit| {
                if self.below(10) > 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }),
            _ => {}
        }
        row
    }

    fn params(&mut self, vocab: usize) -> SamplingParams {
        let mut params = SamplingParams {
            temperature: self.pick(&[0.0, 1.0, 1.0, 0.7, 1.7]),
            max_tokens: 100,
            ..SamplingParams::default()
        };
        if self.below(2) == 0 {
            params.top_p = self.pick(&[1.0, 0.95, 0.8, 0.5, 0.9999, 1e-6]);
            params.top_k = self.pick(&[0, 0, 1, 20, 50, 700, 2500, 1 << 20]);
            params.min_p = self.pick(&[0.0, 0.0, 0.05, 0.5, 1.0]);
        }
        if self.below(2) == 0 {
            params.repetition_penalty = self.pick(&[1.0, 1.05, 0.8, 2.0]);
            params.presence_penalty = self.pick(&[0.0, 0.3, -0.2]);
            params.frequency_penalty = self.pick(&[0.0, 0.4, -0.1]);
        }
        if self.below(3) == 0 {
            let count = 1 + self.below(20);
            params.logit_bias =
                self.tokens(count, vocab + 5).into_iter().map(|t| (t, 0.0)).collect();
            params.logit_bias.sort_by_key(|(token, _)| *token);
            params.logit_bias.iter_mut().for_each(|(_, bias)| *bias = self.value() * 8.0);
        }
        if self.below(3) == 0 {
            params.min_tokens = 1 + self.below(4) as u32;
            params.stop_token_ids = self.tokens(3, vocab + 5);
        }
        if self.below(3) == 0 {
            params.logprobs = Some(self.pick(&[0, 1, 5, 20]));
        }
        params.validate().unwrap();
        params
    }

    fn mask(&mut self, vocab: usize) -> TokenMask {
        let density = self.pick(&[2, 40, 500]);
        let short = self.below(3);
        let words = (vocab.div_ceil(64)).saturating_sub(short);
        let word = |noise: &mut Self| {
            (0..64).fold(0u64, |word, bit| word | u64::from(noise.below(density) == 0) << bit)
        };
        TokenMask { words: (0..words).map(|_| word(self)).collect::<Vec<_>>().into() }
    }
}

/// A GPU, or the emulation of one; `None` where there is no driver at all.
fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Err(KernelError::Cuda { source: CudaError::DriverMissing, .. }) => None,
        gpu => Some(gpu.unwrap()),
    }
}

/// Logits on the device.
fn upload(gpu: &Gpu, values: &[f32], into: &DeviceBuffer) {
    let bytes = size_of_val(values);
    let mut ring = StagingRing::new(gpu, 1, bytes).unwrap();
    ring.send_values(gpu, into.ptr(), values, crate::act::DType::F32).unwrap();
    gpu.synchronize().unwrap();
}

fn read(gpu: &Gpu, sampler: &mut DeviceSampler) -> Result<Readback> {
    let drawn = sampler.submit(gpu).unwrap();
    gpu.record().unwrap().wait(Instant::now() + Duration::from_secs(60)).unwrap();
    sampler.read(&drawn)
}

fn sample_row(slot: usize, output_index: u32) -> SampleRow {
    SampleRow { slot: SequenceSlot(slot as u32), sequence: SequenceId(slot as u64), output_index }
}

/// Sequences with random parameters draw a few tokens each, on the device and on the host.
fn compare(gpu: &Gpu, (vocab, cols): (usize, usize), num_slots: usize, rounds: u64, salt: u64) {
    let mut noise = Noise(salt * 0x9E37_79B9 + 1);
    let limits = StepLimits {
        max_tokens: 8,
        max_sequences: num_slots as u32,
        num_real_tokens: vocab as u32,
        ..StepLimits::default()
    };
    let mut sampler = DeviceSampler::new(gpu, &limits).unwrap();
    let device = gpu.alloc(num_slots * cols * 4).unwrap();
    for _ in 0..rounds {
        let mut states = Vec::new();
        for slot in 0..num_slots {
            let params = noise.params(vocab);
            let (prompt, output) = (1 + noise.below(40), noise.below(6));
            let (prompt, output) = (noise.tokens(prompt, vocab + 3), noise.tokens(output, vocab));
            let sequence = SamplerSequence {
                slot: SequenceSlot(slot as u32),
                prompt: &prompt,
                output: &output,
                params: &params,
                eos_token_ids: &[1, 2, vocab as u32],
                seed: noise.next(),
            };
            sampler.admit(gpu, &sequence).unwrap();
            states.push((SamplerState::new(&sequence), output.len() as u32));
        }
        for _ in 0..3 {
            // Those that can be drawn go together, each of the others alone.
            let (mut logits, mut rows, mut drawn) = (Vec::new(), Vec::new(), Vec::new());
            let mut late = LateInputs::default();
            for (slot, (state, output_index)) in states.iter().enumerate() {
                let mask = (noise.below(4) == 0).then(|| noise.mask(vocab));
                let mut row = noise.row(vocab);
                row.extend((vocab..cols).map(|_| f32::NAN));
                let host =
                    process_row(&mut row.clone(), state, mask.as_ref(), *output_index, vocab);
                let masks: Vec<_> =
                    mask.map(|mask| (SequenceSlot(slot as u32), mask)).into_iter().collect();
                match host {
                    Ok(host) => {
                        logits.extend(row);
                        rows.push(sample_row(slot, *output_index));
                        drawn.push(host);
                        late.masks.extend(masks);
                    }
                    Err(expected) => {
                        upload(gpu, &row, &device);
                        let rows = [sample_row(slot, *output_index)];
                        let late = LateInputs { masks };
                        sampler.sample(gpu, (device.ptr(), cols as u32), &rows, &late).unwrap();
                        let found = read(gpu, &mut sampler);
                        let Err(KernelError::Draw { source, .. }) = found else {
                            panic!("{found:?}")
                        };
                        assert_eq!(source, expected);
                    }
                }
            }
            upload(gpu, &logits, &device);
            sampler.sample(gpu, (device.ptr(), cols as u32), &rows, &late).unwrap();
            let found = read(gpu, &mut sampler).unwrap().tokens;
            assert_eq!(found.len(), rows.len());
            for ((row, host), device) in rows.iter().zip(drawn).zip(found) {
                let (state, output_index) = &mut states[row.slot.index()];
                let params = state.params();
                assert_eq!(device.token, host.token, "token of {row:?}: {params:?}");
                assert_eq!(device.logprobs, host.logprobs, "{row:?}: {params:?}");
                assert_eq!(device.sequence, row.sequence);
                state.record(host.token);
                *output_index += 1;
            }
        }
    }
}

#[test]
fn the_device_draws_what_the_host_draws() {
    let Some(gpu) = gpu() else { return };
    for (salt, shape) in (1..).zip([(90, 90), (1000, 1024), (5003, 5008), (2999, 3001)]) {
        compare(&gpu, shape, 16, 12, salt);
    }
}

#[test]
fn a_whole_vocabulary_is_drawn_from_alike() {
    let Some(gpu) = gpu() else { return };
    compare(&gpu, (151_665, 152_064), 4, 1, 77);
}

#[test]
fn scores_are_those_of_the_host() {
    let Some(gpu) = gpu() else { return };
    let (vocab, cols) = (4999, 5000);
    let limits = StepLimits {
        max_tokens: 40,
        max_sequences: 1,
        num_real_tokens: vocab as u32,
        ..StepLimits::default()
    };
    let mut noise = Noise(5);
    let mut sampler = DeviceSampler::new(&gpu, &limits).unwrap();
    let device = gpu.alloc(20 * cols * 4).unwrap();
    let mut expected = Vec::new();
    // Two tiles of one step.
    for tile in [20, 7] {
        let (mut logits, mut rows) = (Vec::new(), Vec::new());
        for _ in 0..tile {
            let row = noise.row(vocab);
            let (target, num_top) = (noise.below(vocab) as u32, noise.pick(&[0, 3, 20]));
            expected.push(logprobs::token_logprobs(&row, target, num_top as usize));
            logits.extend(row);
            logits.push(f32::NAN);
            rows.push(ScoreRow { target, num_top });
        }
        upload(&gpu, &logits, &device);
        sampler.score(&gpu, (device.ptr(), cols as u32), &rows).unwrap();
    }
    assert_eq!(read(&gpu, &mut sampler).unwrap().scores, expected);

    let mut broken = vec![0.0; cols];
    broken[17] = f32::NAN;
    upload(&gpu, &broken, &device);
    let rows = [ScoreRow { target: 17, num_top: 0 }];
    sampler.score(&gpu, (device.ptr(), cols as u32), &rows).unwrap();
    let error = read(&gpu, &mut sampler).unwrap_err();
    assert!(matches!(error, KernelError::Input { field: "logits", .. }), "{error}");
    let beyond = [ScoreRow { target: vocab as u32, num_top: 0 }];
    assert!(sampler.score(&gpu, (device.ptr(), cols as u32), &beyond).is_err());
}

#[test]
fn a_row_that_cannot_be_drawn_is_told_and_leaves_the_slot_alone() {
    let Some(gpu) = gpu() else { return };
    let (vocab, cols) = (70, 72);
    let limits = StepLimits {
        max_tokens: 4,
        max_sequences: 2,
        num_real_tokens: vocab as u32,
        ..StepLimits::default()
    };
    let mut sampler = DeviceSampler::new(&gpu, &limits).unwrap();
    let device = gpu.alloc(cols * 4).unwrap();
    let slot = SequenceSlot(1);
    let draw = |sampler: &mut DeviceSampler, logits: &[f32], late: &LateInputs| {
        upload(&gpu, logits, &device);
        sampler.sample(&gpu, (device.ptr(), cols as u32), &[sample_row(1, 0)], late)?;
        read(&gpu, sampler)
    };
    let vacant = draw(&mut sampler, &vec![0.0; cols], &LateInputs::default()).unwrap_err();
    assert!(matches!(vacant, KernelError::VacantSlot { slot: SequenceSlot(1) }));
    for params in [
        SamplingParams::default(),
        SamplingParams { temperature: 1.0, ..SamplingParams::default() },
        SamplingParams {
            temperature: 1.0,
            top_k: 3,
            logprobs: Some(1),
            ..SamplingParams::default()
        },
    ] {
        let (prompt, eos_token_ids) = (&[4, 5][..], &[][..]);
        let sequence =
            SamplerSequence { slot, prompt, output: &[], params: &params, eos_token_ids, seed: 9 };
        sampler.admit(&gpu, &sequence).unwrap();
        let mut logits = vec![0.0; cols];
        (logits[33], logits[40]) = (f32::INFINITY, f32::NAN);
        let error = draw(&mut sampler, &logits, &LateInputs::default()).unwrap_err();
        let expected = DrawError::InvalidLogit { token: 33, value: f32::INFINITY };
        assert!(
            matches!(error, KernelError::Draw { slot: SequenceSlot(1), source } if source == expected)
        );
        let nothing = TokenMask { words: Arc::from([0, 0]) };
        let late = LateInputs { masks: vec![(slot, nothing)] };
        let error = draw(&mut sampler, &vec![0.0; cols], &late).unwrap_err();
        assert!(matches!(error, KernelError::Draw { source: DrawError::NothingAllowed, .. }));
        // The next embedding still reads what came with the sequence.
        let mut ring = StagingRing::new(&gpu, 1, 64).unwrap();
        let mut last = [0.0];
        let at = sampler.last_sampled() + 4;
        ring.receive_values(&gpu, at, &mut last, crate::act::DType::F32).unwrap();
        assert_eq!(last[0].to_bits(), 5);
    }
    sampler.clear();
    assert!(!sampler.is_held(slot));
}

#[test]
fn a_long_history_goes_up_in_parts() {
    let Some(gpu) = gpu() else { return };
    let (vocab, cols) = (3000, 3000);
    let limits = StepLimits {
        max_tokens: 4,
        max_sequences: 1,
        num_real_tokens: vocab as u32,
        ..StepLimits::default()
    };
    let mut noise = Noise(8);
    let mut sampler = DeviceSampler::new(&gpu, &limits).unwrap();
    let device = gpu.alloc(cols * 4).unwrap();
    let params = SamplingParams {
        repetition_penalty: 1.2,
        frequency_penalty: 0.01,
        logit_bias: vec![(7, 3.0)],
        ..SamplingParams::default()
    };
    let (prompt, output) = (noise.tokens(40_000, 1500), noise.tokens(50_000, 2500));
    let sequence = SamplerSequence {
        slot: SequenceSlot(0),
        prompt: &prompt,
        output: &output,
        params: &params,
        eos_token_ids: &[],
        seed: 3,
    };
    sampler.admit(&gpu, &sequence).unwrap();
    let mut state = SamplerState::new(&sequence);
    for output_index in 50_000..50_008 {
        let row = noise.row(vocab);
        let host = process_row(&mut row.clone(), &state, None, output_index, vocab).unwrap();
        upload(&gpu, &row, &device);
        let rows = [sample_row(0, output_index)];
        sampler.sample(&gpu, (device.ptr(), cols as u32), &rows, &LateInputs::default()).unwrap();
        assert_eq!(read(&gpu, &mut sampler).unwrap().tokens[0].token, host.token);
        state.record(host.token);
    }
}
