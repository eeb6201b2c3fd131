//! Widths and angles that small models don't reach: each kernel for runs of 16 bytes and the one for any size against the
//! host. They need a driver, or the emulated one.

use super::*;
use crate::cuda::staging::StagingRing;
use crate::cuda_error::CudaError;
use crate::reference::linear::gelu;
use crate::reference::rope::rotate;

/// A GPU, or the emulation of one; `None` where there is no driver at all.
fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Err(KernelError::Cuda { source: CudaError::DriverMissing, .. }) => None,
        gpu => Some(gpu.unwrap()),
    }
}

/// Numbers without pattern in [−2, 2).
fn noise(count: usize, salt: u32) -> Vec<f32> {
    let hash = |i: u32| (i ^ salt.wrapping_mul(0x9E37_79B9)).wrapping_mul(0x85EB_CA6B);
    (0..count as u32).map(|i| hash(hash(i) >> 3) as f32 / u32::MAX as f32 * 4.0 - 2.0).collect()
}

fn upload(gpu: &Gpu, values: &[f32]) -> DeviceBuffer {
    on_device(gpu, values).unwrap()
}

fn download(gpu: &Gpu, from: &DeviceBuffer, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    let mut ring = StagingRing::new(gpu, 1, count * 4).unwrap();
    ring.receive_values(gpu, from.ptr(), &mut values, DType::F32).unwrap();
    values
}

/// Words as the device holds them.
fn words(gpu: &Gpu, values: &[i32]) -> DeviceBuffer {
    let bits: Vec<f32> = values.iter().map(|value| f32::from_bits(value.cast_unsigned())).collect();
    upload(gpu, &bits)
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= 2e-6 * (1.0 + expected.abs()), "{what}: {i} is {found}, not {expected}");
    }
}

#[test]
fn norms_of_every_width_are_those_of_the_host() {
    let Some(gpu) = gpu() else { return };
    // Any width, four and eight elements per thread, wider than registers hold.
    for cols in [30usize, 128, 3584, 4100, 8192, 8196] {
        let rows = 3;
        let (partial, residual) = (noise(rows * cols, 1), noise(rows * cols, 2));
        let weight = noise(cols, 3);
        let sums: Vec<f32> = partial.iter().zip(&residual).map(|(a, b)| a + b).collect();
        let normed = |x: &[f32]| -> Vec<f32> {
            let rows = x.chunks_exact(cols);
            let normed = rows.flat_map(|row| {
                let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
                let scale = 1.0 / (squares / cols as f64 + 1e-6).sqrt();
                row.iter().zip(&weight).map(move |(x, w)| (f64::from(*x) * scale) as f32 * w)
            });
            normed.collect()
        };
        let weight_at = upload(&gpu, &weight);
        let norm = NormArgs { weight: weight_at.ptr(), eps: 1e-6, cols: cols as u32 };
        let (partial_at, residual_at) = (upload(&gpu, &partial), upload(&gpu, &residual));
        let y = gpu.alloc(rows * cols * 4).unwrap();
        rms_norm(&gpu, DType::F32, partial_at.ptr(), &norm, y.ptr(), rows as u32).unwrap();
        assert_close(&download(&gpu, &y, rows * cols), &normed(&partial), "rms_norm");
        let (partial_at, residual_ptr) = (partial_at.ptr(), residual_at.ptr());
        add_rms_norm(&gpu, DType::F32, partial_at, residual_ptr, &norm, y.ptr(), rows as u32)
            .unwrap();
        assert_eq!(download(&gpu, &residual_at, rows * cols), sums, "{cols} columns");
        assert_close(&download(&gpu, &y, rows * cols), &normed(&sums), "add_rms_norm");
    }
}

#[test]
fn activations_of_any_width_are_those_of_the_host() {
    let Some(gpu) = gpu() else { return };
    for cols in [6usize, 2048, 1030] {
        let values: Vec<f32> = noise(2 * 2 * cols, 4).iter().map(|x| x * 4.0).collect();
        let both = upload(&gpu, &values);
        let y = gpu.alloc(2 * cols * 4).unwrap();
        swiglu(&gpu, DType::F32, both.ptr(), y.ptr(), 2, cols as u32).unwrap();
        let rows = values.chunks_exact(2 * cols);
        let expected = rows.flat_map(|row| {
            let (gate, up) = row.split_at(cols);
            gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
        });
        let expected: Vec<f32> = expected.collect();
        let found = download(&gpu, &y, 2 * cols);
        found.iter().zip(&expected).for_each(|(found, expected)| {
            assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()));
        });
        gelu_erf(&gpu, DType::F32, both.ptr(), 2, 2 * cols as u32).unwrap();
        let expected: Vec<f32> = values.iter().map(|value| gelu(*value)).collect();
        assert_close(&download(&gpu, &both, 4 * cols), &expected, "gelu_erf");
    }
}

#[test]
fn far_positions_turn_as_on_the_host() {
    let Some(gpu) = gpu() else { return };
    // Runs of 16 bytes, and halves that are none.
    for head_dim in [128u32, 12] {
        let half = head_dim as usize / 2;
        let sections =
            [half as u32 / 2, half as u32 / 4, half as u32 - half as u32 / 2 - half as u32 / 4];
        let spec = RopeSpec { theta: 1e6, sections, yarn: None };
        let positions = [[0, 1, 2], [131_071, 5, 77_777], [40_000, 131_071, 9]];
        let flat: Vec<i32> = positions.iter().flatten().copied().collect();
        let positions_at = words(&gpu, &flat);
        // i64 −1: written nowhere.
        let slots_at = words(&gpu, &[-1, -1, 5, 0, 0, 0]);
        let cols = 3 * head_dim as usize;
        let values = noise(3 * cols, 6);
        let qkv = upload(&gpu, &values);
        let cache = gpu.alloc(2 * 16 * head_dim as usize * 4).unwrap();
        let half_cache = cache.ptr() + u64::from(16 * head_dim * 4);
        let step = StepPtrs {
            positions: positions_at.ptr(),
            slot_mapping: slots_at.ptr(),
            num_tokens: 3,
            ..StepPtrs::default()
        };
        let rope = RopeTables::new(&gpu, &spec, head_dim).unwrap();
        let dims = RopeDims { num_heads: 1, num_kv_heads: 1, head_dim, block_size: 16 };
        let caches = (cache.ptr(), half_cache);
        rope_kv_write(&gpu, DType::F32, qkv.ptr(), &step, caches, &rope, &dims).unwrap();
        let host = DecoderRope::new(&spec, head_dim);
        let mut expected = values;
        for (row, position) in expected.chunks_exact_mut(cols).zip(positions) {
            let angles = host.angles(position);
            let heads = row[..2 * head_dim as usize].chunks_exact_mut(head_dim as usize);
            heads.for_each(|head| rotate(head, &angles));
        }
        assert_close(&download(&gpu, &qkv, 3 * cols), &expected, "rotated");
        // Token 1 in slot 5, token 2 in slot 0, nothing else.
        let dim = head_dim as usize;
        let mut kept = vec![0.0; 2 * 16 * dim];
        for (token, slot) in [(1, 5), (2, 0)] {
            let row = &expected[token * cols..][..cols];
            kept[slot * dim..][..dim].copy_from_slice(&row[dim..2 * dim]);
            kept[(16 + slot) * dim..][..dim].copy_from_slice(&row[2 * dim..]);
        }
        assert_close(&download(&gpu, &cache, 2 * 16 * dim), &kept, "cache");
    }
}

#[test]
fn copies_of_blocks_follow_one_another() {
    let Some(gpu) = gpu() else { return };
    let (planes, blocks, len) = (3, 4, 12);
    let mut values = noise(planes * blocks * len, 9);
    let cache = upload(&gpu, &values);
    let kv = KvPlanes {
        base: cache.ptr(),
        num_planes: planes as u32,
        plane_bytes: (blocks * len * 4) as u64,
        block_bytes: (len * 4) as u32,
    };
    // The third pair is beyond the count.
    let (copies, zeros, counts) =
        (words(&gpu, &[0, 2, 2, 3, 0, 1]), words(&gpu, &[0]), words(&gpu, &[2, 1]));
    copy_blocks(&gpu, &kv, copies.ptr(), counts.ptr()).unwrap();
    zero_blocks(&gpu, &kv, zeros.ptr(), counts.ptr() + 4).unwrap();
    for plane in values.chunks_exact_mut(blocks * len) {
        plane.copy_within(..len, 2 * len);
        plane.copy_within(..len, 3 * len);
        plane[..len].fill(0.0);
    }
    assert_eq!(download(&gpu, &cache, values.len()), values);
}
