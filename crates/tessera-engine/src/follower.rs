//! Ranks of a process that follows: fed by the leader's plan stream, nothing is scheduled here.
//!
//! Calls don't wait for the ranks, so the thread that reads the stream may be an async one; only
//! [`Follower::begin_epoch`] and [`Follower::end_epoch`] take their time and belong on a thread that may
//! block.

use std::sync::Arc;
use std::time::Duration;

use tessera_collective::{AbortHandle, Communicator};
use tessera_types::{Epoch, LateInputs, StepId, StepPlan};

use crate::executor::Result;
use crate::local_ranks::LocalRanks;

/// The follower's side of a plan stream.
pub struct Follower {
    ranks: LocalRanks,
    leave_timeout: Duration,
    /// Last step received.
    received: StepId,
    /// Step that was sampled and that the ranks were not yet told to wait for.
    sampled: Option<StepId>,
}

/// How far a follower is, for the ack to its leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FollowerAck {
    /// Highest step received.
    pub received: StepId,
    /// Highest step completed by all local ranks.
    pub completed: StepId,
    /// Sum of the local ranks' layer counters; grows while they compute.
    pub progress: u64,
    /// Largest recent layer time of the local ranks in microseconds.
    pub layer_us: u32,
}

impl Follower {
    /// `leave_timeout`: longest that ranks may take to leave an epoch.
    pub fn new(ranks: LocalRanks, leave_timeout: Duration) -> Self {
        Self { ranks, leave_timeout, received: StepId(0), sampled: None }
    }

    pub fn ranks(&self) -> &LocalRanks {
        &self.ranks
    }

    /// Joins an epoch on all local ranks and waits until they have. Communicators by ascending rank.
    pub fn begin_epoch(
        &mut self,
        epoch: Epoch,
        num_blocks: u32,
        abort: AbortHandle,
        communicators: Vec<Communicator>,
    ) -> Result<()> {
        (self.received, self.sampled) = (StepId(0), None);
        self.ranks.begin_epoch(epoch, num_blocks, abort, communicators)
    }

    /// Leaves the epoch: aborts it here if nobody has, and waits until the ranks have left. Weights stay.
    ///
    /// # Errors
    /// [`crate::ExecutorError::Hung`]: the process has to end.
    pub fn end_epoch(&mut self, reason: &str) -> Result<()> {
        self.sampled = None;
        self.ranks.end_epoch(reason, self.leave_timeout)
    }

    /// A plan arrived. Any error ends the epoch.
    pub fn plan(&mut self, plan: StepPlan) -> Result<()> {
        self.ranks.take_reports()?;
        self.ranks.has_room()?;
        self.received = plan.step;
        self.ranks.forward(&Arc::new(plan))?;
        // Only now, so that a device has the next step enqueued while it waits for the last.
        self.collect_sampled()
    }

    /// The late inputs of a step arrived. Any error ends the epoch.
    pub fn late(&mut self, step: StepId, late: LateInputs) -> Result<()> {
        self.ranks.take_reports()?;
        self.ranks.has_room()?;
        self.ranks.sample(step, &Arc::new(late))?;
        self.sampled = Some(step);
        Ok(())
    }

    /// The leader has sent nothing for a while: there may be no next plan to complete the last step with.
    pub fn beat(&mut self) -> Result<()> {
        self.ranks.take_reports()?;
        self.ranks.has_room()?;
        self.collect_sampled()
    }

    /// Where the ranks are. Cheap; for a timer of 250 ms that does no other work.
    ///
    /// # Errors
    /// The failure of a local rank, once.
    pub fn ack(&mut self) -> Result<FollowerAck> {
        self.ranks.take_reports()?;
        let ranks = self.ranks.ranks().iter().map(|handle| handle.progress());
        let start = FollowerAck {
            received: self.received,
            completed: self.received,
            ..FollowerAck::default()
        };
        Ok(ranks.fold(start, |ack, rank| FollowerAck {
            received: ack.received,
            completed: ack.completed.min(rank.completed()),
            progress: ack.progress + rank.layers(),
            layer_us: ack.layer_us.max(rank.layer_us()),
        }))
    }

    fn collect_sampled(&mut self) -> Result<()> {
        match self.sampled.take() {
            None => Ok(()),
            Some(step) => self.ranks.start_collect(step),
        }
    }
}
