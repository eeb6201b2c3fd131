//! A closed loop: so many requests at a time, each followed by the next. What continuous batching gains is
//! the ratio between two such loops, so their windows take turns.

use std::time::Instant;

use tessera_types::SequenceId;

use super::harness::{Log, What};
use super::measure::Bench;
use super::report::{ContinuousRow, Report};
use crate::bench::error::BenchError;
use crate::bench::random::Random;
use crate::bench::stats::Spread;

pub fn run(bench: &Bench<'_>, report: &mut Report<'_>) -> Result<(), BenchError> {
    let plan = bench.plan;
    let mut rates = vec![Vec::with_capacity(plan.repeats); plan.continuous.len()];
    for repeat in 0..plan.repeats {
        for (&concurrency, rates) in plan.continuous.iter().zip(&mut rates) {
            rates.push(window(bench, concurrency as usize, repeat as u64)?);
        }
    }
    let base = plan.continuous.iter().position(|&concurrency| concurrency == 1);
    for (index, &concurrency) in plan.continuous.iter().enumerate() {
        let ratios = base.map(|base| {
            Spread::of(rates[index].iter().zip(&rates[base]).map(|(rate, one)| rate / one))
        });
        report.continuous(ContinuousRow {
            concurrency,
            num_windows: plan.repeats,
            window_seconds: plan.continuous_window_seconds,
            tokens_per_second: Spread::of(rates[index].iter().copied()),
            times_one: ratios,
        });
    }
    Ok(())
}

/// Output tokens per second of one window. It begins when every client has its first token; a request that
/// ends in it is followed by another at once, whose prompt is prefilled beside the others' decode.
fn window(bench: &Bench<'_>, clients: usize, repeat: u64) -> Result<f64, BenchError> {
    let plan = bench.plan;
    let mut random = Random::new(repeat);
    let log = Log::new(64 * (clients + 1) + clients * plan.longest_continuous() as usize);
    let mut next = |client: usize| -> Result<SequenceId, BenchError> {
        let request = bench.harness.request(random.next(), plan.continuous_prompt, false);
        let half = (plan.continuous_output / 2).max(1);
        let output = random.between(half, plan.longest_continuous());
        bench.harness.submit(&request, output, client, &log)
    };
    let mut ids = (0..clients).map(&mut next).collect::<Result<Vec<_>, _>>()?;
    let mut started = vec![false; clients];
    while started.contains(&false) {
        let note = log.next()?;
        started[note.sequence] = true;
        if note.what == What::Finished {
            ids[note.sequence] = next(note.sequence)?;
        }
    }
    let begin = Instant::now();
    let (deadline, mut tokens) = (begin + plan.window(), 0u64);
    while let Some(note) = log.next_before(deadline)? {
        match note.what {
            What::Token => tokens += u64::from(note.at >= begin && note.at < deadline),
            What::Finished => ids[note.sequence] = next(note.sequence)?,
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    for &id in &ids {
        bench.harness.stop(id)?;
    }
    log.until_finished(clients)?;
    bench.harness.settle()?;
    Ok(tokens as f64 / seconds)
}
