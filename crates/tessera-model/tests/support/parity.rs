//! Golden parity of a backend (ENGINE §7): with F32 weights it meets the reference's bound; with BF16 it errs no
//! more than 1.25 times what the reference implementation errs in BF16.

use std::time::{Duration, Instant};

use tessera_collective::threads;
use tessera_kernels::Backend;
use tessera_model::{VisionItem, VisionTower, Weights};
use tessera_types::Epoch;

use super::fixture::{Case, Fixture};
use super::generate::{Generation, Request, generate_on};
use super::{max_difference, range, rms_difference};

pub const FIXTURES: [&str; 4] = ["tiny", "tiny-nested", "real-heads", "small-margin"];
const STEPS: usize = 32;
/// Share of the logit range that logits may differ by with F32 weights.
const LOGIT_TOLERANCE: f32 = 5e-5;
/// Share of the range of an item's visual rows that they may differ by with F32 weights.
const ROW_TOLERANCE: f32 = 1e-5;
/// How much more than the reference implementation in BF16 ours may err in BF16.
const BF16_FACTOR: f32 = 1.25;
/// Margins beyond this many RMS errors must survive BF16.
const SAFE_MARGIN: f32 = 4.0;

/// Makes a backend for one rank.
pub trait Make<B: Backend>: Fn() -> B + Copy + Send {}

impl<B: Backend, F: Fn() -> B + Copy + Send> Make<B> for F {}

/// Visual rows of each item of a case.
pub fn encode<B: Backend>(make: impl Make<B>, fixture: &Fixture, case: &Case) -> Vec<Vec<f32>> {
    let mut backend = make();
    let mut weights = Weights::open(&fixture.source(), &fixture.config).unwrap();
    let tower = VisionTower::load(&mut backend, &fixture.config.vision, 512, &mut weights).unwrap();
    let names: Vec<String> = (0..case.grids().len()).map(|i| format!("pixel_values.{i}")).collect();
    let items = case.grids().into_iter().zip(&names);
    let items: Vec<VisionItem<'_>> =
        items.map(|(grid, name)| VisionItem { grid, pixel_values: case.tensor(name) }).collect();
    tower.encode(&mut backend, &items, Instant::now() + Duration::from_secs(60)).unwrap()
}

/// Encodes and generates a case, over `world_size` threads.
pub fn run<B: Backend>(
    make: impl Make<B>,
    fixture: &Fixture,
    case: &Case,
    world_size: u32,
) -> Generation {
    let visual = encode(make, fixture, case).concat();
    let prompt = case.prompt(&fixture.config);
    let request =
        Request { prompt: &prompt, visual: &visual, steps: STEPS, chunk: 128, all_logits: false };
    let group = threads::group(world_size, Epoch(1));
    generate_on(make, &fixture.config, &fixture.source(), group, request)
}

pub fn assert_tight(case: &Case, generation: &Generation, what: &str) {
    assert_eq!(generation.tokens, case.greedy_tokens(), "{}: greedy tokens, {what}", case.name);
    let difference = max_difference(&generation.logits.concat(), case.tensor("logits_steps"));
    let share = difference / case.logit_range();
    assert!(share <= LOGIT_TOLERANCE, "{}: {share} of the logit range, {what}", case.name);
}

pub fn assert_rows_tight(case: &Case, rows: &[Vec<f32>], what: &str) {
    for (item, rows) in rows.iter().enumerate() {
        let golden = case.tensor(&format!("vit_rows.{item}"));
        let share = max_difference(rows, golden) / range(golden);
        assert!(share <= ROW_TOLERANCE, "{what}, {}, item {item}: {share}", case.name);
    }
}

pub fn assert_rows_bf16(case: &Case, rows: &[Vec<f32>], what: &str) {
    for (item, rows) in rows.iter().enumerate() {
        let error = rms_difference(rows, case.tensor(&format!("vit_rows.{item}")));
        let bound = BF16_FACTOR * case.vit_bf16_rms(item);
        assert!(error <= bound, "{what}, {}, item {item}: {error} > {bound}", case.name);
    }
}

/// Steps are comparable up to the first token that differs, which only a close call may.
pub fn assert_bf16(case: &Case, ours: &Generation, place: &str) {
    let (golden, margins) = (case.greedy_tokens(), case.margins());
    let rms = case.number("bf16_rms");
    let differing = ours.tokens.iter().zip(&golden).position(|(ours, golden)| ours != golden);
    if let Some(step) = differing {
        let margin = margins[step];
        assert!(margin <= SAFE_MARGIN * rms, "{place}: step {step} with margin {margin} differs");
    }
    // The logits that chose a differing token still follow from equal tokens.
    let comparable = differing.map_or(STEPS, |step| step + 1);
    let ours = ours.logits[..comparable].concat();
    let error = rms_difference(&ours, &case.tensor("logits_steps")[..ours.len()]);
    // Few steps are a small sample of what the stored figure averages over all.
    let bound = BF16_FACTOR
        * if comparable == STEPS { rms } else { rms.max(case.number("bf16_rms_prefill")) };
    assert!(error <= bound, "{place}: RMS {error} over {comparable} steps, at most {bound}");
}
