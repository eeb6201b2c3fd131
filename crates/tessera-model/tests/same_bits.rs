//! A sequence's logits have the same bits alone and in a batch, in any chunks, behind a prefix hit, on any
//! number of threads and beside poisoned padding (ENGINE §3): the whole decoder at four ranks, where sums in
//! another order would show, and the vision tower.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

#[cfg(not(feature = "cuda"))]
#[path = "support/no_cuda.rs"]
mod on_cuda;
#[cfg(feature = "cuda")]
#[path = "support/on_cuda.rs"]
mod on_cuda;
mod support;

use std::time::{Duration, Instant};

use support::fixture::Fixture;
use support::rank::BLOCK_SIZE;
use support::steps::{Bits, Sequence, Step, run};
use tessera_kernels::{Backend, CpuBackend, CpuFormat, ReferenceBackend};
use tessera_model::{VisionItem, VisionTower, Weights};
use tessera_types::PositionSpan;

const RANKS: u32 = 4;
const FORMATS: [CpuFormat; 2] = [CpuFormat::Bf16, CpuFormat::F32];

/// Runs steps on one backend.
type Runner<'a> = &'a dyn Fn(&[Sequence], &[Step]) -> Bits;

/// Calls `check` for the reference backend and for both formats of the others.
fn on_every_backend(check: impl Fn(&str, Runner<'_>)) {
    let fixture = Fixture::open("tiny");
    let (config, source) = (&fixture.config, fixture.source());
    check("reference", &|sequences, steps| {
        run(ReferenceBackend::new, config, &source, RANKS, sequences, steps)
    });
    for format in FORMATS {
        check(&format!("cpu {format:?}"), &|sequences, steps| {
            let backend = move || CpuBackend::new(1, format).unwrap();
            run(backend, config, &source, RANKS, sequences, steps)
        });
    }
    for format in on_cuda::formats() {
        check(&format!("cuda {format:?}"), &|sequences, steps| {
            let backend = move || on_cuda::backend(format);
            run(backend, config, &source, RANKS, sequences, steps)
        });
    }
}

/// A golden request with its reply, in blocks from `first_block` on, last block first.
fn sequence(case: &str, first_block: u32) -> Sequence {
    let fixture = Fixture::open("tiny");
    let case = fixture.case(case);
    let mut prompt = case.prompt(&fixture.config);
    let reply = case.greedy_tokens();
    prompt.positions.push(PositionSpan::Text { len: reply.len() as u32 });
    prompt.tokens.extend(reply);
    let items = 0..case.grids().len();
    let visual = items.flat_map(|i| case.tensor(&format!("vit_rows.{i}")).to_vec()).collect();
    let num_blocks = prompt.tokens.len().div_ceil(BLOCK_SIZE as usize) as u32;
    let blocks = (first_block..first_block + num_blocks).rev().collect();
    Sequence { prompt, visual, blocks }
}

fn len(sequence: &Sequence) -> usize {
    sequence.prompt.tokens.len()
}

/// Three sequences in blocks of their own.
fn sequences() -> [Sequence; 3] {
    [sequence("images", 0), sequence("text", 20), sequence("multi_turn", 40)]
}

fn step(chunks: Vec<(usize, std::ops::Range<usize>)>) -> Step {
    Step { chunks, padding: 0 }
}

/// Tokens `from..` of one sequence in chunks of `size`.
fn chunks(index: usize, from: usize, len: usize, size: usize) -> Vec<Step> {
    let starts = (from..len).step_by(size);
    starts.map(|start| step(vec![(index, start..len.min(start + size))])).collect()
}

/// Every sequence alone, in one step.
fn alone(sequences: &[Sequence]) -> Vec<Step> {
    sequences.iter().enumerate().map(|(i, one)| step(vec![(i, 0..len(one))])).collect()
}

/// Steps of all sequences side by side, each with chunks of its own size: prefill beside decode.
fn batched(sequences: &[Sequence], sizes: &[usize]) -> Vec<Step> {
    let mut at = vec![0; sequences.len()];
    let mut steps = Vec::new();
    loop {
        let mut chunks = Vec::new();
        for (index, one) in sequences.iter().enumerate() {
            let end = len(one).min(at[index] + sizes[index]);
            if at[index] < end {
                chunks.push((index, at[index]..end));
            }
            at[index] = end;
        }
        if chunks.is_empty() {
            return steps;
        }
        steps.push(step(chunks));
    }
}

fn assert_same(found: &Bits, expected: &Bits, what: &str) {
    let finite = |bits: &Vec<u32>| bits.iter().all(|bits| f32::from_bits(*bits).is_finite());
    for (place, bits) in found {
        assert!(finite(bits) && expected[place] == *bits, "{what}: sequence, position {place:?}");
    }
}

#[test]
fn same_bits_alone_and_in_batch() {
    let sequences = sequences();
    on_every_backend(|name, run| {
        let expected = run(&sequences, &alone(&sequences));
        for sizes in [[200, 1, 30], [1, 17, 5]] {
            let found = run(&sequences, &batched(&sequences, &sizes));
            assert_eq!(found.len(), expected.len(), "{name}");
            assert_same(&found, &expected, &format!("{name}, chunks of {sizes:?}"));
        }
    });
}

#[test]
fn same_bits_any_chunking() {
    let sequences = [sequence("images", 3)];
    let len = len(&sequences[0]);
    on_every_backend(|name, run| {
        let expected = run(&sequences, &alone(&sequences));
        for size in [1, 7, 16, 33] {
            let found = run(&sequences, &chunks(0, 0, len, size));
            assert_eq!(found.len(), len, "{name}");
            assert_same(&found, &expected, &format!("{name}, chunks of {size}"));
        }
    });
}

#[test]
fn same_bits_prefix_hit() {
    // The second sequence finds two blocks that the first has written, and computes the rest only.
    let (cached, shared) = (2 * BLOCK_SIZE as usize, 2);
    let (first, mut second) = (sequence("images", 0), sequence("images", 30));
    let expected_of = [sequence("images", 0)];
    second.blocks[..shared].copy_from_slice(&first.blocks[..shared]);
    let len = len(&first);
    let sequences = [first, second];
    on_every_backend(|name, run| {
        let expected = run(&expected_of, &alone(&expected_of));
        let mut steps = vec![step(vec![(0, 0..len)])];
        steps.extend(chunks(1, cached, len, 50));
        let found = run(&sequences, &steps);
        let hit = found.into_iter().filter(|((index, _), _)| *index == 1);
        let hit: Bits = hit.map(|((_, position), bits)| ((0, position), bits)).collect();
        assert_eq!(hit.len(), len - cached, "{name}");
        assert_same(&hit, &expected, name);
    });
}

#[test]
fn same_bits_threads_1_2_3() {
    // The reference backend has no threads to set.
    let fixture = Fixture::open("tiny");
    let sequences = sequences();
    let steps = batched(&sequences, &[60, 1, 19]);
    for format in FORMATS {
        let on = |threads: usize| {
            let backend = move || CpuBackend::new(threads, format).unwrap();
            run(backend, &fixture.config, &fixture.source(), RANKS, &sequences, &steps)
        };
        let one = on(1);
        for threads in [2, 3] {
            assert_same(&on(threads), &one, &format!("{format:?} on {threads} threads"));
        }
    }
}

#[test]
fn same_bits_padding_poisoned() {
    let sequences = sequences();
    on_every_backend(|name, run| {
        let steps = batched(&sequences, &[60, 1, 19]);
        let expected = run(&sequences, &steps);
        let padded = steps.iter().map(|step| Step { padding: 5, ..step.clone() });
        let found = run(&sequences, &padded.collect::<Vec<_>>());
        assert_eq!(found.len(), expected.len(), "{name}");
        assert_same(&found, &expected, name);
    });
}

/// Visual rows of items encoded together.
fn encode<B: Backend>(mut backend: B, items: &[VisionItem<'_>]) -> Vec<Vec<u32>> {
    let fixture = Fixture::open("tiny");
    let mut weights = Weights::open(&fixture.source(), &fixture.config).unwrap();
    let tower = VisionTower::load(&mut backend, &fixture.config.vision, 512, &mut weights).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let rows = tower.encode(&mut backend, items, deadline).unwrap();
    rows.iter().map(|rows| rows.iter().map(|value| value.to_bits()).collect()).collect()
}

fn check_items<B: Backend>(name: &str, backend: impl Fn() -> B) {
    let fixture = Fixture::open("tiny");
    for case in ["images", "multi_turn"] {
        let case = fixture.case(case);
        let names: Vec<String> =
            (0..case.grids().len()).map(|i| format!("pixel_values.{i}")).collect();
        let items = case.grids().into_iter().zip(&names);
        let items: Vec<VisionItem<'_>> = items
            .map(|(grid, name)| VisionItem { grid, pixel_values: case.tensor(name) })
            .collect();
        let packed = encode(backend(), &items);
        let mut reversed: Vec<VisionItem<'_>> = items.clone();
        reversed.reverse();
        let mut other_order = encode(backend(), &reversed);
        other_order.reverse();
        assert!(other_order == packed, "{name}, {}: another order", case.name);
        for (index, item) in items.iter().enumerate() {
            let alone = encode(backend(), std::slice::from_ref(item));
            assert!(alone[0] == packed[index], "{name}, {}, item {index}", case.name);
        }
    }
}

#[test]
fn vit_item_alone_and_packed() {
    check_items("reference", ReferenceBackend::new);
    for format in FORMATS {
        for threads in [1, 3] {
            let name = format!("cpu {format:?} on {threads} threads");
            check_items(&name, || CpuBackend::new(threads, format).unwrap());
        }
    }
    for format in on_cuda::formats() {
        check_items(&format!("cuda {format:?}"), || on_cuda::backend(format));
    }
}
