//! The thread of a rank: commands in, reports out, and a progress that anyone may read.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use tessera_collective::Communicator;
use tessera_kernels::{Backend, MemoryReport, Progress};
use tessera_model::LoadMeter;
use tessera_types::{
    EmbeddingKey, Epoch, LateInputs, NumericsId, Rank, StepId, StepOutput, StepPlan,
};

use crate::error::{RankError, chain};
use crate::rank::{RankSpec, RankWorker};

/// Commands that wait for a rank. A step is three; embeddings come one by one. When it is full the
/// engine waits for the rank, and a follower's stream counts as broken.
const QUEUE_CAPACITY: usize = 64;

/// Steps over which the largest layer time is remembered.
const RECENT_STEPS: usize = 32;

/// What a rank tells about itself once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankInfo {
    pub rank: Rank,
    /// Name of the backend.
    pub backend: &'static str,
    /// Bytes of one KV block over all layers of this rank.
    pub kv_block_bytes: u64,
    pub memory: MemoryReport,
    /// Of the whole group at its tensor-parallel degree.
    pub numerics_id: NumericsId,
}

/// How far a rank is. Readable from any thread without locks, also while the rank is inside a step.
#[derive(Debug, Clone)]
pub struct RankProgress {
    layers: Progress,
    shared: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    completed: AtomicU64,
    layer_us: AtomicU32,
}

impl RankProgress {
    /// Layers computed since the process began; grows while the rank computes.
    pub fn layers(&self) -> u64 {
        self.layers.count()
    }

    /// Last step completed in this epoch.
    pub fn completed(&self) -> StepId {
        StepId(self.shared.completed.load(Ordering::Acquire))
    }

    /// Largest mean layer time of the recent steps in microseconds; 0 before the first.
    pub fn layer_us(&self) -> u32 {
        self.shared.layer_us.load(Ordering::Relaxed)
    }
}

/// What a rank thread is told.
#[derive(Debug)]
pub(crate) enum RankCommand {
    BeginEpoch { epoch: Epoch, num_blocks: u32, communicator: Communicator },
    EndEpoch,
    InstallEmbedding { key: EmbeddingKey, rows: Arc<[f32]> },
    DropEmbedding { key: EmbeddingKey },
    Forward(Arc<StepPlan>),
    Sample(StepId, Arc<LateInputs>),
    Collect(StepId),
}

/// What a rank thread answers. Each rank sends one `Began` and one `Ended` per epoch, one `Completed`
/// per collected step, and at most one `Failed` per epoch.
#[derive(Debug)]
pub(crate) struct RankReport {
    pub rank: Rank,
    pub epoch: Epoch,
    pub news: RankNews,
}

#[derive(Debug)]
pub(crate) enum RankNews {
    Began,
    Ended,
    Completed(StepOutput),
    /// The rank drops the rest of its epoch's commands.
    Failed(RankError),
}

/// Takes reports on the rank's thread; must not wait for the rank.
pub(crate) type ReportSink = Box<dyn Fn(RankReport) + Send>;

/// The owner's end of a rank thread. Dropping it ends the thread after its current command.
#[derive(Debug)]
pub struct RankHandle {
    info: RankInfo,
    progress: RankProgress,
    commands: Option<Sender<RankCommand>>,
    thread: Option<JoinHandle<()>>,
}

/// What a rank's thread says once, when its weights are in place or cannot be had.
type Loaded = Result<(RankInfo, RankProgress), RankError>;

/// A rank that is being loaded on its own thread.
pub struct LoadingRank {
    rank: Rank,
    commands: Sender<RankCommand>,
    loaded: Receiver<Loaded>,
    /// What came out of `loaded`.
    outcome: Option<Loaded>,
    thread: JoinHandle<()>,
}

impl LoadingRank {
    /// Starts a thread that loads the rank and then serves it. The backend is made on the thread, since
    /// it need not be `Send`.
    ///
    /// # Errors
    /// [`RankError::Spawn`].
    pub(crate) fn spawn<B, F>(
        spec: RankSpec,
        make_backend: F,
        meter: LoadMeter,
        report: ReportSink,
    ) -> Result<Self, RankError>
    where
        B: Backend,
        F: FnOnce() -> tessera_kernels::Result<B> + Send + 'static,
    {
        let (commands, inbox) = bounded(QUEUE_CAPACITY);
        let (loaded_sender, loaded) = bounded(1);
        let rank = spec.rank;
        let load = move || RankWorker::load(make_backend()?, &spec, &meter);
        let body = move || match load() {
            Err(error) => drop(loaded_sender.send(Err(error))),
            Ok(worker) => {
                let progress = RankProgress { layers: worker.layers(), shared: Arc::default() };
                let served = (worker.info(), progress.clone());
                // The owner may have given up meanwhile; then the inbox is closed as well.
                let _ = loaded_sender.send(Ok(served));
                drop(loaded_sender);
                Server {
                    worker,
                    progress,
                    report,
                    epoch: Epoch(0),
                    failed: false,
                    recent: VecDeque::new(),
                }
                .run(&inbox);
            }
        };
        let thread = std::thread::Builder::new().name(format!("rank-{rank}")).spawn(body);
        let thread = thread.map_err(RankError::Spawn)?;
        Ok(Self { rank, commands, loaded, outcome: None, thread })
    }

    /// Waits for the rank for a while. True: it is loaded, or could not be.
    pub(crate) fn wait_for(&mut self, timeout: Duration) -> bool {
        if self.outcome.is_none() {
            self.outcome = match self.loaded.recv_timeout(timeout) {
                Ok(outcome) => Some(outcome),
                Err(RecvTimeoutError::Disconnected) => Some(Err(RankError::LoadPanicked)),
                Err(RecvTimeoutError::Timeout) => None,
            };
        }
        self.outcome.is_some()
    }

    /// Waits until the rank is loaded.
    ///
    /// # Errors
    /// What loading met, with file and tensor.
    pub(crate) fn finish(self) -> Result<RankHandle, RankError> {
        let Self { commands, loaded, outcome, thread, .. } = self;
        let outcome = outcome.or_else(|| loaded.recv().ok());
        let (info, progress) = outcome.unwrap_or(Err(RankError::LoadPanicked))?;
        Ok(RankHandle { info, progress, commands: Some(commands), thread: Some(thread) })
    }

    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }
}

impl RankHandle {
    pub fn info(&self) -> &RankInfo {
        &self.info
    }

    pub fn rank(&self) -> Rank {
        self.info.rank
    }

    pub fn progress(&self) -> RankProgress {
        self.progress.clone()
    }

    /// Whether the thread has ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(crate) fn commands(&self) -> &Sender<RankCommand> {
        self.commands.as_ref().expect("taken in drop only")
    }
}

impl Drop for RankHandle {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook; there is nobody to tell here.
            let _ = thread.join();
        }
    }
}

/// The body of a rank thread.
struct Server<B: Backend> {
    worker: RankWorker<B>,
    progress: RankProgress,
    report: ReportSink,
    epoch: Epoch,
    /// A command of this epoch failed: the rest of its steps are dropped.
    failed: bool,
    recent: VecDeque<Duration>,
}

impl<B: Backend> Server<B> {
    fn run(mut self, inbox: &Receiver<RankCommand>) {
        for command in inbox {
            if let Err(error) = self.serve(command) {
                self.fail(error);
            }
        }
    }

    fn serve(&mut self, command: RankCommand) -> Result<(), RankError> {
        match command {
            RankCommand::BeginEpoch { epoch, num_blocks, communicator } => {
                (self.epoch, self.failed) = (epoch, false);
                self.progress.shared.completed.store(0, Ordering::Release);
                self.worker.begin_epoch(epoch, num_blocks, communicator)?;
                self.tell(RankNews::Began);
            }
            RankCommand::EndEpoch => {
                self.worker.end_epoch()?;
                self.tell(RankNews::Ended);
            }
            RankCommand::InstallEmbedding { key, rows } => self.worker.install_embedding(key, rows),
            RankCommand::DropEmbedding { key } => self.worker.drop_embedding(key),
            _ if self.failed => {}
            RankCommand::Forward(plan) => self.worker.forward(&plan)?,
            RankCommand::Sample(step, late) => self.worker.sample(step, &late)?,
            RankCommand::Collect(step) => {
                let completed = self.worker.collect(step)?;
                self.note_layer_time(completed.layer_time);
                self.progress.shared.completed.store(step.0, Ordering::Release);
                self.tell(RankNews::Completed(completed.output));
            }
        }
        Ok(())
    }

    /// The first failure of an epoch ends it for every rank that this one can reach.
    fn fail(&mut self, error: RankError) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        self.worker.abort(format!("rank {}: {}", self.worker.rank(), chain(&error)));
        self.tell(RankNews::Failed(error));
    }

    fn tell(&self, news: RankNews) {
        (self.report)(RankReport { rank: self.worker.rank(), epoch: self.epoch, news });
    }

    fn note_layer_time(&mut self, layer_time: Option<Duration>) {
        let Some(layer_time) = layer_time else { return };
        if self.recent.len() == RECENT_STEPS {
            self.recent.pop_front();
        }
        self.recent.push_back(layer_time);
        let largest = self.recent.iter().max().copied().unwrap_or_default();
        let layer_us = u32::try_from(largest.as_micros()).unwrap_or(u32::MAX);
        self.progress.shared.layer_us.store(layer_us, Ordering::Relaxed);
    }
}
