//! Rows of the CPU backend have the same bits alone and in a batch, in any chunks, on any number of
//! threads and with poisoned neighbours; on every instruction set that this machine has.

use tessera_kernels::{
    Backend, CpuBackend, CpuFormat, Epilogue, HeadShape, KvSpec, LinearSpec, PartLayout, RopeSpec,
    Segments, SlotId, SlotSpec, StepInputs, StepLimits, TokenSource, VisionInputs, cpu::Path,
};

use crate::support::*;

const FORMATS: [CpuFormat; 2] = [CpuFormat::Bf16, CpuFormat::F32];

/// Makes a backend with a given number of threads.
type Make<'a> = &'a dyn Fn(usize) -> CpuBackend;

/// Calls `check` for every format on every path of this machine.
fn on_every_path(check: impl Fn(&str, Make<'_>)) {
    for path in Path::ALL.into_iter().filter(|path| path.is_available()) {
        for format in FORMATS {
            check(&format!("{} {format:?}", path.name()), &|threads| {
                let mut b = CpuBackend::with_path(threads, format, path).unwrap();
                let slot = |id| SlotSpec {
                    slot: SlotId(id),
                    max_rows: 2100,
                    cols: 700,
                    dtype: tessera_kernels::DType::F32,
                };
                let limits = StepLimits {
                    max_tokens: 2100,
                    max_blocks_per_sequence: 200,
                    max_sequences: 4,
                    ..LIMITS
                };
                b.plan(&[0, 1, 2].map(slot), &limits).unwrap();
                b
            });
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// y `[m, n]` of one linear of this backend.
fn product(
    b: &mut CpuBackend,
    x: &[f32],
    linear: &LinearSpec,
    weights: &MemoryWeights,
) -> Vec<f32> {
    let (k, n) = (linear.in_features(), linear.out_features());
    let loaded = b.load_linear(linear, &weights.clone()).unwrap();
    let m = x.len() / k;
    set(b, act(0, m, k), x);
    match linear.layout {
        PartLayout::Stacked => {
            b.linear(act(0, m, k), &loaded, Epilogue::None, act(1, m, n)).unwrap();
            b.download(act(1, m, n)).unwrap()
        }
        PartLayout::GateUp => {
            b.linear_swiglu(act(0, m, k), &loaded, act(1, m, n / 2)).unwrap();
            b.download(act(1, m, n / 2)).unwrap()
        }
    }
}

#[test]
fn a_row_of_a_linear_alone_in_any_batch_and_on_any_threads() {
    // Odd sizes, a K of several slices, widths that end inside of a panel.
    let shapes = [(1, 5), (7, 33), (64, 32), (129, 96), (600, 45), (1100, 70)];
    on_every_path(|name, make| {
        for (k, n) in shapes {
            for layout in [PartLayout::Stacked, PartLayout::GateUp] {
                let (mut noise, mut weights) = (Noise::new(60), MemoryWeights::default());
                let names = if layout == PartLayout::Stacked { &["a"][..] } else { &["a", "b"] };
                let parts = names.iter().map(|module| {
                    weights.add(&format!("{module}.weight"), &[n, k], &mut noise);
                    weights.add(&format!("{module}.bias"), &[n], &mut noise);
                    part(module, [n, k], 0..n, 0..k, true)
                });
                let spec = LinearSpec { layout, ..stacked(parts.collect()) };
                let x: Vec<f32> = (0..57 * k).map(|_| noise.value() * 1.37).collect();
                let whole = bits(&product(&mut make(1), &x, &spec, &weights));
                for threads in [2, 3] {
                    let found = product(&mut make(threads), &x, &spec, &weights);
                    assert_eq!(bits(&found), whole, "{name}: {k} x {n} on {threads} threads");
                }
                let mut b = make(2);
                for m in [1, 2, 3, 5, 8, 13, 14, 15, 16, 29] {
                    let first = noise.index(0..57 - m);
                    // Neighbours in front and behind hold NaN.
                    let mut some = vec![f32::NAN; k];
                    some.extend(&x[first * k..(first + m) * k]);
                    some.extend(vec![f32::NAN; k]);
                    let found = product(&mut b, &some, &spec, &weights);
                    let alone = product(&mut b, &x[first * k..(first + m) * k], &spec, &weights);
                    let expected = &whole[first * n..(first + m) * n];
                    assert_eq!(bits(&found[n..(m + 1) * n]), expected, "{name}: {k} x {n}, {m}");
                    assert_eq!(bits(&alone), expected, "{name}: {k} x {n}, {m} rows alone");
                }
            }
        }
    });
}

#[test]
fn products_of_bf16_values_have_the_error_of_f32_sums() {
    let (k, n, m) = (1100, 70, 19);
    let (mut noise, mut weights) = (Noise::new(61), MemoryWeights::default());
    let w = weights.add("a.weight", &[n, k], &mut noise);
    let x = noise.values(m * k);
    let twin = twin_linear(&wide(&x), &w, None, k);
    let spec = stacked(vec![part("a", [n, k], 0..n, 0..k, false)]);
    on_every_path(|name, make| {
        let found = product(&mut make(2), &x, &spec, &weights);
        assert_close::<CpuF32>(&found, &twin, name);
    });
}

#[test]
fn rows_of_a_fused_norm_do_not_depend_on_threads() {
    let (m, k, hidden) = (70, 90, 300);
    on_every_path(|name, make| {
        let run = |threads: usize| {
            let (mut noise, mut weights) = (Noise::new(62), MemoryWeights::default());
            weights.add("o.weight", &[hidden, k], &mut noise);
            weights.add("norm.weight", &[hidden], &mut noise);
            let mut b = make(threads);
            let spec = stacked(vec![part("o", [hidden, k], 0..hidden, 0..k, false)]);
            let linear = b.load_linear(&spec, &weights).unwrap();
            let norm = b.load_norm(&norm_spec("norm.weight", hidden), &weights).unwrap();
            let (x, residual, y) = (act(0, m, k), act(1, m, hidden), act(2, m, hidden));
            set(&mut b, x, &noise.values(m * k));
            set(&mut b, residual, &noise.values(m * hidden));
            b.row_parallel_add_norm(x, &linear, residual, &norm, y).unwrap();
            (bits(&b.download(residual).unwrap()), bits(&b.download(y).unwrap()))
        };
        let one = run(1);
        assert!(run(2) == one && run(3) == one, "{name}");
    });
}

const HEADS: usize = 3;
const DIM: usize = 24;
const BLOCK: usize = 16;
const COLS: usize = (HEADS + 2) * DIM;

/// A prompt computed in chunks of `chunk`, with a poisoned token behind each; attention rows.
fn paged(b: &mut CpuBackend, len: usize, chunk: usize, rows: &[f32]) -> Vec<u32> {
    let rope = RopeSpec { theta: 1e4, sections: [4, 4, 4], yarn: None };
    let (num_kv_heads, block_size) = (1, BLOCK as u32);
    let spec = KvSpec { num_layers: 1, num_kv_heads, head_dim: DIM as u32, block_size, rope };
    let blocks = len.div_ceil(BLOCK) as u32;
    let mut kv = b.alloc_kv(&spec, blocks + 1).unwrap();
    let mut out = Vec::new();
    for first in (0..len).step_by(chunk) {
        let count = chunk.min(len - first);
        let mut inputs = StepInputs {
            token_source: vec![TokenSource::Host(0); count + 1],
            positions: (first..=first + count).map(|at| [at as i32, 3, at as i32 / 2]).collect(),
            visual_row: vec![-1; count + 1],
            cu_q: vec![0, count as u32],
            kv_len: vec![(first + count) as u32],
            block_tables: (0..blocks).rev().collect(),
            block_table_stride: blocks,
            ..StepInputs::default()
        };
        let slot = |at: usize| (blocks as usize - 1 - at / BLOCK) * BLOCK + at % BLOCK;
        inputs.slot_mapping = (first..first + count).map(|at| slot(at) as i64).collect();
        inputs.slot_mapping.push(-1);
        b.upload(&inputs).unwrap();
        let mut chunk = rows[first * COLS..(first + count) * COLS].to_vec();
        chunk.extend([f32::NAN; COLS]);
        let (qkv, result) = (act(0, count + 1, COLS), act(1, count + 1, HEADS * DIM));
        set(b, qkv, &chunk);
        b.rope_kv_write(qkv, &mut kv, 0).unwrap();
        b.attention_paged(qkv, &kv, 0, result).unwrap();
        out.extend(bits(&b.download(result).unwrap()[..count * HEADS * DIM]));
    }
    out
}

#[test]
fn paged_attention_in_any_chunks_and_on_any_threads() {
    // Beyond the chunk of 1,024 positions whose partial results are merged.
    let len = 1100;
    let rows = Noise::new(63).values(len * COLS);
    on_every_path(|name, make| {
        let whole = paged(&mut make(1), len, len, &rows);
        assert!(!whole.iter().any(|bits| f32::from_bits(*bits).is_nan()), "{name}");
        // Large chunks of a prompt are computed whole by one thread each, small ones position chunk by chunk.
        for (threads, chunk) in [(3, len), (2, 333), (1, 7), (2, 20), (3, 20)] {
            let found = paged(&mut make(threads), len, chunk, &rows);
            assert!(found == whole, "{name}: chunks of {chunk} on {threads} threads");
        }
    });
}

#[test]
fn vit_item_alone_and_packed() {
    let heads = HeadShape { num_heads: 2, head_dim: 80 };
    let row = 3 * 160;
    let lengths = [64, 200, 9, 130];
    let qkv = Noise::new(64).values(lengths.iter().sum::<usize>() * row);
    let attend = |b: &mut CpuBackend, lengths: &[usize], qkv: &[f32]| {
        let mut cu = vec![0u32];
        lengths.iter().for_each(|len| cu.push(cu[cu.len() - 1] + *len as u32));
        let patches = qkv.len() / row;
        let (cu_window, cu_full) = (cu, vec![0, patches as u32]);
        let row_col = vec![[0, 0]; patches];
        b.upload_vision(&VisionInputs { row_col, cu_window, cu_full, inverse: vec![] }).unwrap();
        set(b, act(0, patches, row), qkv);
        b.attention_varlen(act(0, patches, row), heads, Segments::Window, act(1, patches, 160))
            .unwrap();
        bits(&b.download(act(1, patches, 160)).unwrap())
    };
    on_every_path(|name, make| {
        let packed = attend(&mut make(1), &lengths, &qkv);
        assert_eq!(attend(&mut make(3), &lengths, &qkv), packed, "{name}: threads");
        let mut first = 0;
        for len in lengths {
            let alone = attend(&mut make(2), &[len], &qkv[first * row..(first + len) * row]);
            assert!(alone == packed[first * 160..(first + len) * 160], "{name}: {len} patches");
            first += len;
        }
    });
}

#[test]
fn equal_queries_of_a_long_segment_have_equal_results() {
    // More rows than one thread takes at once.
    let (len, dim) = (2100, 16);
    let heads = HeadShape { num_heads: 1, head_dim: dim as u32 };
    let mut qkv = Noise::new(65).values(len * 3 * dim);
    let query = qkv[10 * 3 * dim..][..dim].to_vec();
    qkv[2070 * 3 * dim..][..dim].copy_from_slice(&query);
    on_every_path(|name, make| {
        let mut b = make(2);
        let (row_col, cu) = (vec![[0, 0]; len], vec![0, len as u32]);
        let inputs = VisionInputs { row_col, cu_window: cu.clone(), cu_full: cu, inverse: vec![] };
        b.upload_vision(&inputs).unwrap();
        let (x, y) = (act(0, len, 3 * dim), act(1, len, dim));
        set(&mut b, x, &qkv);
        b.attention_varlen(x, heads, Segments::Full, y).unwrap();
        let out = bits(&b.download(y).unwrap());
        assert_eq!(out[10 * dim..11 * dim], out[2070 * dim..2071 * dim], "{name}");
        assert_ne!(out[10 * dim..11 * dim], out[11 * dim..12 * dim], "{name}");
    });
}

#[test]
fn paths_formats_and_nothing_else_are_in_the_numerics_id() {
    let id = |threads, format, path| {
        let b = CpuBackend::with_path(threads, format, path).unwrap();
        b.caps().numerics_id
    };
    let mut ids = Vec::new();
    for path in Path::ALL.into_iter().filter(|path| path.is_available()) {
        for format in FORMATS {
            assert_eq!(id(1, format, path), id(3, format, path));
            ids.push(id(1, format, path));
        }
    }
    let count = ids.len();
    ids.sort_by_key(|id| format!("{id:?}"));
    ids.dedup();
    assert_eq!(ids.len(), count);
}
