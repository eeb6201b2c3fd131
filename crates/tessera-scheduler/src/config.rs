//! Limits of the scheduler.

use crate::error::ConfigError;
use crate::table::TableLimits;

/// Every bound the scheduler keeps. The KV size is agreed per epoch, so it is not here but an argument
/// of [`crate::Scheduler::begin_epoch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens per KV block.
    pub block_size: u32,
    /// Sequences that hold a slot at the same time. With the reserve's, at most `max_tokens_per_step`, so
    /// that every sequence in decode advances in every step.
    pub max_running: u32,
    /// Sequences that wait for a slot; one more is refused as queue full. Preempted sequences return to
    /// the queue beyond this bound, at most `max_running` of them.
    pub max_waiting: u32,
    /// Of these, sequences of one tenant; one more is refused as queue full for that tenant. 0: three
    /// quarters of `max_waiting`. It holds for requests without a tenant too, and whether or not others
    /// wait: who comes second must find room. Where nobody names tenants, set it to `max_waiting`.
    pub max_waiting_per_tenant: u32,
    /// Most tokens of a step. The budget in force, [`crate::Scheduler::set_token_budget`], may be lower.
    pub max_tokens_per_step: u32,
    /// Prompt and output tokens of one sequence, the context length served.
    pub max_model_len: u32,
    /// Steps in flight: 1 waits for each step, 2 schedules the next one before the tokens of the last are
    /// known. Both give the same tokens.
    pub pipeline_depth: u32,
    /// Blocks that only a sequence with `use_reserve` may take, together with one slot of their own: the
    /// canary always finds room.
    pub reserved_blocks: u32,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            block_size: 16,
            max_running: 32,
            max_waiting: 256,
            max_waiting_per_tenant: 0,
            max_tokens_per_step: 64,
            max_model_len: 4096,
            pipeline_depth: 2,
            reserved_blocks: 1,
        }
    }
}

impl SchedulerConfig {
    /// Checks the limits against each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("block_size", self.block_size),
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_model_len", self.max_model_len),
        ];
        if let Some(&(field, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero { field });
        }
        let num_slots = self.max_running.saturating_add(u32::from(self.reserved_blocks > 0));
        if self.max_tokens_per_step < num_slots {
            let max_tokens_per_step = self.max_tokens_per_step;
            return Err(ConfigError::BudgetBelowSlots { max_tokens_per_step, num_slots });
        }
        if !(1..=2).contains(&self.pipeline_depth) {
            return Err(ConfigError::PipelineDepth { pipeline_depth: self.pipeline_depth });
        }
        Ok(())
    }

    /// Sequences of one tenant that may wait.
    pub fn max_waiting_of_tenant(&self) -> u32 {
        match self.max_waiting_per_tenant {
            0 => (self.max_waiting - self.max_waiting / 4).max(1),
            max => max,
        }
    }

    /// Rows of the sequence table: one per running sequence, and one for the reserve.
    pub fn num_slots(&self) -> u32 {
        self.max_running + u32::from(self.reserved_blocks > 0)
    }

    /// Blocks that hold `num_tokens` tokens.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size as usize)
    }

    /// Blocks in the longest block table of one sequence.
    pub fn max_blocks_per_sequence(&self) -> u32 {
        self.max_model_len.div_ceil(self.block_size)
    }

    /// Bounds of the sequence table that goes with this configuration.
    pub fn table_limits(&self, num_blocks: u32) -> TableLimits {
        TableLimits { num_slots: self.num_slots(), num_blocks, block_size: self.block_size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradicting_limits_are_refused() {
        type Edit = fn(&mut SchedulerConfig);
        let edits: [Edit; 7] = [
            |c| c.block_size = 0,
            |c| c.max_running = 0,
            |c| c.max_waiting = 0,
            |c| c.max_model_len = 0,
            |c| c.max_tokens_per_step = c.max_running,
            |c| c.pipeline_depth = 0,
            |c| c.pipeline_depth = 3,
        ];
        for (i, edit) in edits.iter().enumerate() {
            let mut config = SchedulerConfig::default();
            assert_eq!(config.validate(), Ok(()));
            edit(&mut config);
            assert!(config.validate().is_err(), "edit {i} was accepted");
        }
    }
}
