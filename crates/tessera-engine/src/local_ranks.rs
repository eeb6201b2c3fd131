//! The rank threads of this process, driven together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, TrySendError, bounded};
use tessera_collective::{AbortHandle, Communicator};
use tessera_kernels::Backend;
use tessera_model::{LoadMeter, LoadProgress};
use tessera_types::{EmbeddingKey, Epoch, LateInputs, Rank, StepId, StepOutput, StepPlan};

use crate::error::{ExecutorError, RankError};
use crate::executor::Result;
use crate::rank::RankSpec;
use crate::rank_thread::{
    LoadingRank, RankCommand, RankHandle, RankNews, RankProgress, RankReport,
};

/// How often a wait for a rank looks at the epoch's abort handle.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often the progress of loading is told.
const LOAD_INTERVAL: Duration = Duration::from_millis(100);

/// Reports that wait for the owner. Ranks never wait for it: what does not fit is dropped, which can
/// only happen to an owner that no longer reads.
const REPORTS_PER_RANK: usize = 64;

/// All ranks of this process, by ascending rank, and the epoch they are in.
pub struct LocalRanks {
    ranks: Vec<RankHandle>,
    reports: Receiver<RankReport>,
    epoch: Option<LocalEpoch>,
}

struct LocalEpoch {
    epoch: Epoch,
    abort: AbortHandle,
    /// Steps asked for by `start_collect`, oldest first.
    collecting: VecDeque<Collecting>,
}

/// A step whose completion is being reported rank by rank.
struct Collecting {
    step: StepId,
    /// Local ranks that have not completed it.
    missing: usize,
    /// Of the first local rank.
    output: Option<StepOutput>,
}

impl LocalRanks {
    /// Loads ranks, each on its own thread, and waits for all. `specs` are ascending by rank.
    ///
    /// # Errors
    /// The first rank that could not be loaded; the others are ended.
    pub fn load<B, F>(specs: Vec<RankSpec>, make_backend: F) -> Result<Self, RankError>
    where
        B: Backend,
        F: Fn(Rank) -> tessera_kernels::Result<B> + Clone + Send + 'static,
    {
        Self::load_observed(specs, make_backend, &mut |_| {})
    }

    /// The same; meanwhile `observe` is told a few times a second how far all ranks together are, and
    /// once more at the end.
    ///
    /// # Errors
    /// As for [`LocalRanks::load`].
    pub fn load_observed<B, F>(
        specs: Vec<RankSpec>,
        make_backend: F,
        observe: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, RankError>
    where
        B: Backend,
        F: Fn(Rank) -> tessera_kernels::Result<B> + Clone + Send + 'static,
    {
        let meter = LoadMeter::default();
        let (sender, reports) = bounded(REPORTS_PER_RANK * specs.len().max(1));
        let mut loading = Vec::with_capacity(specs.len());
        for spec in specs {
            let (make_backend, sender, rank) = (make_backend.clone(), sender.clone(), spec.rank);
            let report = Box::new(move |report| drop(sender.try_send(report)));
            let make_backend = move || make_backend(rank);
            loading.push(LoadingRank::spawn(spec, make_backend, meter.clone(), report)?);
        }
        let ranks = loading.into_iter().map(|mut loading| {
            let rank = loading.rank();
            while !loading.wait_for(LOAD_INTERVAL) {
                observe(meter.progress());
            }
            let loaded = loading.finish();
            if let Err(error) = &loaded {
                tracing::error!(rank = rank.0, error = %crate::error::chain(error), "rank could not be loaded");
            }
            loaded
        });
        let ranks = ranks.collect::<Result<_, RankError>>()?;
        observe(meter.progress());
        Ok(Self { ranks, reports, epoch: None })
    }

    /// The ranks, ascending.
    pub fn ranks(&self) -> &[RankHandle] {
        &self.ranks
    }

    /// Progress of every local rank, for threads that report it.
    pub fn progress(&self) -> Vec<RankProgress> {
        self.ranks.iter().map(RankHandle::progress).collect()
    }

    /// Joins an epoch on every rank and waits until all have.
    pub fn begin_epoch(
        &mut self,
        epoch: Epoch,
        num_blocks: u32,
        abort: AbortHandle,
        communicators: Vec<Communicator>,
    ) -> Result<()> {
        let (expected, got) = (self.ranks.len(), communicators.len());
        if expected != got {
            return Err(ExecutorError::Communicators { expected, got });
        }
        self.epoch = Some(LocalEpoch { epoch, abort, collecting: VecDeque::new() });
        for (index, communicator) in communicators.into_iter().enumerate() {
            self.send(index, RankCommand::BeginEpoch { epoch, num_blocks, communicator })?;
        }
        let mut missing = self.ranks.len();
        while missing > 0 {
            match self.next_report(None)? {
                Some(RankReport { news: RankNews::Began, .. }) => missing -= 1,
                Some(RankReport { rank, news: RankNews::Failed(source), .. }) => {
                    return Err(ExecutorError::Rank { rank, source });
                }
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    /// Leaves the epoch, aborting it if nobody has, and waits until all ranks have left.
    ///
    /// # Errors
    /// [`ExecutorError::Hung`] after `timeout`, [`ExecutorError::RankGone`].
    pub fn end_epoch(&mut self, reason: &str, timeout: Duration) -> Result<()> {
        let Some(ended) = self.epoch.take() else { return Ok(()) };
        ended.abort.abort(reason);
        let deadline = Instant::now() + timeout;
        let mut missing: Vec<Rank> = self.ranks.iter().map(RankHandle::rank).collect();
        for handle in &self.ranks {
            match handle.commands().send_deadline(RankCommand::EndEpoch, deadline) {
                Ok(()) => {}
                Err(SendTimeoutError::Timeout(_)) => {
                    return Err(ExecutorError::Hung { ranks: missing });
                }
                Err(SendTimeoutError::Disconnected(_)) => {
                    return Err(ExecutorError::RankGone { rank: handle.rank() });
                }
            }
        }
        while !missing.is_empty() {
            match self.reports.recv_deadline(deadline) {
                Ok(RankReport { rank, epoch, news: RankNews::Ended }) if epoch == ended.epoch => {
                    missing.retain(|&missing| missing != rank);
                }
                // What else the epoch had to say is discarded with it.
                Ok(_) => {}
                Err(_) => return Err(ExecutorError::Hung { ranks: missing }),
            }
        }
        Ok(())
    }

    /// Enqueues the first half of a step on every rank.
    pub fn forward(&mut self, plan: &Arc<StepPlan>) -> Result<()> {
        self.send_all(|| RankCommand::Forward(Arc::clone(plan)))
    }

    /// Enqueues the second half of a step on every rank.
    pub fn sample(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<()> {
        self.send_all(|| RankCommand::Sample(step, Arc::clone(late)))
    }

    /// Lets every rank wait for a step, once the commands before are done.
    pub fn start_collect(&mut self, step: StepId) -> Result<()> {
        let missing = self.ranks.len();
        if let Some(epoch) = &mut self.epoch {
            epoch.collecting.push_back(Collecting { step, missing, output: None });
        }
        self.send_all(|| RankCommand::Collect(step))
    }

    /// Waits for a step that was given to [`LocalRanks::start_collect`] on all local ranks, and returns
    /// what the first of them gave.
    pub fn finish_collect(&mut self, step: StepId, deadline: Instant) -> Result<StepOutput> {
        loop {
            let collecting = self.epoch.as_mut().and_then(|epoch| epoch.collecting.front_mut());
            let expected = collecting.as_ref().map(|collecting| collecting.step);
            let Some(collecting) = collecting.filter(|collecting| collecting.step == step) else {
                return Err(ExecutorError::OutOfOrder { expected, got: step });
            };
            if collecting.missing == 0 {
                let output = collecting.output.take().unwrap_or_default();
                self.epoch.iter_mut().for_each(|epoch| drop(epoch.collecting.pop_front()));
                return Ok(output);
            }
            match self.next_report(Some(deadline))? {
                Some(report) => self.note(report)?,
                None => return Err(ExecutorError::NotReady { step }),
            }
        }
    }

    /// Takes what ranks have reported, without waiting.
    ///
    /// # Errors
    /// The first failure of a rank in this epoch.
    pub fn take_reports(&mut self) -> Result<()> {
        while let Ok(report) = self.reports.try_recv() {
            if self.is_current(&report) {
                self.note(report)?;
            }
        }
        while let Some(epoch) = &mut self.epoch
            && epoch.collecting.front().is_some_and(|collecting| collecting.missing == 0)
        {
            epoch.collecting.pop_front();
        }
        Ok(())
    }

    /// Gives the first local rank an embedding.
    pub fn install_embedding(&mut self, key: EmbeddingKey, rows: Arc<[f32]>) -> Result<()> {
        self.send(0, RankCommand::InstallEmbedding { key, rows })
    }

    /// Takes it away.
    pub fn drop_embedding(&mut self, key: EmbeddingKey) -> Result<()> {
        self.send(0, RankCommand::DropEmbedding { key })
    }

    /// Whether a command could be sent to every rank without waiting.
    pub fn has_room(&self) -> Result<()> {
        match self.ranks.iter().find(|handle| handle.commands().is_full()) {
            None => Ok(()),
            Some(handle) => Err(ExecutorError::QueueFull { rank: handle.rank() }),
        }
    }

    fn note(&mut self, report: RankReport) -> Result<()> {
        let first = self.ranks[0].rank();
        let Some(epoch) = &mut self.epoch else { return Ok(()) };
        match report.news {
            RankNews::Failed(source) => {
                return Err(ExecutorError::Rank { rank: report.rank, source });
            }
            RankNews::Began | RankNews::Ended => {}
            RankNews::Completed(output) => {
                let collecting =
                    epoch.collecting.iter_mut().find(|collecting| collecting.step == output.step);
                if let Some(collecting) = collecting {
                    collecting.missing -= 1;
                    if report.rank == first {
                        collecting.output = Some(output);
                    }
                }
            }
        }
        Ok(())
    }

    /// The next report of this epoch. `None`: the deadline passed, or without one, a poll interval did.
    fn next_report(&self, deadline: Option<Instant>) -> Result<Option<RankReport>> {
        let deadline = deadline.unwrap_or_else(|| Instant::now() + POLL_INTERVAL);
        loop {
            match self.reports.recv_deadline(deadline) {
                Ok(report) if self.is_current(&report) => return Ok(Some(report)),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.check_threads()?;
                    return Ok(None);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ExecutorError::RankGone { rank: self.ranks[0].rank() });
                }
            }
        }
    }

    fn is_current(&self, report: &RankReport) -> bool {
        self.epoch.as_ref().is_some_and(|epoch| epoch.epoch == report.epoch)
    }

    fn check_threads(&self) -> Result<()> {
        match self.ranks.iter().find(|handle| handle.is_gone()) {
            None => Ok(()),
            Some(handle) => Err(ExecutorError::RankGone { rank: handle.rank() }),
        }
    }

    fn send_all(&mut self, command: impl Fn() -> RankCommand) -> Result<()> {
        (0..self.ranks.len()).try_for_each(|index| self.send(index, command()))
    }

    /// Waits for room in the rank's queue: a rank inside a step takes commands again when the step is
    /// done, and an abort ends the step.
    fn send(&self, index: usize, command: RankCommand) -> Result<()> {
        let handle = &self.ranks[index];
        let rank = handle.rank();
        let mut command = match handle.commands().try_send(command) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Disconnected(_)) => return Err(ExecutorError::RankGone { rank }),
            Err(TrySendError::Full(command)) => command,
        };
        loop {
            command = match handle.commands().send_timeout(command, POLL_INTERVAL) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Disconnected(_)) => {
                    return Err(ExecutorError::RankGone { rank });
                }
                Err(SendTimeoutError::Timeout(command)) => command,
            };
            if self.epoch.as_ref().is_none_or(|epoch| epoch.abort.is_aborted()) {
                return Err(ExecutorError::QueueFull { rank });
            }
        }
    }
}

impl Drop for LocalRanks {
    /// A rank inside a collective comes back only by an abort, and its thread is joined next.
    fn drop(&mut self) {
        if let Some(epoch) = &self.epoch {
            epoch.abort.abort("the ranks of this process shut down");
        }
    }
}
