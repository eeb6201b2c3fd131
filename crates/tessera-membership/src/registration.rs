//! A member's registration: its keys under a lease that is kept alive on a thread of its own.
//!
//! Invariants
//! - All decisions are the machine's (`tessera_cluster::lease_keeper`); this module carries events
//!   and actions between it, the store and the owner.
//! - The thread has its own runtime and its own connection, so that a busy process never misses a
//!   keepalive.
//! - Time is CLOCK_BOOTTIME, which goes on while the machine sleeps, as the store's does.
//!
//! Queues: at most [`MAX_PENDING_REQUESTS`] requests of the owner wait; more are refused with
//! [`RegistrationError::TooManyPending`].

use std::collections::HashMap;
use std::thread::JoinHandle;
use std::time::Duration;

use tessera_cluster::lease_keeper::{
    KeyOutcome, KeyRequestId, LeaseAction, LeaseEvent, LeaseKeeper, LeaseKeeperConfig, LeaseState,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::config::StoreConfig;
use crate::error::RegistrationError;
use crate::lease_calls::perform;
use crate::store::Store;

/// Most requests of the owner that may wait for the store.
pub const MAX_PENDING_REQUESTS: usize = 256;
/// Requests that may wait for the thread itself, which takes them at once.
const COMMAND_QUEUE: usize = 64;
/// Longest sleep of the thread. Timers do not run while the machine sleeps, so the clock is looked
/// at this often.
const MAX_SLEEP: Duration = Duration::from_millis(500);

/// Entry point of a process that wants to be a member.
#[derive(Debug)]
pub struct Membership;

impl Membership {
    /// Registers `key` with `value` under a lease of at least `ttl`, and keeps it so. Returns at
    /// once; [`Registration::alive`] waits for the store. While the store is down the thread keeps
    /// trying.
    ///
    /// Errors: settings out of range, no thread to be had.
    pub fn register(
        store: StoreConfig,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        ttl: Duration,
    ) -> Result<Registration, RegistrationError> {
        let config = LeaseKeeperConfig {
            ttl,
            call_timeout: store.call_timeout,
            ..LeaseKeeperConfig::default()
        };
        Self::register_with(store, key, value, config)
    }

    /// [`Membership::register`] with all timing in the caller's hands.
    pub fn register_with(
        store: StoreConfig,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        config: LeaseKeeperConfig,
    ) -> Result<Registration, RegistrationError> {
        config.validate().map_err(RegistrationError::InvalidLease)?;
        store.validate().map_err(RegistrationError::InvalidStore)?;
        let keeper =
            LeaseKeeper::new(config, key.into(), value.into(), crate::random_seed(), boottime());
        let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
        let start = LeaseState::Unknown { lease_id: None, age: Duration::ZERO };
        let (states, state) = watch::channel(start);
        let thread = std::thread::Builder::new()
            .name("tessera-lease".to_owned())
            .spawn(move || run_thread(store, keeper, inbox, states))
            .map_err(RegistrationError::SpawnThread)?;
        Ok(Registration { commands, state, thread: Some(thread) })
    }
}

/// A member's registration. Dropping it stops the keepalives, so that the store forgets the member
/// after the TTL; [`Registration::revoke`] makes it forget at once.
#[derive(Debug)]
pub struct Registration {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<LeaseState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Command {
    Put { key: String, value: Vec<u8>, reply: oneshot::Sender<Reply> },
    Forget { key: String, reply: oneshot::Sender<Reply> },
    Revoke,
}

#[derive(Debug)]
enum Reply {
    Outcome(KeyOutcome),
    TooManyPending,
}

impl Registration {
    /// The lease as of the last answer of the store; `None` before the first and after a loss.
    pub fn lease_id(&self) -> Option<i64> {
        match &*self.state.borrow() {
            LeaseState::Alive { lease_id, .. } => Some(*lease_id),
            LeaseState::Unknown { lease_id, .. } => *lease_id,
            LeaseState::Lost { .. } => None,
        }
    }

    /// The state of the lease, to be looked at or waited on. Ends when the registration does.
    pub fn state(&self) -> watch::Receiver<LeaseState> {
        self.state.clone()
    }

    /// Waits until all keys stand in the store. Returns the lease and the revision of the keys.
    ///
    /// Errors: [`RegistrationError::Lost`] if that will never be.
    pub async fn alive(&self) -> Result<(i64, i64), RegistrationError> {
        let mut state = self.state();
        loop {
            match &*state.borrow_and_update() {
                LeaseState::Alive { lease_id, revision } => return Ok((*lease_id, *revision)),
                LeaseState::Lost { reason } if reason.is_final() => {
                    let reason = reason.clone();
                    return Err(RegistrationError::Lost { reason });
                }
                LeaseState::Lost { .. } | LeaseState::Unknown { .. } => {}
            }
            state.changed().await.map_err(|_| RegistrationError::KeeperStopped)?;
        }
    }

    /// Keeps a further key under the same lease, or changes the value of one (the member's own key
    /// included). Returns the revision once it stands; if the lease is lost later, it is written
    /// again. While the store is down this waits; giving up waiting does not take the wish back.
    ///
    /// Errors: the key belongs to somebody else, bounds, or the lease is lost for good.
    pub async fn put_leased(
        &self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> Result<i64, RegistrationError> {
        let (reply, answer) = oneshot::channel();
        let (key, value) = (key.into(), value.into());
        let command = Command::Put { key: key.clone(), value, reply };
        match self.ask(command, answer, &key).await? {
            KeyOutcome::Written { revision } => Ok(revision),
            _ => Err(RegistrationError::Forgotten { key }),
        }
    }

    /// Removes a key that [`Registration::put_leased`] wrote. Returns once it is gone.
    pub async fn forget_leased(&self, key: impl Into<String>) -> Result<(), RegistrationError> {
        let (reply, answer) = oneshot::channel();
        let key = key.into();
        let command = Command::Forget { key: key.clone(), reply };
        self.ask(command, answer, &key).await.map(drop)
    }

    async fn ask(
        &self,
        command: Command,
        answer: oneshot::Receiver<Reply>,
        key: &str,
    ) -> Result<KeyOutcome, RegistrationError> {
        let stopped = |_| self.end_reason();
        self.commands.send(command).await.map_err(|_| self.end_reason())?;
        let key = key.to_owned();
        match answer.await.map_err(stopped)? {
            Reply::Outcome(KeyOutcome::Conflict) => Err(RegistrationError::Conflict { key }),
            Reply::Outcome(KeyOutcome::OutOfBounds) => Err(RegistrationError::OutOfBounds { key }),
            Reply::Outcome(KeyOutcome::Lost) => Err(self.end_reason()),
            Reply::Outcome(outcome) => Ok(outcome),
            Reply::TooManyPending => {
                Err(RegistrationError::TooManyPending { limit: MAX_PENDING_REQUESTS })
            }
        }
    }

    fn end_reason(&self) -> RegistrationError {
        match &*self.state.borrow() {
            LeaseState::Lost { reason } => RegistrationError::Lost { reason: reason.clone() },
            LeaseState::Alive { .. } | LeaseState::Unknown { .. } => {
                RegistrationError::KeeperStopped
            }
        }
    }

    /// Revokes the lease, so that all keys vanish at once, and ends the thread. Bounded in time; if
    /// the store cannot be reached the lease expires by itself.
    pub async fn revoke(mut self) {
        if self.commands.send(Command::Revoke).await.is_err() {
            return;
        }
        let mut state = self.state.clone();
        // The sender goes with the thread, so that this ends even if the thread is broken.
        while state.changed().await.is_ok() {}
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join());
            if !matches!(joined.await, Ok(Ok(()))) {
                tracing::error!("the lease thread panicked");
            }
        }
    }
}

fn run_thread(
    store: StoreConfig,
    keeper: LeaseKeeper,
    inbox: mpsc::Receiver<Command>,
    states: watch::Sender<LeaseState>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(async {
            match Store::connect(store).await {
                Ok(store) => {
                    let driver = Driver {
                        store,
                        keeper,
                        states,
                        calls: JoinSet::new(),
                        waiting: HashMap::new(),
                        last_request: 0,
                    };
                    driver.run(inbox).await;
                }
                Err(error) => tracing::error!(%error, "cannot keep a lease"),
            }
        }),
        Err(error) => tracing::error!(%error, "cannot start the lease runtime"),
    }
}

/// Carries events and actions between the machine, the store and the owner.
struct Driver {
    store: Store,
    keeper: LeaseKeeper,
    states: watch::Sender<LeaseState>,
    /// At most two are in flight (and a revocation), by the machine's invariant.
    calls: JoinSet<LeaseEvent>,
    waiting: HashMap<KeyRequestId, oneshot::Sender<Reply>>,
    last_request: u64,
}

impl Driver {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        self.feed(LeaseEvent::Tick);
        // After a final loss the thread stays to answer until the owner is gone, unless the owner
        // revoked and so wants it to end.
        let mut is_leaving = false;
        while !(is_leaving && self.keeper.has_ended() && self.calls.is_empty()) {
            let sleep = self
                .keeper
                .deadline()
                .map_or(MAX_SLEEP, |deadline| deadline.saturating_sub(boottime()).min(MAX_SLEEP));
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => {
                        is_leaving |= matches!(command, Command::Revoke);
                        self.on_command(command);
                    }
                    None => return,
                },
                Some(result) = self.calls.join_next() => match result {
                    Ok(event) => self.feed(event),
                    Err(error) => {
                        tracing::error!(%error, "a call to the store panicked");
                        return;
                    }
                },
                () = tokio::time::sleep(sleep) => self.feed(LeaseEvent::Tick),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Put { key, value, reply } => {
                if let Some(request) = self.admit(reply) {
                    self.feed(LeaseEvent::Put { request, key, value });
                }
            }
            Command::Forget { key, reply } => {
                if let Some(request) = self.admit(reply) {
                    self.feed(LeaseEvent::Forget { request, key });
                }
            }
            Command::Revoke => self.feed(LeaseEvent::Revoke),
        }
    }

    fn admit(&mut self, reply: oneshot::Sender<Reply>) -> Option<KeyRequestId> {
        if self.waiting.len() >= MAX_PENDING_REQUESTS {
            // The owner may have given up waiting; then nobody needs to hear.
            let _ = reply.send(Reply::TooManyPending);
            return None;
        }
        self.last_request += 1;
        let request = KeyRequestId(self.last_request);
        self.waiting.insert(request, reply);
        Some(request)
    }

    fn feed(&mut self, event: LeaseEvent) {
        for action in self.keeper.on(event, boottime()) {
            match action {
                LeaseAction::Publish(state) => self.publish(state),
                LeaseAction::Answer { request, outcome } => {
                    if let Some(reply) = self.waiting.remove(&request) {
                        // The owner may have given up waiting; then nobody needs to hear.
                        let _ = reply.send(Reply::Outcome(outcome));
                    }
                }
                call => {
                    let store = self.store.clone();
                    self.calls.spawn(async move { perform(&store, call).await });
                }
            }
        }
    }

    fn publish(&self, state: LeaseState) {
        let changed_kind =
            std::mem::discriminant(&*self.states.borrow()) != std::mem::discriminant(&state);
        match &state {
            LeaseState::Alive { lease_id, revision } if changed_kind => {
                tracing::info!(lease = %format_args!("{lease_id:x}"), revision, "lease is alive");
            }
            LeaseState::Unknown { age, .. } if changed_kind => {
                tracing::warn!(
                    age_seconds = age.as_secs_f64(),
                    "the store does not answer; the lease is unknown"
                );
            }
            LeaseState::Lost { reason } if reason.is_final() => {
                tracing::info!(%reason, "the registration is over");
            }
            LeaseState::Lost { reason } => tracing::warn!(%reason, "lease lost; registering anew"),
            LeaseState::Alive { .. } | LeaseState::Unknown { .. } => {}
        }
        self.states.send_replace(state);
    }
}

/// Time since boot, sleep included.
fn boottime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}
