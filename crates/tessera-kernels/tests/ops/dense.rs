//! Linears, norms and what is fused with them, on one rank and on several.

use tessera_kernels::{Backend, Epilogue, LinearSpec, PartLayout, WeightFormat};

use crate::support::*;

backend_tests!(
    linear_with_stacked_parts,
    linear_epilogues,
    swiglu,
    rms_norm,
    row_parallel_with_padding,
    all_reduce_norm_sums_ranks,
);

/// Abramowitz and Stegun 7.1.1 by Simpson's rule; shares nothing with the code under test.
fn erf(x: f64) -> f64 {
    let steps = 4000;
    let width = x / steps as f64;
    let at = |i: usize| (-(width * i as f64).powi(2)).exp();
    let inner: f64 = (1..steps).map(|i| at(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    2.0 / std::f64::consts::PI.sqrt() * width / 3.0 * (at(0) + inner + at(steps))
}

fn linear_with_stacked_parts<B: TestBackend>() {
    let (mut noise, mut weights) = (Noise::new(1), MemoryWeights::default());
    for (m, k, heads) in [(1, 24, [3, 1]), (5, 600, [4, 2]), (70, 48, [7, 1])] {
        let (q, kv) = (heads[0] * 16, heads[1] * 16);
        let wq = weights.add("q.weight", &[2 * q, k], &mut noise);
        let bq = weights.add("q.bias", &[2 * q], &mut noise);
        let wv = weights.add("v.weight", &[kv, k], &mut noise);
        let mut b = planned::<B>(LIMITS);
        // The second half of q's rows, padded by one head, then all of v, without a bias.
        let mut query = part("q", [2 * q, k], q..2 * q, 0..k, true);
        query.padded_rows = q + 16;
        let spec = stacked(vec![query, part("v", [kv, k], 0..kv, 0..k, false)]);
        let linear = b.load_linear(&spec, &weights).unwrap();
        let n = q + 16 + kv;
        assert_eq!(spec.out_features(), n);
        let x = noise.values(m * k);
        let (input, output) = (native(&b, 0, m, k), native(&b, 1, m, n));
        set(&mut b, input, &x);
        b.linear(input, &linear, Epilogue::None, output).unwrap();

        let mut w = wq[q * k..].to_vec();
        w.extend(vec![0.0; 16 * k]);
        w.extend(&wv);
        let mut bias = bq[q..].to_vec();
        bias.extend(vec![0.0; 16 + kv]);
        let twin = twin_linear(&wide(&x), &w, Some(&bias), k);
        assert_close::<B>(&b.download(output).unwrap(), &twin, "stacked linear");
    }
}

fn linear_epilogues<B: TestBackend>() {
    let (mut noise, mut weights) = (Noise::new(2), MemoryWeights::default());
    let (m, k, n) = (9, 40, 33);
    let w = weights.add("l.weight", &[n, k], &mut noise);
    let bias = weights.add("l.bias", &[n], &mut noise);
    let mut b = planned::<B>(LIMITS);
    let spec = stacked(vec![part("l", [n, k], 0..n, 0..k, true)]);
    let linear = b.load_linear(&spec, &weights).unwrap();
    let x = noise.values(m * k);
    let (input, output) = (native(&b, 0, m, k), native(&b, 1, m, n));
    set(&mut b, input, &x);
    let plain = twin_linear(&wide(&x), &w, Some(&bias), k);
    let gelu = |x: &f64| x * 0.5 * (1.0 + erf(x / 2f64.sqrt()));
    for (epilogue, output, twin) in [
        (Epilogue::None, output, plain.clone()),
        (Epilogue::F32Out, act(1, m, n), plain.clone()),
        (Epilogue::GeluErf, output, plain.iter().map(gelu).collect()),
    ] {
        b.linear(input, &linear, epilogue, output).unwrap();
        assert_close::<B>(&b.download(output).unwrap(), &twin, &format!("{epilogue:?}"));
    }
}

fn swiglu<B: TestBackend>() {
    let (mut noise, mut weights) = (Noise::new(3), MemoryWeights::default());
    let (m, k, inner) = (6, 72, 20);
    let gate = weights.add("gate.weight", &[inner, k], &mut noise);
    let gate_bias = weights.add("gate.bias", &[inner], &mut noise);
    let up = weights.add("up.weight", &[inner, k], &mut noise);
    let up_bias = weights.add("up.bias", &[inner], &mut noise);
    let mut b = planned::<B>(LIMITS);
    let parts = ["gate", "up"].map(|name| {
        let mut part = part(name, [inner, k], 0..inner, 0..k, true);
        part.padded_rows = 32;
        part
    });
    let spec = LinearSpec { layout: PartLayout::GateUp, ..stacked(parts.to_vec()) };
    let linear = b.load_linear(&spec, &weights).unwrap();
    let x: Vec<f32> = noise.values(m * k).iter().map(|x| x * 4.0).collect();
    let (input, output) = (native(&b, 0, m, k), native(&b, 1, m, 32));
    set(&mut b, input, &x);
    b.linear_swiglu(input, &linear, output).unwrap();

    let gate = twin_linear(&wide(&x), &gate, Some(&gate_bias), k);
    let up = twin_linear(&wide(&x), &up, Some(&up_bias), k);
    let silu = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>();
    let padded = silu.chunks_exact(inner).flat_map(|row| row.iter().copied().chain([0.0; 12]));
    let twin: Vec<f64> = padded.collect();
    assert_close::<B>(&b.download(output).unwrap(), &twin, "swiglu");
}

fn rms_norm<B: TestBackend>() {
    let (mut noise, mut weights) = (Noise::new(4), MemoryWeights::default());
    let (m, hidden) = (7, 96);
    let weight = weights.add("norm.weight", &[hidden], &mut noise);
    let mut b = planned::<B>(LIMITS);
    let norm = b.load_norm(&norm_spec("norm.weight", hidden), &weights).unwrap();
    let mut x = noise.values(m * hidden);
    // Rows of very different size, where epsilon counts and where it doesn't.
    x[..hidden].iter_mut().for_each(|x| *x *= 1e-3);
    x[hidden..2 * hidden].iter_mut().for_each(|x| *x *= 1e3);
    set(&mut b, act(0, m, hidden), &x);
    let output = native(&b, 1, m, hidden);
    b.rms_norm(act(0, m, hidden), &norm, output).unwrap();
    let twin = twin_norm(&wide(&x), &weight);
    assert_close::<B>(&b.download(output).unwrap(), &twin, "norm");
}

/// The inputs of a linear are cut over ranks, unevenly and with padding; the bias counts once.
fn row_parallel_with_padding<B: TestBackend>() {
    let (m, hidden, k) = (5, 64, 50);
    for world_size in [1, 2, 4] {
        let (mut noise, mut weights) = (Noise::new(5), MemoryWeights::default());
        let w = weights.add("o.weight", &[hidden, k], &mut noise);
        let bias = weights.add("o.bias", &[hidden], &mut noise);
        let norm_weight = weights.add("norm.weight", &[hidden], &mut noise);
        let (x, start) = (noise.values(m * k), noise.values(m * hidden));
        let padded = 16 * (50usize).div_ceil(16 * world_size);
        let results = on_ranks(world_size as u32, |communicator| {
            let (mut b, weights) = (planned::<B>(LIMITS), weights.clone());
            let rank = communicator.rank().index();
            b.set_communicator(Some(communicator)).unwrap();
            let cols = (rank * padded).min(k)..((rank + 1) * padded).min(k);
            let part = part("o", [hidden, k], 0..hidden, cols.clone(), rank == 0);
            let (layout, format) = (PartLayout::Stacked, WeightFormat::Dense);
            let spec = LinearSpec { parts: vec![part], padded_cols: padded, layout, format };
            let linear = b.load_linear(&spec, &weights).unwrap();
            let norm = b.load_norm(&norm_spec("norm.weight", hidden), &weights).unwrap();
            let local: Vec<f32> = x
                .chunks_exact(k)
                .flat_map(|row| {
                    let zeros = padded - cols.len();
                    row[cols.clone()].iter().copied().chain(std::iter::repeat_n(0.0, zeros))
                })
                .collect();
            let (input, residual) = (native(&b, 0, m, padded), act(1, m, hidden));
            let output = native(&b, 2, m, hidden);
            set(&mut b, input, &local);
            set(&mut b, residual, &start);
            b.row_parallel_add_norm(input, &linear, residual, &norm, output).unwrap();
            (b.download(residual).unwrap(), b.download(output).unwrap())
        });
        let product = twin_linear(&wide(&x), &w, Some(&bias), k);
        let sum: Vec<f64> = product.iter().zip(&start).map(|(p, s)| p + f64::from(*s)).collect();
        for (residual, y) in &results {
            assert_close::<B>(residual, &sum, "residual");
            assert_close::<B>(y, &twin_norm(&sum, &norm_weight), "norm of the residual");
            assert_eq!(residual, &results[0].0, "all ranks hold the same residual");
        }
    }
}

fn all_reduce_norm_sums_ranks<B: TestBackend>() {
    let (m, hidden) = (3, 32);
    for world_size in [1, 3] {
        let (mut noise, mut weights) = (Noise::new(6), MemoryWeights::default());
        let weight = weights.add("norm.weight", &[hidden], &mut noise);
        let shares: Vec<Vec<f32>> = (0..world_size).map(|_| noise.values(m * hidden)).collect();
        let results = on_ranks(world_size, |communicator| {
            let (mut b, weights) = (planned::<B>(LIMITS), weights.clone());
            let norm = b.load_norm(&norm_spec("norm.weight", hidden), &weights).unwrap();
            set(&mut b, act(0, m, hidden), &shares[communicator.rank().index()]);
            b.set_communicator(Some(communicator)).unwrap();
            let output = native(&b, 1, m, hidden);
            b.all_reduce_norm(act(0, m, hidden), &norm, output).unwrap();
            (b.download(act(0, m, hidden)).unwrap(), b.download(output).unwrap())
        });
        let at = |i: usize| shares.iter().map(|share| f64::from(share[i])).sum();
        let sum: Vec<f64> = (0..m * hidden).map(at).collect();
        for (residual, y) in &results {
            assert_close::<B>(residual, &sum, "sum over ranks");
            assert_close::<B>(y, &twin_norm(&sum, &weight), "norm of the sum");
        }
    }
}
