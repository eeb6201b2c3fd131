//! M-RoPE, the paged cache and paged attention against plain causal attention over whole sequences.

use tessera_kernels::{Backend, KvSpec, RopeSpec, StepInputs, TokenSource};
use tessera_types::{BlockCopy, BlockId};

use crate::support::*;

backend_tests!(
    paged_attention_equals_plain_attention,
    a_row_has_the_same_bits_in_any_batch_chunk_and_block,
    a_long_prompt_has_the_same_bits_in_any_chunks,
    copied_and_zeroed_blocks,
);

const NUM_BLOCKS: u32 = 128;

/// Shapes of one test model.
#[derive(Clone, Copy)]
struct Shape {
    query_heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
    theta: f64,
}

impl Shape {
    fn cols(&self) -> usize {
        (self.query_heads + 2 * self.kv_heads) * self.dim
    }

    fn sections(&self) -> [u32; 3] {
        let pairs = self.dim as u32 / 2;
        [pairs - 2 * (pairs * 3 / 8), pairs * 3 / 8, pairs * 3 / 8]
    }

    fn kv_spec(&self) -> KvSpec {
        KvSpec {
            num_layers: 2,
            num_kv_heads: self.kv_heads as u32,
            head_dim: self.dim as u32,
            block_size: self.block_size as u32,
            rope: RopeSpec { theta: self.theta, sections: self.sections(), yarn: None },
        }
    }
}

/// A sequence with all its rows before rotation.
struct Sequence {
    /// `[len, cols]`
    qkv: Vec<f32>,
    positions: Vec<[i32; 3]>,
    blocks: Vec<u32>,
    computed: usize,
}

impl Sequence {
    fn new(
        shape: &Shape,
        len: usize,
        blocks: &mut impl Iterator<Item = u32>,
        noise: &mut Noise,
    ) -> Self {
        Self {
            qkv: noise.values(len * shape.cols()),
            positions: (0..len).map(|_| [0, 1, 2].map(|_| noise.index(0..300) as i32)).collect(),
            blocks: blocks.take(len.div_ceil(shape.block_size)).collect(),
            computed: 0,
        }
    }

    fn len(&self) -> usize {
        self.positions.len()
    }
}

/// Rotates one head as the specification §8 says, in f64.
fn rotate(head: &[f32], position: [i32; 3], shape: &Shape) -> Vec<f64> {
    let half = shape.dim / 2;
    let [t, h, _] = shape.sections().map(|section| section as usize);
    let mut out = vec![0.0; shape.dim];
    for i in 0..half {
        let axis = if i < t {
            0
        } else if i < t + h {
            1
        } else {
            2
        };
        let frequency = shape.theta.powf(-2.0 * i as f64 / shape.dim as f64) as f32;
        let angle = f64::from(position[axis] as f32 * frequency);
        let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
        out[i] = a * angle.cos() - b * angle.sin();
        out[i + half] = b * angle.cos() + a * angle.sin();
    }
    out
}

/// Plain causal attention over a whole sequence, `[len, query_heads · dim]`.
fn twin(sequence: &Sequence, shape: &Shape) -> Vec<f64> {
    twin_from(sequence, shape, 0)
}

/// Rows of [`twin`] from token `first` on.
fn twin_from(sequence: &Sequence, shape: &Shape, first: usize) -> Vec<f64> {
    let Shape { query_heads, kv_heads, dim, .. } = *shape;
    let head =
        |token: usize, index: usize| &sequence.qkv[token * shape.cols() + index * dim..][..dim];
    let rotated =
        |token: usize, index: usize| rotate(head(token, index), sequence.positions[token], shape);
    let mut out = Vec::new();
    let keys: Vec<Vec<Vec<f64>>> = (0..kv_heads)
        .map(|kv| (0..sequence.len()).map(|token| rotated(token, query_heads + kv)).collect())
        .collect();
    for token in first..sequence.len() {
        for query_head in 0..query_heads {
            let kv = query_head / (query_heads / kv_heads);
            let query = rotated(token, query_head);
            let score = |key: &Vec<f64>| {
                let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                dot / (dim as f64).sqrt()
            };
            let scores: Vec<f64> = keys[kv][..=token].iter().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..dim {
                let value = |at: usize| f64::from(head(at, query_heads + kv_heads + kv)[i]);
                out.push(weights.iter().enumerate().map(|(at, w)| w / sum * value(at)).sum());
            }
        }
    }
    out
}

/// Computes the next `counts[i]` tokens of sequence i in one step, with `padding` poisoned tokens after
/// them, and returns the output rows of each sequence.
fn step<B: Backend>(
    b: &mut B,
    kv: &mut B::Kv,
    shape: &Shape,
    sequences: &mut [&mut Sequence],
    counts: &[usize],
    padding: usize,
) -> Vec<Vec<f32>> {
    let stride = sequences.iter().map(|sequence| sequence.blocks.len()).max().unwrap();
    let mut inputs =
        StepInputs { block_table_stride: stride as u32, cu_q: vec![0], ..StepInputs::default() };
    let mut rows = Vec::new();
    for (sequence, count) in sequences.iter().zip(counts) {
        for token in sequence.computed..sequence.computed + count {
            let block = sequence.blocks[token / shape.block_size];
            let slot = block as usize * shape.block_size + token % shape.block_size;
            inputs.slot_mapping.push(slot as i64);
            inputs.positions.push(sequence.positions[token]);
        }
        let (from, to) =
            (sequence.computed * shape.cols(), (sequence.computed + count) * shape.cols());
        rows.extend_from_slice(&sequence.qkv[from..to]);
        inputs.cu_q.push(inputs.slot_mapping.len() as u32);
        inputs.kv_len.push((sequence.computed + count) as u32);
        inputs.block_tables.extend(&sequence.blocks);
        inputs.block_tables.resize(inputs.kv_len.len() * stride, 0);
    }
    let tokens = inputs.slot_mapping.len() + padding;
    rows.resize(tokens * shape.cols(), f32::NAN);
    inputs.slot_mapping.resize(tokens, -1);
    inputs.positions.resize(tokens, [0; 3]);
    inputs.visual_row = vec![-1; tokens];
    inputs.token_source = vec![TokenSource::Host(0); tokens];
    b.upload(&inputs).unwrap();
    let query_cols = shape.query_heads * shape.dim;
    let (qkv, out) = (native(b, 0, tokens, shape.cols()), native(b, 1, tokens, query_cols));
    set(b, qkv, &rows);
    b.rope_kv_write(qkv, kv, 1).unwrap();
    b.attention_paged(qkv, kv, 1, out).unwrap();
    let out = b.download(out).unwrap();
    sequences.iter_mut().zip(counts).for_each(|(sequence, count)| sequence.computed += count);
    let bounds = inputs.cu_q.windows(2);
    bounds
        .map(|cu| out[cu[0] as usize * query_cols..cu[1] as usize * query_cols].to_vec())
        .collect()
}

fn shapes() -> [Shape; 4] {
    [
        Shape { query_heads: 4, kv_heads: 2, dim: 16, block_size: 4, theta: 100.0 },
        Shape { query_heads: 2, kv_heads: 1, dim: 128, block_size: 16, theta: 1e6 },
        Shape { query_heads: 7, kv_heads: 1, dim: 32, block_size: 1, theta: 1e4 },
        Shape { query_heads: 3, kv_heads: 3, dim: 32, block_size: 5, theta: 1e4 },
    ]
}

/// Block ids in no order.
fn scattered() -> impl Iterator<Item = u32> {
    (0..NUM_BLOCKS).map(|i| (i * 37 + 11) % NUM_BLOCKS)
}

fn paged_attention_equals_plain_attention<B: TestBackend>() {
    let mut noise = Noise::new(10);
    for shape in shapes() {
        let mut blocks = scattered();
        let lengths = [1, 40, 17, 29];
        let mut sequences: Vec<Sequence> = lengths
            .iter()
            .map(|len| Sequence::new(&shape, *len, &mut blocks, &mut noise))
            .collect();
        let mut b = planned::<B>(LIMITS);
        let mut kv = b.alloc_kv(&shape.kv_spec(), NUM_BLOCKS).unwrap();
        let mut outputs = vec![Vec::new(); sequences.len()];
        while sequences.iter().any(|sequence| sequence.computed < sequence.len()) {
            // Any mix: some sequences wait, some decode one token, some prefill a chunk.
            let counts: Vec<usize> = sequences
                .iter()
                .map(|sequence| noise.index(0..12).min(sequence.len() - sequence.computed))
                .collect();
            let mut all: Vec<&mut Sequence> = sequences.iter_mut().collect();
            let rows = step(&mut b, &mut kv, &shape, &mut all, &counts, 3);
            outputs.iter_mut().zip(rows).for_each(|(output, rows)| output.extend(rows));
        }
        for (sequence, output) in sequences.iter().zip(&outputs) {
            assert_close::<B>(output, &twin(sequence, &shape), "paged attention");
        }
    }
}

fn a_row_has_the_same_bits_in_any_batch_chunk_and_block<B: TestBackend>() {
    let shape = Shape { query_heads: 4, kv_heads: 2, dim: 16, block_size: 4, theta: 100.0 };
    // Longer than one tile of keys.
    let len = 300;
    let run = |chunk: usize, blocks: &mut dyn Iterator<Item = u32>, neighbours: bool| {
        let mut noise = Noise::new(11);
        let mut blocks = blocks;
        let mut sequence = Sequence::new(&shape, len, &mut blocks, &mut noise);
        let mut other = Sequence::new(&shape, 80, &mut blocks, &mut noise);
        let mut b =
            planned::<B>(tessera_kernels::StepLimits { max_blocks_per_sequence: 75, ..LIMITS });
        let mut kv = b.alloc_kv(&shape.kv_spec(), NUM_BLOCKS).unwrap();
        let mut output = Vec::new();
        while sequence.computed < len {
            let count = chunk.min(len - sequence.computed);
            let extra = 13.min(other.len() - other.computed);
            output.extend(if neighbours && extra > 0 {
                step(&mut b, &mut kv, &shape, &mut [&mut other, &mut sequence], &[extra, count], 2)
                    .remove(1)
            } else {
                step(&mut b, &mut kv, &shape, &mut [&mut sequence], &[count], 0).remove(0)
            });
        }
        output
    };
    let whole = run(len, &mut scattered(), false);
    assert_eq!(run(1, &mut scattered(), false), whole, "token by token");
    assert_eq!(run(67, &mut (0..NUM_BLOCKS), false), whole, "other blocks and chunks");
    assert_eq!(run(41, &mut scattered(), true), whole, "with neighbours");
}

fn a_long_prompt_has_the_same_bits_in_any_chunks<B: TestBackend>() {
    let shape = Shape { query_heads: 4, kv_heads: 1, dim: 128, block_size: 16, theta: 1e6 };
    // Beyond the chunk of 1,024 positions whose partial results are merged.
    let len = 1100;
    let mut noise = Noise::new(13);
    let mut sequence = Sequence::new(&shape, len, &mut scattered(), &mut noise);
    let limits = tessera_kernels::StepLimits { max_blocks_per_sequence: 75, ..LIMITS };
    let mut b = planned::<B>(limits);
    let mut kv = b.alloc_kv(&shape.kv_spec(), NUM_BLOCKS).unwrap();
    let mut run = |from: usize, chunks: &[usize]| {
        sequence.computed = from;
        let mut rows = Vec::new();
        for chunk in chunks {
            rows.extend(
                step(&mut b, &mut kv, &shape, &mut [&mut sequence], &[*chunk], 1).remove(0),
            );
        }
        assert_eq!(sequence.computed, len);
        rows
    };
    let whole = run(0, &[400, 400, 300]);
    // Keys are in the cache: the rows of the last tokens, computed anew.
    let rows = |from: usize| &whole[from * shape.query_heads * shape.dim..];
    assert_eq!(run(1020, &[60, 20]), rows(1020), "a few tokens");
    assert_eq!(run(1090, &[1, 2, 3, 1, 1, 2]), rows(1090), "token by token");
    assert_close::<B>(rows(1090), &twin_from(&sequence, &shape, 1090), "the last tokens");
}

fn copied_and_zeroed_blocks<B: TestBackend>() {
    let shape = Shape { query_heads: 2, kv_heads: 1, dim: 32, block_size: 4, theta: 100.0 };
    let mut noise = Noise::new(12);
    let mut sequence = Sequence::new(&shape, 9, &mut [3, 5, 7].into_iter(), &mut noise);
    let expected = twin(&sequence, &shape);
    let mut b = planned::<B>(LIMITS);
    let mut kv = b.alloc_kv(&shape.kv_spec(), NUM_BLOCKS).unwrap();
    step(&mut b, &mut kv, &shape, &mut [&mut sequence], &[8], 0);

    // The last token reads the first two blocks through copies, the originals being zeroed after.
    let copy = |from, to| BlockCopy { from: BlockId(from), to: BlockId(to) };
    let mut inputs = StepInputs { cu_q: vec![0], ..StepInputs::default() };
    inputs.block_copies = vec![copy(3, 20), copy(5, 21)];
    b.upload(&inputs).unwrap();
    b.copy_blocks(&mut kv).unwrap();
    inputs.block_copies.clear();
    inputs.zero_blocks = vec![BlockId(3), BlockId(5)];
    b.upload(&inputs).unwrap();
    b.zero_blocks(&mut kv).unwrap();
    sequence.blocks = vec![20, 21, 7];
    let rows = step(&mut b, &mut kv, &shape, &mut [&mut sequence], &[1], 0);
    assert_close::<B>(&rows[0], &expected[8 * 64..], "through copied blocks");

    // Through the zeroed originals, the first eight keys and values are 0.
    sequence.blocks = vec![3, 5, 7];
    sequence.computed = 8;
    let rows = step(&mut b, &mut kv, &shape, &mut [&mut sequence], &[1], 0);
    for head in 0..2 {
        let rotated = |index: usize| {
            rotate(
                &sequence.qkv[8 * shape.cols() + index * 32..][..32],
                sequence.positions[8],
                &shape,
            )
        };
        let dot: f64 = rotated(head).iter().zip(rotated(2)).map(|(q, k)| q * k).sum();
        let score = (dot / 32f64.sqrt()).exp();
        let share = score / (score + 8.0);
        let value = &sequence.qkv[8 * shape.cols() + 3 * 32..][..32];
        let twin: Vec<f64> = value.iter().map(|value| share * f64::from(*value)).collect();
        assert_close::<B>(&rows[0][head * 32..(head + 1) * 32], &twin, "through zeroed blocks");
    }
}
