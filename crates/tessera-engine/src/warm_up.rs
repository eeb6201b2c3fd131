//! What an engine does before its first request: full steps through all ranks, and from their times the
//! token budget.
//!
//! A step's time is what a running sequence waits for its next token while a prompt is prefilled beside it, so
//! the budget is a time target (ENGINE §1). It is fitted in a process's first epoch and kept for those that
//! follow: neither weights nor devices change, and a group that was lost should serve again at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_scheduler::{SchedulerConfig, SequenceRequest};
use tessera_types::{PositionSpan, Prompt, SamplingParams, SequenceId, TokenId};

use crate::engine::Engine;
use crate::error::{EngineError, SequenceError};

/// Budgets are multiples of this many tokens, or the least and the greatest possible.
const MULTIPLE: u32 = 16;
/// The first size that is measured, unless more sequences may run.
const FIRST_SIZE: u32 = 32;

/// Takes the outcome of a warm-up on the engine thread. Must not wait.
pub type WarmUpReply = Box<dyn FnOnce(Result<WarmUp, EngineError>) + Send>;

/// What a warm-up found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WarmUp {
    /// Tokens that a step may hold.
    pub token_budget: u32,
    /// Time of the largest step of prefill within that budget; 0: none was run.
    pub step_time: Duration,
}

impl Engine {
    /// Runs full steps and fits the token budget, once; later it only says what was found.
    pub(crate) fn warm_up(&mut self) -> Result<WarmUp, EngineError> {
        if let Some(done) = self.warmed_up {
            return Ok(done);
        }
        let epoch = self.epoch.as_ref().ok_or(EngineError::NoEpoch)?.epoch;
        let target = self.config.step_time_target;
        let limits = self.scheduler.config().clone();
        let largest = largest_step(&limits, self.scheduler.load().num_blocks);
        let mut size = limits.num_slots().max(FIRST_SIZE).min(largest);
        let mut measured: Vec<(u32, Duration)> = Vec::new();
        // The first step of all pays for memory that is touched for the first time.
        self.full_step(size)?;
        loop {
            let time = self.full_step(size)?;
            measured.push((size, time));
            if size == largest || target.is_some_and(|target| time >= target) {
                break;
            }
            size = size.saturating_mul(2).min(largest);
        }
        let fitted = fit(&measured, target).unwrap_or(limits.max_tokens_per_step);
        let token_budget = self.scheduler.set_token_budget(fitted);
        let within = measured.iter().rev().find(|(size, _)| *size <= token_budget);
        let step_time = within.map_or(Duration::ZERO, |(_, time)| *time);
        let done = WarmUp { token_budget, step_time };
        self.warmed_up = Some(done);
        tracing::info!(
            epoch = epoch.0,
            token_budget,
            step_seconds = step_time.as_secs_f64(),
            target_seconds = target.map(|target| target.as_secs_f64()),
            num_steps = measured.len() + 1,
            "warmed up"
        );
        Ok(done)
    }

    /// Computes one step of `size` prompt tokens, in as many sequences as that takes, and returns its time.
    fn full_step(&mut self, size: u32) -> Result<Duration, EngineError> {
        self.scheduler.set_token_budget(size);
        let longest = self.scheduler.config().max_model_len.saturating_sub(1).max(1);
        let mut left = size;
        while left > 0 {
            let len = left.min(longest);
            let sequence = self.shared.new_sequence();
            let request = request(sequence, len, self.config.vocab_size);
            let refused = |error| EngineError::WarmUp(SequenceError::Refused(error));
            self.scheduler.add(request).map_err(refused)?;
            left -= len;
        }
        let mut longest_step = Duration::ZERO;
        // A prompt that starts beside others in decode takes part of the next step.
        while let Some(plan) = self.scheduler.schedule().map(Arc::new) {
            let started = Instant::now();
            self.executor.forward(&plan)?;
            self.executor.sample(plan.step, &Arc::default())?;
            self.collect(plan.step)?;
            longest_step = longest_step.max(started.elapsed());
            self.publish_load();
        }
        // These sequences have no streams, so nothing is told of them.
        self.report();
        Ok(longest_step)
    }
}

/// Tokens of prefill that one step can hold: within the greatest budget, and in the blocks there are.
fn largest_step(limits: &SchedulerConfig, num_blocks: u32) -> u32 {
    let blocks = num_blocks.saturating_sub(limits.reserved_blocks);
    let longest = limits.max_model_len.saturating_sub(1).max(1);
    // Each sequence rounds up to whole blocks.
    let blocks_each = longest.div_ceil(limits.block_size);
    let whole = (blocks / blocks_each).min(limits.max_running);
    let rest = match whole < limits.max_running {
        true => (blocks - whole * blocks_each).saturating_mul(limits.block_size),
        false => 0,
    };
    whole.saturating_mul(longest).saturating_add(rest).clamp(1, limits.max_tokens_per_step)
}

/// The largest budget whose step takes no longer than the target, between two sizes on a straight line.
/// `None`: every size stayed below it.
fn fit(measured: &[(u32, Duration)], target: Option<Duration>) -> Option<u32> {
    let target = target?;
    let above = measured.iter().position(|(_, time)| *time > target)?;
    let (size, time) = measured[above];
    let (below, below_time) = match above.checked_sub(1) {
        Some(below) => measured[below],
        None => (0, Duration::ZERO),
    };
    let share = (target.saturating_sub(below_time)).as_secs_f64()
        / time.saturating_sub(below_time).as_secs_f64();
    let fitted = below + (f64::from(size - below) * share) as u32;
    Some((fitted / MULTIPLE * MULTIPLE).max(below).max(1))
}

/// A sequence of `len` prompt tokens that draws one.
fn request(sequence: SequenceId, len: u32, vocab_size: u32) -> SequenceRequest {
    // Ids spread over the vocabulary, so that every rank's share of the embedding is read.
    let token = |index: u32| (u64::from(index) * 7919 % u64::from(vocab_size)) as TokenId;
    SequenceRequest {
        sequence,
        prompt: Arc::new(Prompt {
            tokens: (0..len).map(token).collect(),
            media: Vec::new(),
            positions: vec![PositionSpan::Text { len }],
        }),
        output: Vec::new(),
        sampling: Arc::new(SamplingParams { max_tokens: 1, ..SamplingParams::default() }),
        eos_token_ids: Arc::from([]),
        seed: 0,
        priority: i32::MAX,
        tenant: tessera_types::TenantId::default(),
        arrival: 0,
        block_keys: Vec::new(),
        use_reserve: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_the_largest_within_the_target() {
        let ms = Duration::from_millis;
        let measured = [(32, ms(100)), (64, ms(180)), (128, ms(340)), (256, ms(660))];
        assert_eq!(fit(&measured, Some(ms(500))), Some(192));
        assert_eq!(fit(&measured, Some(ms(340))), Some(128));
        assert_eq!(fit(&measured, Some(ms(345))), Some(128), "no less than what was within it");
        assert_eq!(fit(&measured, Some(ms(660))), None);
        assert_eq!(fit(&measured, Some(ms(50))), Some(16));
        assert_eq!(fit(&measured, Some(ms(1))), Some(1), "the scheduler knows the least");
        assert_eq!(fit(&measured, None), None);
    }

    #[test]
    fn the_largest_step_fits_blocks_and_slots() {
        let limits = SchedulerConfig {
            block_size: 16,
            max_running: 4,
            max_tokens_per_step: 512,
            max_model_len: 100,
            reserved_blocks: 1,
            ..SchedulerConfig::default()
        };
        assert_eq!(largest_step(&limits, 1000), 4 * 99);
        assert_eq!(largest_step(&limits, 1 + 7 + 2), 99 + 32);
        assert_eq!(largest_step(&SchedulerConfig { max_model_len: 4096, ..limits }, 1000), 512);
    }
}
