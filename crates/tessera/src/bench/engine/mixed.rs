//! A long prompt is prefilled while sequences decode: how long does one of them wait for its next token?

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::harness::{Log, Note, What};
use super::measure::Bench;
use super::report::{MixedRow, Report};
use crate::bench::error::BenchError;
use crate::bench::stats::{Spread, sorted};

/// Seed of the long prompt: of none that comes again.
const SEED: u64 = 1 << 40;

pub fn run(bench: &Bench<'_>, report: &mut Report<'_>) -> Result<(), BenchError> {
    let plan = bench.plan;
    let Some(batch) = plan.mixed else { return Ok(()) };
    let running = batch as usize;
    let log = Log::new((running + 1) * (plan.mixed_tokens() as usize + 2));
    let mut ids = Vec::with_capacity(running);
    for sequence in 0..running {
        let request = bench.context_of(sequence);
        ids.push(bench.harness.submit(&request, plan.mixed_tokens(), sequence, &log)?);
    }
    let mut last = wait_for_tokens(&log, running, 4)?;
    let prompt = bench.harness.request(SEED, plan.mixed_prompt, false);
    let submitted = Instant::now();
    bench.harness.submit(&prompt, 1, running, &log)?;
    let mut gaps = Gaps::default();
    let first_token = loop {
        let note = log.next()?;
        if note.sequence == running && note.what == What::Token {
            break note.at;
        }
        gaps.note(note, &mut last);
    };
    for id in ids {
        bench.harness.stop(id)?;
    }
    log.until_finished(running + 1)?;
    bench.harness.settle()?;
    let ms = |gap: &Duration| gap.as_secs_f64() * 1e3;
    let gap_ms = sorted(gaps.times.iter().map(ms));
    report.mixed(MixedRow {
        running: batch,
        context: plan.context,
        prompt_tokens: plan.mixed_prompt,
        token_budget: plan.token_budget,
        ttft_ms: first_token.duration_since(submitted).as_secs_f64() * 1e3,
        num_gaps: gap_ms.len(),
        gap_ms: Spread::of(gap_ms.iter().copied()),
        longest_gap_ms: gap_ms.last().copied().unwrap_or(f64::NAN),
        longest_gap_steps: gaps.longest_steps,
    });
    Ok(())
}

/// Reads until every sequence has drawn `tokens`; the last note of each.
fn wait_for_tokens(
    log: &Log,
    running: usize,
    tokens: u32,
) -> Result<BTreeMap<usize, Note>, BenchError> {
    let (mut counts, mut last) = (vec![0; running], BTreeMap::new());
    while counts.iter().any(|&count| count < tokens) {
        let note = log.next()?;
        counts[note.sequence] += u32::from(note.what == What::Token);
        last.insert(note.sequence, note);
    }
    Ok(last)
}

/// Between successive tokens of each running sequence.
#[derive(Default)]
struct Gaps {
    times: Vec<Duration>,
    longest_steps: u64,
}

impl Gaps {
    fn note(&mut self, note: Note, last: &mut BTreeMap<usize, Note>) {
        if note.what != What::Token {
            return;
        }
        if let Some(before) = last.insert(note.sequence, note) {
            self.times.push(note.at.duration_since(before.at));
            self.longest_steps = self.longest_steps.max(note.step - before.step);
        }
    }
}
