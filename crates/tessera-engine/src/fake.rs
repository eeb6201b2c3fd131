//! An executor made of hashes: the engine's tests and the simulation run the true engine over it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use tessera_scheduler::{FakeModel, SchedulerConfig};
use tessera_types::{EmbeddingKey, LateInputs, StepId, StepOutput, StepPlan};

use crate::error::ExecutorError;
use crate::executor::{EpochStart, Executor, PlanSink, Result};

/// Computes steps by [`FakeModel`], at once and in the caller's thread.
pub struct FakeExecutor {
    limits: SchedulerConfig,
    world_size: u32,
    vocab_size: u32,
    model: Option<FakeModel>,
    plans: Option<Box<dyn PlanSink>>,
    outputs: VecDeque<StepOutput>,
    /// They outlive epochs, as rank 0's do.
    embeddings: HashSet<EmbeddingKey>,
}

impl FakeExecutor {
    /// Tokens are drawn from `0..vocab_size`, folded from the shares of `world_size` ranks.
    pub fn new(limits: SchedulerConfig, world_size: u32, vocab_size: u32) -> Self {
        Self {
            limits,
            world_size,
            vocab_size,
            model: None,
            plans: None,
            outputs: VecDeque::new(),
            embeddings: HashSet::new(),
        }
    }

    fn model(&mut self, step: StepId) -> Result<&mut FakeModel> {
        let out_of_order = ExecutorError::OutOfOrder { expected: None, got: step };
        self.model.as_mut().ok_or(out_of_order)
    }
}

impl Executor for FakeExecutor {
    fn begin_epoch(&mut self, start: EpochStart) -> Result<()> {
        let limits = self.limits.table_limits(start.num_blocks);
        let mut model = FakeModel::new(limits, start.epoch, self.world_size, self.vocab_size);
        self.embeddings.iter().for_each(|&key| model.install_embedding(key));
        (self.model, self.plans) = (Some(model), start.plans);
        Ok(())
    }

    fn end_epoch(&mut self) -> Result<()> {
        (self.model, self.plans) = (None, None);
        self.outputs.clear();
        Ok(())
    }

    fn forward(&mut self, plan: &Arc<StepPlan>) -> Result<()> {
        if let Some(plans) = &mut self.plans {
            plans.plan(plan)?;
        }
        Ok(self.model(plan.step)?.forward(plan)?)
    }

    fn sample(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<()> {
        if let Some(plans) = &mut self.plans {
            plans.late(step, late)?;
        }
        let output = self.model(step)?.sample(step, late)?;
        self.outputs.push_back(output);
        Ok(())
    }

    fn collect(&mut self, step: StepId, _deadline: Instant) -> Result<StepOutput> {
        let expected = self.outputs.front().map(|output| output.step);
        let output = self.outputs.pop_front().filter(|output| output.step == step);
        let output = output.ok_or(ExecutorError::OutOfOrder { expected, got: step })?;
        self.model(step)?.collected(step);
        Ok(output)
    }

    fn install_embedding(&mut self, key: EmbeddingKey, _rows: Arc<[f32]>) -> Result<()> {
        self.embeddings.insert(key);
        self.model.iter_mut().for_each(|model| model.install_embedding(key));
        Ok(())
    }

    fn drop_embedding(&mut self, key: EmbeddingKey) -> Result<()> {
        self.embeddings.remove(&key);
        self.model.iter_mut().for_each(|model| model.drop_embedding(key));
        Ok(())
    }
}
