//! The vision tower's operations.

use tessera_kernels::{Backend, GatherRows, HeadShape, Segments, VisionInputs};

use crate::support::*;

backend_tests!(rope_2d, varlen_attention, inverse_gather);

const HEADS: HeadShape = HeadShape { num_heads: 3, head_dim: 40 };
const HIDDEN: usize = 120;

/// Segments of the given lengths, and patches somewhere on a grid.
fn inputs(windows: &[u32], full: &[u32], noise: &mut Noise) -> VisionInputs {
    let sums = |lengths: &[u32]| {
        let mut sums = vec![0];
        lengths.iter().for_each(|len| sums.push(sums.last().unwrap() + len));
        sums
    };
    let patches = windows.iter().sum::<u32>();
    VisionInputs {
        row_col: (0..patches)
            .map(|_| [noise.index(0..80) as u32, noise.index(0..80) as u32])
            .collect(),
        cu_window: sums(windows),
        cu_full: sums(full),
        inverse: (0..patches / 4).rev().collect(),
    }
}

fn rope_2d<B: TestBackend>() {
    let mut noise = Noise::new(20);
    let mut b = planned::<B>(LIMITS);
    let inputs = inputs(&[5, 4], &[9], &mut noise);
    b.upload_vision(&inputs).unwrap();
    let qkv = native(&b, 0, 9, 3 * HIDDEN);
    let values = noise.values(qkv.len());
    set(&mut b, qkv, &values);
    b.rope_2d(qkv, HEADS).unwrap();

    let mut twin = wide(&values);
    for (patch, row) in twin.chunks_exact_mut(3 * HIDDEN).enumerate() {
        for head in row[..2 * HIDDEN].chunks_exact_mut(40) {
            for i in 0..20 {
                // Ten frequencies follow the row, ten the column; pairs are (i, i + 20).
                let frequency = 10_000f64.powf(-2.0 * (i % 10) as f64 / 20.0) as f32;
                let at = inputs.row_col[patch][i / 10] as f32;
                let angle = f64::from(at * frequency);
                let (a, b) = (head[i], head[i + 20]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + 20] = b * angle.cos() + a * angle.sin();
            }
        }
    }
    assert_close::<B>(&b.download(qkv).unwrap(), &twin, "rotated");
}

fn twin_attention(qkv: &[f32], cu: &[u32], dim: usize) -> Vec<f64> {
    let hidden = 3 * dim;
    let at = |patch: usize, which: usize, head: usize| {
        wide(&qkv[patch * 3 * hidden + which * hidden + head * dim..][..dim])
    };
    let mut out = vec![0.0; qkv.len() / 3];
    for bounds in cu.windows(2) {
        let segment = bounds[0] as usize..bounds[1] as usize;
        for (patch, head) in segment.clone().flat_map(|patch| (0..3).map(move |head| (patch, head)))
        {
            let query = at(patch, 0, head);
            let score = |other: usize| {
                let dot: f64 = query.iter().zip(at(other, 1, head)).map(|(q, k)| q * k).sum();
                (dot / (dim as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = segment.clone().map(score).collect();
            let sum: f64 = weights.iter().sum();
            for (other, weight) in segment.clone().zip(&weights) {
                let value = at(other, 2, head);
                let out = &mut out[patch * hidden + head * dim..][..dim];
                out.iter_mut().zip(value).for_each(|(out, value)| *out += weight / sum * value);
            }
        }
    }
    out
}

fn varlen_attention<B: TestBackend>() {
    let mut noise = Noise::new(21);
    let mut b = planned::<B>(LIMITS);
    // Tiny windows, a whole one, one beyond a tile of queries; two frames.
    let inputs = inputs(&[4, 64, 16, 8, 100, 12], &[92, 112], &mut noise);
    b.upload_vision(&inputs).unwrap();
    // 80 is what the model has.
    for dim in [40, 80] {
        let heads = HeadShape { num_heads: 3, head_dim: dim as u32 };
        let (qkv, out) = (native(&b, 0, 204, 9 * dim), native(&b, 1, 204, 3 * dim));
        let values = noise.values(qkv.len());
        set(&mut b, qkv, &values);
        let all = [(Segments::Window, &inputs.cu_window), (Segments::Full, &inputs.cu_full)];
        for (segments, cu) in all {
            b.attention_varlen(qkv, heads, segments, out).unwrap();
            let twin = twin_attention(&values, cu, dim);
            let found = b.download(out).unwrap();
            assert_close::<B>(&found, &twin, &format!("{segments:?} of {dim}"));
        }
    }
}

fn inverse_gather<B: TestBackend>() {
    let mut noise = Noise::new(22);
    let mut b = planned::<B>(LIMITS);
    b.upload_vision(&inputs(&[12, 8], &[20], &mut noise)).unwrap();
    let values = noise.values(5 * 64);
    set(&mut b, act(0, 5, 64), &values);
    b.gather_rows(act(0, 5, 64), GatherRows::InverseWindow, act(1, 5, 64)).unwrap();
    let reversed: Vec<f32> = values.chunks_exact(64).rev().flatten().copied().collect();
    assert_eq!(b.download(act(1, 5, 64)).unwrap(), reversed);
}
