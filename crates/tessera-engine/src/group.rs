//! The executor of a decoder group: the ranks of this process, and followers behind a plan stream.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_types::{
    EmbeddingKey, LateInputs, SequenceSlot, StepId, StepOutput, StepPlan, TokenMask,
};

use crate::executor::{EpochStart, Executor, PlanSink, Result};
use crate::local_ranks::LocalRanks;

/// Runs steps on the leader's local ranks and sends every plan to the followers first, so that their
/// ranks meet ours in the collectives.
pub struct GroupExecutor {
    ranks: LocalRanks,
    leave_timeout: Duration,
    plans: Option<Box<dyn PlanSink>>,
    /// Step that local ranks were told to wait for and that has not been collected.
    collecting: Option<StepId>,
}

impl GroupExecutor {
    /// The first of `ranks` is rank 0. `leave_timeout`: longest that ranks may take to leave an epoch.
    pub fn new(ranks: LocalRanks, leave_timeout: Duration) -> Self {
        Self { ranks, leave_timeout, plans: None, collecting: None }
    }

    pub fn ranks(&self) -> &LocalRanks {
        &self.ranks
    }
}

impl Executor for GroupExecutor {
    fn begin_epoch(&mut self, start: EpochStart) -> Result<()> {
        let EpochStart { epoch, num_blocks, abort, communicators, plans } = start;
        (self.plans, self.collecting) = (plans, None);
        self.ranks.begin_epoch(epoch, num_blocks, abort, communicators)
    }

    fn end_epoch(&mut self) -> Result<()> {
        (self.plans, self.collecting) = (None, None);
        self.ranks.end_epoch("the leader left the epoch", self.leave_timeout)
    }

    fn forward(&mut self, plan: &Arc<StepPlan>) -> Result<()> {
        if let Some(plans) = &mut self.plans {
            plans.plan(plan)?;
        }
        self.ranks.forward(plan)
    }

    fn sample(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<()> {
        if let Some(plans) = &mut self.plans {
            plans.late(step, &late_of_followers(late))?;
        }
        self.ranks.sample(step, late)
    }

    fn collect(&mut self, step: StepId, deadline: Instant) -> Result<StepOutput> {
        if self.collecting != Some(step) {
            self.ranks.start_collect(step)?;
            self.collecting = Some(step);
        }
        let output = self.ranks.finish_collect(step, deadline)?;
        self.collecting = None;
        Ok(output)
    }

    fn install_embedding(&mut self, key: EmbeddingKey, rows: Arc<[f32]>) -> Result<()> {
        self.ranks.install_embedding(key, rows)
    }

    fn drop_embedding(&mut self, key: EmbeddingKey) -> Result<()> {
        self.ranks.drop_embedding(key)
    }
}

/// Rank 0 draws what a mask bounds, so followers are told which slots these are, and not their masks: 19 KB
/// each at 151,936 tokens.
fn late_of_followers(late: &Arc<LateInputs>) -> Arc<LateInputs> {
    let named =
        |(slot, _): &(SequenceSlot, TokenMask)| (*slot, TokenMask { words: Arc::default() });
    match late.masks.is_empty() {
        true => Arc::clone(late),
        false => Arc::new(LateInputs { masks: late.masks.iter().map(named).collect() }),
    }
}

impl fmt::Debug for GroupExecutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupExecutor")
            .field("ranks", &self.ranks.ranks().len())
            .field("has_followers", &self.plans.is_some())
            .field("collecting", &self.collecting)
            .finish_non_exhaustive()
    }
}
