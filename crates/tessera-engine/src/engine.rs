//! The engine's turn: drain, schedule, forward, apply the previous step's output, sample, report.
//!
//! At depth 1 a step is collected in its own turn, at depth 2 in the next one, while the device computes
//! that one's first half. Nothing else differs, and tokens are the same.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Select, TryRecvError, bounded};
use tessera_collective::AbortHandle;
use tessera_scheduler::Scheduler;
use tessera_types::{Epoch, SequenceId, StepId, TokenId};

use crate::config::EngineConfig;
use crate::constraints::Constraints;
use crate::embeddings::EmbeddingStore;
use crate::error::{EngineError, ExecutorError, SequenceError, chain};
use crate::executor::{EpochStart, Executor};
use crate::grammar::GrammarCompiler;
use crate::handle::{Command, EngineHandle, EngineLoad, EpochEnd, Shared};
use crate::requests::Stream;
use crate::stream::Event;
use crate::warm_up::WarmUp;

/// Where the engine reads the time. Simulation brings its own.
pub type Clock = Box<dyn Fn() -> Instant + Send>;

/// Told of the end of every epoch, on the engine thread. Must not wait.
pub type Observer = Box<dyn FnMut(EpochEnd) + Send>;

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// There was work; the next turn may follow at once.
    Worked,
    /// Nothing can be done before a command arrives.
    Idle,
    /// [`EngineHandle::shutdown`] was called.
    Stopped,
}

/// The epoch that runs.
pub(crate) struct RunningEpoch {
    pub epoch: Epoch,
    pub abort: AbortHandle,
}

/// Scheduler, executor and streams of one decoder group. Owned by one thread; simulation calls
/// [`Engine::turn`] directly.
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) scheduler: Scheduler,
    pub(crate) executor: Box<dyn Executor>,
    inbox: Receiver<Command>,
    pub(crate) shared: Arc<Shared>,
    observer: Observer,
    pub(crate) eos_token_ids: Arc<[TokenId]>,
    pub(crate) epoch: Option<RunningEpoch>,
    /// The step that was sampled and not collected yet (depth 2).
    previous: Option<StepId>,
    pub(crate) streams: HashMap<SequenceId, Stream>,
    pub(crate) constraints: Constraints,
    pub(crate) embeddings: EmbeddingStore,
    /// Sequences that wait for room for their embeddings, first come first served.
    pub(crate) waiting_for_room: VecDeque<SequenceId>,
    pub(crate) num_slow_clients: u64,
    /// What the warm-up found, once it was done.
    pub(crate) warmed_up: Option<WarmUp>,
    pub(crate) clock: Clock,
    pub(crate) started: Instant,
}

/// The engine's thread. Dropping it waits for the thread, so stop the engine first.
#[derive(Debug)]
pub struct EngineThread {
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// An engine without an epoch, and its handle.
    ///
    /// # Errors
    /// Settings that contradict each other; a thread that cannot be started.
    pub fn new(
        mut config: EngineConfig,
        executor: Box<dyn Executor>,
        observer: Observer,
    ) -> Result<(Self, EngineHandle), EngineError> {
        config.validate()?;
        let vocabulary = config.grammar_vocabulary.take();
        let compiler = vocabulary.map(GrammarCompiler::start).transpose();
        let compiler = compiler.map_err(EngineError::Spawn)?;
        let (sender, inbox) = bounded(config.inbox_capacity);
        let shared = Arc::new(Shared::default());
        let handle = EngineHandle::new(sender, Arc::clone(&shared));
        let engine = Self {
            scheduler: Scheduler::new(config.scheduler.clone())?,
            executor,
            inbox,
            shared,
            observer,
            eos_token_ids: config.eos_token_ids.clone().into(),
            epoch: None,
            previous: None,
            streams: HashMap::new(),
            constraints: Constraints::new(compiler),
            embeddings: EmbeddingStore::new(config.max_embedding_bytes),
            waiting_for_room: VecDeque::new(),
            num_slow_clients: 0,
            warmed_up: None,
            clock: Box::new(Instant::now),
            started: Instant::now(),
            config,
        };
        Ok((engine, handle))
    }

    /// Replaces the clock, which orders arrivals and measures stages.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.started = clock();
        self.clock = clock;
        self
    }

    /// [`Engine::new`] on a thread of its own.
    ///
    /// # Errors
    /// Those of [`Engine::new`], and a thread that cannot be started.
    pub fn spawn(
        config: EngineConfig,
        executor: Box<dyn Executor>,
        observer: Observer,
    ) -> Result<(EngineHandle, EngineThread), EngineError> {
        let (engine, handle) = Self::new(config, executor, observer)?;
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(|| engine.run());
        let thread = Some(thread.map_err(EngineError::Spawn)?);
        Ok((handle, EngineThread { thread }))
    }

    /// Takes turns until [`EngineHandle::shutdown`].
    pub fn run(mut self) {
        loop {
            match self.turn() {
                Turn::Worked => {}
                Turn::Idle => self.wait_for_command(),
                Turn::Stopped => return,
            }
        }
    }

    /// One turn. It waits for the device, never for a client.
    pub fn turn(&mut self) -> Turn {
        if self.shared.is_stopping() {
            self.stop();
            return Turn::Stopped;
        }
        self.drain_inbox();
        self.take_grammars();
        let stepped = self.step().unwrap_or_else(|error| {
            self.lose_epoch(&error);
            true
        });
        let reported = self.report();
        self.publish_load();
        if stepped || reported { Turn::Worked } else { Turn::Idle }
    }

    /// Schedules a step and enqueues its halves around the collection of the previous one. Returns whether
    /// there was anything to do.
    fn step(&mut self) -> Result<bool, EngineError> {
        self.check_epoch()?;
        self.grant_room()?;
        let plan = self.scheduler.schedule().map(Arc::new);
        if let Some(plan) = &plan {
            self.executor.forward(plan)?;
        }
        let previous = self.previous.take();
        if let Some(step) = previous {
            self.collect(step)?;
        }
        if let Some(plan) = &plan {
            let late = Arc::new(self.late_inputs(plan));
            self.executor.sample(plan.step, &late)?;
            match self.config.scheduler.pipeline_depth {
                1 => self.collect(plan.step)?,
                _ => self.previous = Some(plan.step),
            }
        }
        Ok(plan.is_some() || previous.is_some())
    }

    /// Waits for a step and applies its output. The flag is read after the step completed and before
    /// anything of it is reported: a step of an aborted epoch is discarded whole.
    pub(crate) fn collect(&mut self, step: StepId) -> Result<(), EngineError> {
        let output = loop {
            let deadline = Instant::now() + self.config.poll_interval;
            match self.executor.collect(step, deadline) {
                Err(ExecutorError::NotReady { .. }) => self.check_epoch()?,
                result => break result?,
            }
        };
        self.check_epoch()?;
        let failures = self.constraints.accept(&output);
        self.scheduler.apply(output)?;
        self.fail_constrained(failures);
        Ok(())
    }

    /// An error once the epoch's abort flag is set.
    fn check_epoch(&self) -> Result<(), EngineError> {
        let Some(running) = &self.epoch else { return Ok(()) };
        match running.abort.flag().reason() {
            Some(reason) if !self.config.planted.skip_abort_flag => {
                Err(EngineError::Aborted { epoch: running.epoch, reason: reason.to_owned() })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn begin_epoch(&mut self, start: EpochStart) -> Result<(), EngineError> {
        if let Some(running) = &self.epoch {
            return Err(EngineError::EpochRuns { running: running.epoch });
        }
        let (epoch, num_blocks, abort) = (start.epoch, start.num_blocks, start.abort.clone());
        self.shared.set_abort(Some(abort.clone()));
        if let Err(error) = self.executor.begin_epoch(start) {
            abort.abort(chain(&error));
            self.shared.set_abort(None);
            self.executor.end_epoch()?;
            return Err(error.into());
        }
        self.scheduler.begin_epoch(epoch, num_blocks);
        self.epoch = Some(RunningEpoch { epoch, abort });
        tracing::info!(epoch = epoch.0, num_blocks, "epoch begun");
        Ok(())
    }

    /// Ends the epoch: flag first, then the communicators (both by the abort handle), then the ranks leave
    /// and every sequence fails. Weights and embeddings stay.
    fn lose_epoch(&mut self, error: &EngineError) {
        let Some(RunningEpoch { epoch, abort }) = self.epoch.take() else { return };
        abort.abort(chain(error));
        let reason = abort.flag().reason().unwrap_or_default().to_owned();
        self.shared.set_abort(None);
        self.previous = None;
        let left = self.executor.end_epoch();
        self.scheduler.end_epoch();
        self.constraints.end_epoch();
        // Every stream, not only those the scheduler still knew: the end of one may be unreported.
        let mut lost: Vec<SequenceId> = self.streams.keys().copied().collect();
        lost.sort();
        let num_sequences = lost.len();
        tracing::warn!(epoch = epoch.0, reason, num_sequences, "epoch ended");
        for sequence in lost {
            self.fail(sequence, SequenceError::GroupLost { epoch, reason: reason.clone() });
        }
        (self.observer)(EpochEnd { epoch, reason, left, num_sequences });
    }

    fn drain_inbox(&mut self) {
        // At most what had arrived when the turn began: commands that keep coming must not hold up a step.
        for _ in 0..self.inbox.len() {
            match self.inbox.try_recv() {
                Ok(command) => self.serve(command),
                Err(_) => return,
            }
        }
    }

    fn wait_for_command(&mut self) {
        let mut select = Select::new();
        let inbox = select.recv(&self.inbox);
        if let Some(ready) = self.constraints.ready() {
            select.recv(ready);
        }
        if select.ready_timeout(self.config.poll_interval) != Ok(inbox) {
            return;
        }
        match self.inbox.try_recv() {
            Ok(command) => self.serve(command),
            Err(TryRecvError::Empty) => {}
            // Every handle is gone, so nobody can ask for anything any more.
            Err(TryRecvError::Disconnected) => self.shared.stop(),
        }
    }

    fn serve(&mut self, command: Command) {
        let served = match command {
            Command::Submit { sequence, submission, sink } => {
                self.submit(sequence, *submission, sink);
                Ok(())
            }
            Command::MediaArrived { sequence, item, rows } => {
                self.media_arrived(sequence, item, rows)
            }
            Command::MediaFailed { sequence, item, reason } => {
                self.end_with_error(sequence, SequenceError::Media { item, reason });
                Ok(())
            }
            Command::Abort { sequence, reason } => {
                self.scheduler.abort(sequence, reason);
                Ok(())
            }
            Command::BeginEpoch { start, reply } => {
                reply(self.begin_epoch(*start));
                Ok(())
            }
            Command::WarmUp { reply } => {
                let result = self.warm_up();
                if let Err(error) = &result {
                    self.lose_epoch(error);
                }
                reply(result);
                Ok(())
            }
            Command::Canary { sequence, reply } => {
                self.start_canary(sequence, reply);
                Ok(())
            }
            Command::Wake => Ok(()),
        };
        if let Err(error) = served {
            self.lose_epoch(&error.into());
        }
    }

    /// Ends the epoch and refuses what still waits in the inbox.
    fn stop(&mut self) {
        self.lose_epoch(&EngineError::ShuttingDown);
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Submit { mut sink, .. } => {
                    let error = SequenceError::ShuttingDown;
                    // Whether the client hears of it is its own affair.
                    let _ = sink.send(Event::Failed { error });
                }
                Command::BeginEpoch { reply, .. } => reply(Err(EngineError::ShuttingDown)),
                Command::WarmUp { reply } => reply(Err(EngineError::ShuttingDown)),
                Command::Canary { reply, .. } => reply(Err(EngineError::ShuttingDown)),
                _ => {}
            }
        }
        self.publish_load();
    }

    pub(crate) fn publish_load(&self) {
        self.shared.set_load(EngineLoad {
            epoch: self.scheduler.epoch(),
            scheduler: self.scheduler.load(),
            counters: self.scheduler.counters(),
            token_budget: self.scheduler.token_budget(),
            completed_step: self.scheduler.applied_step(),
            embedding_bytes: self.embeddings.used_bytes(),
            grammars: self.constraints.load(),
            num_slow_clients: self.num_slow_clients,
        });
    }
}

impl EngineThread {
    /// Waits until the engine has stopped. `false`: its thread panicked.
    pub fn join(mut self) -> bool {
        self.thread.take().is_none_or(|thread| thread.join().is_ok())
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _ = thread.join();
        }
    }
}
