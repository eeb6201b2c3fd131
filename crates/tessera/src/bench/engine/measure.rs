//! Prefill and decode, each run between two measurements of the machine's limits.

use std::collections::BTreeMap;
use std::time::Instant;

use super::args::{Plan, SETTLE_TOKENS};
use super::harness::{Harness, Log, Note, What};
use super::report::{DecodeRow, PrefillRow, Report};
use crate::bench::error::BenchError;
use crate::bench::limits::{LimitMeter, Pair, Paired};
use crate::bench::work;

/// A running engine and what is asked of it.
pub struct Bench<'a> {
    pub plan: &'a Plan,
    pub harness: &'a Harness,
    meter: &'a LimitMeter,
    /// Seeds of prompts that nobody has seen before.
    next_seed: u64,
}

impl<'a> Bench<'a> {
    pub fn new(plan: &'a Plan, harness: &'a Harness, meter: &'a LimitMeter) -> Self {
        // Seeds below are those of prompts that come again.
        Self { plan, harness, meter, next_seed: 1 << 32 }
    }

    /// Prompts alone, from submission to the first token.
    pub fn prefill(&mut self, report: &mut Report<'_>) -> Result<(), BenchError> {
        let text = &self.plan.shape.config.text;
        for &tokens in &self.plan.prefill {
            self.prefill_once(tokens)?;
            let mut pairs = Vec::with_capacity(self.plan.repeats);
            for _ in 0..self.plan.repeats {
                let meter = self.meter;
                let (limits, seconds) = meter.around(|| self.prefill_once(tokens))?;
                pairs.push(Pair { seconds, limits });
            }
            let work = work::prefill(text, self.plan.dtype(), tokens as usize);
            let paired = Paired::of(work, &pairs);
            let steps = tokens.div_ceil(self.plan.token_budget);
            let tokens_per_second = f64::from(tokens) / paired.ms.median * 1e3;
            report.prefill(PrefillRow { tokens, steps, tokens_per_second, paired });
        }
        Ok(())
    }

    /// Seconds until the first token.
    fn prefill_once(&mut self, tokens: u32) -> Result<f64, BenchError> {
        self.next_seed += 1;
        let request = self.harness.request(self.next_seed, tokens, false);
        let (log, started) = (Log::new(4), Instant::now());
        self.harness.submit(&request, 1, 0, &log)?;
        let first = log.next()?;
        log.until_finished(1)?;
        Ok(first.at.duration_since(started).as_secs_f64())
    }

    /// Batches that decode together, each sequence over its own context.
    pub fn decode(&mut self, report: &mut Report<'_>) -> Result<(), BenchError> {
        let text = &self.plan.shape.config.text;
        for &batch in &self.plan.decode {
            // Fills the prefix cache with the contexts.
            self.decode_once(batch)?;
            let mut pairs = Vec::with_capacity(self.plan.repeats);
            for _ in 0..self.plan.repeats {
                let (limits, seconds) = self.meter.around(|| self.decode_once(batch))?;
                pairs.push(Pair { seconds, limits });
            }
            // The middle of the measured steps.
            let context = f64::from(self.plan.context + SETTLE_TOKENS + self.plan.steps / 2);
            let work = work::decode_step(text, self.plan.dtype(), batch as usize, context);
            let paired = Paired::of(work, &pairs);
            let tokens_per_second = f64::from(batch) / paired.ms.median * 1e3;
            report.decode(DecodeRow {
                batch,
                context: self.plan.context,
                steps_per_run: self.plan.steps,
                tokens_per_second,
                paired,
            });
        }
        Ok(())
    }

    /// Mean seconds of a step in which all sequences draw a token.
    fn decode_once(&self, batch: u32) -> Result<f64, BenchError> {
        let log = Log::new(batch as usize * (self.plan.decode_tokens() as usize + 2));
        for sequence in 0..batch as usize {
            let request = self.context_of(sequence);
            self.harness.submit(&request, self.plan.decode_tokens(), sequence, &log)?;
        }
        Ok(mean_step_seconds(&log.until_finished(batch as usize)?))
    }

    /// A prompt whose context is in the cache after its first run, and whose last token is not, so that its
    /// second run begins with a decode step.
    pub fn context_of(&self, sequence: usize) -> super::harness::Request {
        let whole_blocks = self.plan.context.div_ceil(self.plan.block_size) * self.plan.block_size;
        self.harness.request(sequence as u64, whole_blocks + 1, true)
    }
}

/// Mean seconds of the steps between the moment when every sequence had its first token and the moment when
/// one had its last.
fn mean_step_seconds(notes: &[Note]) -> f64 {
    let mut tokens: BTreeMap<usize, (Note, Note)> = BTreeMap::new();
    for note in notes.iter().filter(|note| note.what == What::Token) {
        tokens.entry(note.sequence).and_modify(|(_, last)| *last = *note).or_insert((*note, *note));
    }
    let first = tokens.values().map(|(first, _)| first).max_by_key(|note| note.at);
    let last = tokens.values().map(|(_, last)| last).min_by_key(|note| note.at);
    let (Some(first), Some(last)) = (first, last) else { return f64::NAN };
    let steps = last.step.saturating_sub(first.step) as f64;
    last.at.saturating_duration_since(first.at).as_secs_f64() / steps
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn steps_count_while_all_sequences_run() {
        let start = Instant::now();
        let note = |sequence, step: u64| Note {
            sequence,
            at: start + Duration::from_millis(100 * step),
            step,
            what: What::Token,
        };
        // The second starts two steps later, and the first ends before it.
        let first = (0..=6).map(|step| note(0, step));
        let second = (2..=9).map(|step| note(1, step));
        let slow = Note { at: start + Duration::from_millis(1000), ..note(0, 6) };
        let mean = mean_step_seconds(&first.chain(second).collect::<Vec<_>>());
        assert!((mean - 0.1).abs() < 1e-9, "{mean}");
        // From 0.2 s to 1 s in four steps.
        let mean = mean_step_seconds(&[note(0, 0), note(1, 2), note(1, 11), slow]);
        assert!((mean - 0.2).abs() < 1e-9, "{mean}");
    }
}
