//! Golden parity (ENGINE §7): the reference backend against `transformers` in f32, over all fixtures and
//! tensor-parallel degrees.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod support;

use std::time::{Duration, Instant};

use support::fixture::{Case, Fixture};
use support::generate::{Generation, Request, generate, generate_over, tcp_group};
use support::{max_difference, range};
use tessera_kernels::ReferenceBackend;
use tessera_model::{VisionItem, VisionTower, Weights};

const STEPS: usize = 32;
/// Share of the logit range that logits may differ by.
const LOGIT_TOLERANCE: f32 = 5e-5;
/// Share of the range of an item's visual rows that they may differ by.
const ROW_TOLERANCE: f32 = 1e-5;
/// Longer than any golden prompt.
const WHOLE_PROMPT: usize = 128;

fn tower(fixture: &Fixture) -> (ReferenceBackend, VisionTower<ReferenceBackend>) {
    let mut backend = ReferenceBackend::new();
    let mut weights = Weights::open(&fixture.source(), &fixture.config).unwrap();
    let tower = VisionTower::load(&mut backend, &fixture.config.vision, 512, &mut weights).unwrap();
    (backend, tower)
}

fn encode(fixture: &Fixture, case: &Case) -> Vec<Vec<f32>> {
    let (mut backend, tower) = tower(fixture);
    let items: Vec<VisionItem<'_>> = case
        .grids()
        .into_iter()
        .enumerate()
        .map(|(i, grid)| VisionItem {
            grid,
            pixel_values: case.tensor(&format!("pixel_values.{i}")),
        })
        .collect();
    tower.encode(&mut backend, &items, Instant::now() + Duration::from_secs(60)).unwrap()
}

fn run(fixture: &Fixture, case: &Case, world_size: u32, chunk: usize) -> Generation {
    let visual = encode(fixture, case).concat();
    let prompt = case.prompt(&fixture.config);
    let request =
        Request { prompt: &prompt, visual: &visual, steps: STEPS, chunk, all_logits: false };
    generate(&fixture.config, &fixture.source(), world_size, request)
}

fn assert_golden(case: &Case, generation: &Generation, what: &str) {
    assert_eq!(generation.tokens, case.greedy_tokens(), "{}: greedy tokens, {what}", case.name);
    let difference = max_difference(&generation.logits.concat(), case.tensor("logits_steps"));
    let share = difference / case.logit_range();
    assert!(
        share <= LOGIT_TOLERANCE,
        "{}: logits differ by {share} of their range, {what}",
        case.name
    );
}

/// Every case of a fixture at one rank, prompts in one chunk.
fn assert_fixture(name: &str) {
    assert_cases(&Fixture::open(name));
}

fn assert_cases(fixture: &Fixture) {
    for case in fixture.cases() {
        assert_golden(&case, &run(fixture, &case, 1, WHOLE_PROMPT), "one rank");
    }
}

#[test]
fn tiny_gives_the_golden_logits_and_tokens() {
    assert_fixture("tiny");
}

#[test]
fn tiny_nested_gives_the_golden_logits_and_tokens() {
    assert_fixture("tiny-nested");
}

#[test]
fn real_heads_gives_the_golden_logits_and_tokens() {
    assert_fixture("real-heads");
}

#[test]
fn small_margin_gives_the_golden_logits_and_tokens() {
    assert_fixture("small-margin");
}

#[test]
fn yarn_gives_the_golden_logits_and_tokens() {
    // Prompts are longer than the original context of 32.
    let fixture = Fixture::yarn();
    assert_cases(&fixture);
    let case = fixture.case("multi_turn");
    assert_golden(&case, &run(&fixture, &case, 4, 33), "TP 4");
}

#[test]
fn every_tensor_parallel_degree_gives_the_golden_logits_and_tokens() {
    // Between them: KV heads split, shared by ranks, padded query heads, ranks with padding only.
    for (name, case) in
        [("tiny", "multi_turn"), ("tiny-nested", "images"), ("real-heads", "multi_turn")]
    {
        let fixture = Fixture::open(name);
        let case = fixture.case(case);
        for world_size in [2, 4, 8] {
            let what = format!("{name} at TP {world_size}");
            assert_golden(&case, &run(&fixture, &case, world_size, WHOLE_PROMPT), &what);
        }
    }
}

#[test]
fn over_tcp_logits_have_the_bits_of_threads() {
    // At four ranks and more, sums in another order would show.
    let fixture = Fixture::open("tiny");
    let case = fixture.case("multi_turn");
    let visual = encode(&fixture, &case).concat();
    let prompt = case.prompt(&fixture.config);
    let request =
        Request { prompt: &prompt, visual: &visual, steps: STEPS, chunk: 33, all_logits: false };
    for world_size in [1, 2, 4, 8] {
        let threads = generate(&fixture.config, &fixture.source(), world_size, request);
        let group = tcp_group(world_size);
        let tcp = generate_over(&fixture.config, &fixture.source(), group, request);
        assert_eq!(tcp, threads, "TP {world_size}");
        assert_golden(&case, &tcp, &format!("TP {world_size} over TCP"));
    }
}

#[test]
fn small_margins_survive_tensor_parallelism() {
    let fixture = Fixture::open("small-margin");
    for world_size in [2, 8] {
        let case = fixture.case("image_odd");
        assert_golden(&case, &run(&fixture, &case, world_size, WHOLE_PROMPT), "small margins");
    }
}

#[test]
fn every_prompt_position_has_the_golden_logits() {
    for name in ["tiny", "tiny-nested", "real-heads", "small-margin"] {
        let fixture = Fixture::open(name);
        let case = fixture.case("text");
        let prompt = case.prompt(&fixture.config);
        let request = Request {
            prompt: &prompt,
            visual: &[],
            steps: 1,
            chunk: WHOLE_PROMPT,
            all_logits: true,
        };
        let logits = generate(&fixture.config, &fixture.source(), 1, request).logits.concat();
        let golden = case.tensor("logits_all");
        let share = max_difference(&logits, golden) / range(golden);
        assert!(share <= LOGIT_TOLERANCE, "{name}: logits differ by {share} of their range");
    }
}

#[test]
fn visual_rows_equal_the_golden_ones() {
    for name in ["tiny", "tiny-nested", "real-heads", "small-margin"] {
        let fixture = Fixture::open(name);
        for case in fixture.cases() {
            for (item, rows) in encode(&fixture, &case).iter().enumerate() {
                let golden = case.tensor(&format!("vit_rows.{item}"));
                let share = max_difference(rows, golden) / range(golden);
                let place = format!("{name}, {}, item {item}", case.name);
                assert!(share <= ROW_TOLERANCE, "{place}: rows differ by {share} of their range");
            }
        }
    }
}

#[test]
fn positions_equal_the_golden_ones() {
    for name in ["tiny", "tiny-nested", "real-heads", "small-margin"] {
        let fixture = Fixture::open(name);
        for case in fixture.cases() {
            let prompt = case.prompt(&fixture.config);
            let mut positions = Vec::new();
            prompt.extend_positions(0, prompt.tokens.len(), &mut positions);
            for axis in 0..3 {
                let ours: Vec<f32> =
                    positions.iter().map(|position| position[axis] as f32).collect();
                let golden =
                    case.tensor("position_ids").chunks_exact(ours.len()).nth(axis).unwrap();
                assert_eq!(ours, golden, "{name}, {}, axis {axis}", case.name);
            }
            assert_eq!(prompt.rope_delta(), case.rope_delta(), "{name}, {}", case.name);
        }
    }
}
