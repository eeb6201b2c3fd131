//! How async code talks to the engine: commands go into a bounded inbox, events come back through sinks.
//! No call waits.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use tessera_collective::AbortHandle;
use tessera_scheduler::{Counters, Load};
use tessera_types::{
    BlockKey, Epoch, FinishReason, Prompt, SamplingParams, SequenceId, StepId, TenantId, TokenId,
};

use crate::canary::CanaryReply;
use crate::constraints::GrammarLoad;
use crate::error::{EngineError, ExecutorError, SubmitError};
use crate::executor::EpochStart;
use crate::stream::EventSink;
use crate::warm_up::WarmUpReply;

/// A sequence to run. Values are those the router decided; nothing is defaulted here.
#[derive(Debug, Clone)]
pub struct Submission {
    pub prompt: Arc<Prompt>,
    /// Output of earlier attempts: forced, counted, not reported again.
    pub output: Vec<TokenId>,
    pub sampling: Arc<SamplingParams>,
    /// Effective seed of this choice.
    pub seed: u64,
    /// Higher goes first.
    pub priority: i32,
    pub tenant: TenantId,
    /// Time since the request arrived at the router, kept over moves.
    pub age: Duration,
    /// Keys of the prompt's full blocks; empty: no prefix caching.
    pub block_keys: Vec<BlockKey>,
}

/// Takes the outcome of a command on the engine thread. Must not wait.
pub type EpochReply = Box<dyn FnOnce(Result<(), EngineError>) + Send>;

/// What the inbox carries.
pub(crate) enum Command {
    Submit {
        sequence: SequenceId,
        submission: Box<Submission>,
        sink: Box<dyn EventSink>,
    },
    MediaArrived {
        sequence: SequenceId,
        item: u32,
        rows: Arc<[f32]>,
    },
    MediaFailed {
        sequence: SequenceId,
        item: u32,
        reason: String,
    },
    Abort {
        sequence: SequenceId,
        reason: FinishReason,
    },
    BeginEpoch {
        start: Box<EpochStart>,
        reply: EpochReply,
    },
    WarmUp {
        reply: WarmUpReply,
    },
    Canary {
        sequence: SequenceId,
        reply: CanaryReply,
    },
    /// Look at the flags.
    Wake,
}

/// The end of an epoch, told once to the engine's observer on the engine thread.
#[derive(Debug)]
pub struct EpochEnd {
    pub epoch: Epoch,
    pub reason: String,
    /// Whether the ranks left in good order. If not, the process has to end: weights and device are of no
    /// use any more (CLUSTER §2, ladder b).
    pub left: Result<(), ExecutorError>,
    /// Sequences that failed with it.
    pub num_sequences: usize,
}

/// How full the engine is, as of its last turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineLoad {
    /// `None` between epochs.
    pub epoch: Option<Epoch>,
    pub scheduler: Load,
    /// Since the start.
    pub counters: Counters,
    /// Tokens that a step may hold now.
    pub token_budget: u32,
    /// Steps completed in this epoch; grows while there is work.
    pub completed_step: StepId,
    pub embedding_bytes: u64,
    pub grammars: GrammarLoad,
    /// Sequences that lost their stream since the start because a client was too slow.
    pub num_slow_clients: u64,
}

/// What the handles and the engine share.
#[derive(Default)]
pub(crate) struct Shared {
    next_sequence: AtomicU64,
    load: Mutex<EngineLoad>,
    /// Ends the running epoch.
    abort: Mutex<Option<AbortHandle>>,
    is_stopping: AtomicBool,
}

impl Shared {
    pub fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
    }

    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    pub fn set_load(&self, load: EngineLoad) {
        *lock(&self.load) = load;
    }

    pub fn set_abort(&self, abort: Option<AbortHandle>) {
        *lock(&self.abort) = abort;
    }

    pub fn new_sequence(&self) -> SequenceId {
        SequenceId(self.next_sequence.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Commands for one engine, from any thread. Every call returns at once; a full inbox is
/// [`SubmitError::Busy`].
#[derive(Clone)]
pub struct EngineHandle {
    inbox: Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    pub(crate) fn new(inbox: Sender<Command>, shared: Arc<Shared>) -> Self {
        Self { inbox, shared }
    }

    /// Hands over a sequence. Refusals come as [`crate::Event::Failed`] through the sink.
    pub fn submit(
        &self,
        submission: Submission,
        sink: Box<dyn EventSink>,
    ) -> Result<SequenceId, SubmitError> {
        let sequence = self.shared.new_sequence();
        self.send(Command::Submit { sequence, submission: Box::new(submission), sink })?;
        Ok(sequence)
    }

    /// The embedding `[rows, hidden]` of an item that was asked for by [`crate::Event::MediaNeeded`],
    /// row-major f32. It serves every sequence that needs the same embedding. One that nobody waits for,
    /// since it came twice or was never asked for, is dropped.
    pub fn media_arrived(
        &self,
        sequence: SequenceId,
        item: u32,
        rows: Arc<[f32]>,
    ) -> Result<(), SubmitError> {
        self.send(Command::MediaArrived { sequence, item, rows })
    }

    /// An item cannot be had: fails its sequence.
    pub fn media_failed(
        &self,
        sequence: SequenceId,
        item: u32,
        reason: impl Into<String>,
    ) -> Result<(), SubmitError> {
        self.send(Command::MediaFailed { sequence, item, reason: reason.into() })
    }

    /// Ends a sequence: its blocks are free once no step in flight names them. It answers with
    /// [`crate::Event::Finished`] and `reason`, unless it ended before.
    pub fn abort(&self, sequence: SequenceId, reason: FinishReason) -> Result<(), SubmitError> {
        self.send(Command::Abort { sequence, reason })
    }

    /// Joins an epoch. The engine answers when every local rank has joined; then sequences are taken. Run
    /// [`EngineHandle::warm_up`] and [`EngineHandle::canary`] before the first.
    pub fn begin_epoch(&self, start: EpochStart, reply: EpochReply) -> Result<(), SubmitError> {
        self.send(Command::BeginEpoch { start: Box::new(start), reply })
    }

    /// Ends the running epoch from any thread, also while the engine waits for a step: sets the flag and
    /// aborts the communicators. Steps in flight are discarded; sequences get
    /// [`crate::SequenceError::GroupLost`]; the observer hears of it when the ranks have left.
    pub fn end_epoch(&self, reason: &str) {
        if let Some(abort) = &*lock(&self.shared.abort) {
            abort.abort(reason);
        }
        // A full inbox wakes the engine just as well.
        let _ = self.send(Command::Wake);
    }

    /// Runs full steps through all ranks and fits the token budget to [`crate::EngineConfig`]'s target. The
    /// engine does nothing else meanwhile, so this goes before the first sequence of a process.
    pub fn warm_up(&self, reply: WarmUpReply) -> Result<(), SubmitError> {
        self.send(Command::WarmUp { reply })
    }

    /// Runs the canary through all ranks and replies with its token ids.
    pub fn canary(&self, reply: CanaryReply) -> Result<(), SubmitError> {
        let sequence = self.shared.new_sequence();
        self.send(Command::Canary { sequence, reply })
    }

    /// How full the engine is, as of its last turn.
    pub fn load(&self) -> EngineLoad {
        *lock(&self.shared.load)
    }

    /// Stops the engine after its current turn: ends the epoch and fails what still runs.
    pub fn shutdown(&self) {
        self.shared.stop();
        self.end_epoch("the engine is shutting down");
    }

    fn send(&self, command: Command) -> Result<(), SubmitError> {
        self.inbox.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => SubmitError::Busy,
            TrySendError::Disconnected(_) => SubmitError::Stopped,
        })
    }
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("load", &self.load()).finish_non_exhaustive()
    }
}
