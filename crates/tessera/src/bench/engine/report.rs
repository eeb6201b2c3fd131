//! The figures of `tessera bench engine`, for people and as JSON.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::args::Plan;
use crate::bench::limits::Paired;
use crate::bench::machine::Machine;
use crate::bench::shape::Shape;
use crate::bench::size::ImageSize;
use crate::bench::stats::Spread;
use crate::bench::table::{Table, number};
use crate::bench::write_json;
use crate::error::Result;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    benchmark: &'static str,
    machine: Machine,
    shape: &'a Shape,
    settings: &'a Plan,
    load_seconds: Option<f64>,
    vision_load_seconds: Option<f64>,
    prefill: Vec<PrefillRow>,
    decode: Vec<DecodeRow>,
    mixed: Option<MixedRow>,
    continuous: Vec<ContinuousRow>,
    vision: Vec<VisionRow>,
}

#[derive(Debug, Serialize)]
pub struct PrefillRow {
    pub tokens: u32,
    /// Steps that the token budget cuts it into.
    pub steps: u32,
    pub tokens_per_second: f64,
    #[serde(flatten)]
    pub paired: Paired,
}

#[derive(Debug, Serialize)]
pub struct DecodeRow {
    pub batch: u32,
    pub context: u32,
    pub steps_per_run: u32,
    pub tokens_per_second: f64,
    /// Of one step.
    #[serde(flatten)]
    pub paired: Paired,
}

#[derive(Debug, Serialize)]
pub struct MixedRow {
    /// Sequences that decode meanwhile.
    pub running: u32,
    pub context: u32,
    pub prompt_tokens: u32,
    pub token_budget: u32,
    /// Of the long prompt.
    pub ttft_ms: f64,
    pub num_gaps: usize,
    /// Between successive tokens of a running sequence.
    pub gap_ms: Spread,
    pub longest_gap_ms: f64,
    pub longest_gap_steps: u64,
}

#[derive(Debug, Serialize)]
pub struct ContinuousRow {
    pub concurrency: u32,
    pub num_windows: usize,
    pub window_seconds: f64,
    pub tokens_per_second: Spread,
    /// Against one request at a time, window by window.
    pub times_one: Option<Spread>,
}

#[derive(Debug, Serialize)]
pub struct VisionRow {
    pub size: ImageSize,
    pub patches: u64,
    pub visual_tokens: u64,
    #[serde(flatten)]
    pub paired: Paired,
}

impl<'a> Report<'a> {
    pub fn new(plan: &'a Plan) -> Self {
        Self {
            benchmark: "engine",
            machine: Machine::read(),
            shape: &plan.shape,
            settings: plan,
            load_seconds: None,
            vision_load_seconds: None,
            prefill: Vec::new(),
            decode: Vec::new(),
            mixed: None,
            continuous: Vec::new(),
            vision: Vec::new(),
        }
    }

    /// What is measured, on what.
    pub fn print_head(&self) {
        let plan = self.settings;
        println!("{}", self.machine.describe());
        println!(
            "shape {}; weights {}; device {}, {} threads, TP {}; {} tokens per step, depth {}",
            plan.shape.describe(),
            plan.weights,
            plan.device,
            plan.total_threads(),
            plan.tp,
            plan.token_budget,
            plan.pipeline_depth,
        );
        println!(
            "medians [p10, p90] of {} runs, limits measured before and after each",
            plan.repeats
        );
    }

    pub fn loaded(&mut self, time: Duration) {
        self.load_seconds = Some(time.as_secs_f64());
        println!("language model loaded in {:.1} s", time.as_secs_f64());
    }

    pub fn vision_loaded(&mut self, time: Duration) {
        self.vision_load_seconds = Some(time.as_secs_f64());
        println!("vision tower loaded in {:.1} s", time.as_secs_f64());
    }

    pub fn prefill(&mut self, row: PrefillRow) {
        let leading = [row.tokens.to_string(), row.steps.to_string()];
        let per_second = number(row.tokens_per_second);
        print_paired(["prefill tokens", "steps"], leading, ["tokens/s", &per_second], &row.paired);
        self.prefill.push(row);
    }

    pub fn decode(&mut self, row: DecodeRow) {
        let leading = [row.batch.to_string(), row.context.to_string()];
        let per_second = number(row.tokens_per_second);
        print_paired(["decode batch", "context"], leading, ["tokens/s", &per_second], &row.paired);
        self.decode.push(row);
    }

    pub fn mixed(&mut self, row: MixedRow) {
        let mut table = Table::new([
            "running",
            "prompt",
            "budget",
            "its first token ms",
            "gap ms",
            "longest ms",
            "longest steps",
        ]);
        table.row([
            row.running.to_string(),
            row.prompt_tokens.to_string(),
            row.token_budget.to_string(),
            number(row.ttft_ms),
            spread(&row.gap_ms),
            number(row.longest_gap_ms),
            row.longest_gap_steps.to_string(),
        ]);
        print!("{}", table.render());
        self.mixed = Some(row);
    }

    pub fn continuous(&mut self, row: ContinuousRow) {
        let mut table = Table::new(["requests at a time", "tokens/s", "times one"]);
        table.row([
            row.concurrency.to_string(),
            spread(&row.tokens_per_second),
            row.times_one.as_ref().map_or_else(|| "-".to_owned(), spread),
        ]);
        print!("{}", table.render());
        self.continuous.push(row);
    }

    pub fn vision(&mut self, row: VisionRow) {
        let leading = [format!("{}x{}", row.size.width, row.size.height), row.patches.to_string()];
        let visual_tokens = row.visual_tokens.to_string();
        print_paired(["image", "patches"], leading, ["visual tokens", &visual_tokens], &row.paired);
        self.vision.push(row);
    }

    /// Writes the figures as JSON.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        write_json(self, file)
    }
}

/// One row that was measured beside its limit: two columns that say what, the time, one column more, and the
/// limit.
fn print_paired(names: [&str; 2], leading: [String; 2], extra: [&str; 2], paired: &Paired) {
    let [first, second] = names;
    let mut table = Table::new([first, second, "ms", extra[0], "limit ms", "share", "bound"]);
    let [first, second] = leading;
    table.row([
        first,
        second,
        spread(&paired.ms),
        extra[1].to_owned(),
        number(paired.limit_ms.median),
        spread(&paired.share),
        paired.bound.to_owned(),
    ]);
    print!("{}", table.render());
}

fn spread(spread: &Spread) -> String {
    format!("{} [{}, {}]", number(spread.median), number(spread.p10), number(spread.p90))
}
