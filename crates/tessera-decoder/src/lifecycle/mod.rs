//! The life of this process in its group: the one task that drives formation, epochs and drain.
//!
//! All decisions are machines' (`tessera-cluster`). This task carries store changes, results of calls and
//! letters from streams to them, and does what they say. It never waits for anything but its own inputs:
//! whatever takes time runs as a call beside it.

mod drain;
mod epoch;
mod store;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tessera_cluster::formation::{Action, Event, State};
use tessera_cluster::{
    ClusterName, DecoderMember, Drain, EndReason, EpochSpec, Fence, Formation, GroupName, Keys,
    MemberInfo, MemberRole, Record,
};
use tessera_engine::error::chain;
use tessera_membership::{LeaseState, Op, PrefixWatch, Registration, Store};
use tessera_proto::decoder::v1 as pb;
use tessera_types::{Epoch, InstanceId, TokenId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock;
use crate::config::DecoderConfig;
use crate::error::DecoderError;
use crate::mailbox::{Letter, Mailbox};
use crate::metrics::DecoderMetrics;
use crate::plans::CurrentLink;
use crate::probe::probe;
use crate::service::Standing;
use crate::worker::Worker;
use epoch::Run;
use store::{events_of, transact};

/// The loop looks around at least this often: at the load, the drain, the idle canary.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Longest wait for the last writes to the store.
const LAST_WRITES_TIMEOUT: Duration = Duration::from_secs(1);

/// What a call gave.
enum Done {
    Nothing,
    Formation(Event),
    Joined { spec: EpochSpec, result: Result<(), String> },
    RanksLeft { epoch: Epoch, result: Result<(), String> },
    FirstCanary { epoch: Epoch, result: Result<Vec<TokenId>, String> },
    IdleCanary { epoch: Epoch, result: Result<Vec<TokenId>, String> },
    Drain(tessera_cluster::drain::Event),
}

/// What the lifecycle is made from.
pub(crate) struct Parts {
    pub config: DecoderConfig,
    pub me: MemberInfo,
    pub keys: Keys,
    pub cluster: ClusterName,
    pub group: GroupName,
    pub listen_ip: IpAddr,
    pub worker: Worker,
    pub store: Store,
    pub registration: Registration,
    pub mailbox: Arc<Mailbox>,
    pub current: CurrentLink,
    pub standing: watch::Sender<Standing>,
    /// Why the group does not serve, for the readiness probe.
    pub reason: watch::Sender<String>,
    pub metrics: DecoderMetrics,
    pub tasks: TaskTracker,
    /// Cancelled when what still runs must go on elsewhere.
    pub move_rest: CancellationToken,
    /// Attempts that are not over.
    pub num_attempts: Arc<AtomicUsize>,
}

/// The task's state.
pub(crate) struct Lifecycle {
    config: DecoderConfig,
    me: MemberInfo,
    keys: Keys,
    cluster: ClusterName,
    group: GroupName,
    canary_key: String,
    listen_ip: IpAddr,
    worker: Worker,
    store: Store,
    registration: Arc<Registration>,
    mailbox: Arc<Mailbox>,
    current: CurrentLink,
    standing: watch::Sender<Standing>,
    reason: watch::Sender<String>,
    metrics: DecoderMetrics,
    tasks: TaskTracker,
    move_rest: CancellationToken,
    num_attempts: Arc<AtomicUsize>,
    formation: Formation,
    drain: Drain,
    run: Option<Run>,
    /// Events that the machine has not seen yet.
    events: VecDeque<Event>,
    calls: JoinSet<Done>,
    /// Writes that are still wanted when the process ends.
    last_writes: JoinSet<()>,
    draining: bool,
    shutting_down: bool,
    leave_by: Option<Duration>,
    next_canary_at: Duration,
    canary_runs: bool,
    outcome: Option<Result<(), DecoderError>>,
}

impl Lifecycle {
    /// # Errors
    /// Settings or a member record that the machines refuse.
    pub fn new(parts: Parts) -> Result<Self, DecoderError> {
        let Parts { config, me, keys, cluster, group, listen_ip, worker, store, .. } = parts;
        let formation = Formation::new(config.formation(), keys.clone(), me.clone())?;
        let model = me.model.clone().unwrap_or_else(|| unreachable!("the machine took it"));
        Ok(Self {
            canary_key: keys.canary(model.language_fingerprint, model.language_numerics),
            drain: Drain::new(config.drain(), true),
            config,
            me,
            keys,
            cluster,
            group,
            listen_ip,
            worker,
            store,
            registration: Arc::new(parts.registration),
            mailbox: parts.mailbox,
            current: parts.current,
            standing: parts.standing,
            reason: parts.reason,
            metrics: parts.metrics,
            tasks: parts.tasks,
            move_rest: parts.move_rest,
            num_attempts: parts.num_attempts,
            formation,
            run: None,
            events: VecDeque::new(),
            calls: JoinSet::new(),
            last_writes: JoinSet::new(),
            draining: false,
            shutting_down: false,
            leave_by: None,
            next_canary_at: Duration::ZERO,
            canary_runs: false,
            outcome: None,
        })
    }

    /// Runs until the process may end: after `shutdown` and the drain it asks for, or at once when the
    /// process is of no use any more.
    ///
    /// # Errors
    /// The process was fenced, or its ranks hang.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), DecoderError> {
        let mut watch = self.store.watch_prefix(self.keys.prefix());
        let mut lease = self.registration.state();
        let mailbox = Arc::clone(&self.mailbox);
        tokio::pin!(shutdown);
        let result = loop {
            self.settle();
            if let Some(outcome) = self.outcome.take() {
                break outcome;
            }
            let wake = self.next_wake();
            tokio::select! {
                event = next_of(&mut watch) => {
                    self.events.extend(events_of(&self.keys, &self.group, event));
                }
                Some(done) = self.calls.join_next() => self.on_done(done),
                letters = mailbox.take() => letters.into_iter().for_each(|l| self.on_letter(l)),
                () = tokio::time::sleep_until(wake) => self.look_around(),
                Ok(()) = lease.changed() => self.on_lease(&lease.borrow_and_update().clone()),
                () = &mut shutdown, if !self.shutting_down => self.begin_shutdown(),
            }
        };
        self.finish().await;
        result
    }

    fn next_wake(&self) -> tokio::time::Instant {
        let look = clock::now() + LOOK_INTERVAL;
        let deadlines = [self.formation.deadline(), self.drain.deadline(), Some(look)];
        clock::instant_of(deadlines.into_iter().flatten().min().unwrap_or(look))
    }

    /// Feeds the formation machine until it has nothing more to say, and publishes where it stands.
    fn settle(&mut self) {
        while let Some(event) = self.events.pop_front() {
            for action in self.formation.on(event, clock::now()) {
                self.perform(action);
            }
            self.retire_when_free();
            self.look_after_drain();
        }
        self.publish();
    }

    fn look_around(&mut self) {
        self.events.push_back(Event::Tick);
        self.look_after_drain();
        self.feed_drain(tessera_cluster::drain::Event::Tick);
        self.run_idle_canary();
        if let Worker::Leader { engine, .. } = &self.worker {
            self.metrics.observe(&engine.load());
        }
    }

    fn perform(&mut self, action: Action) {
        let store = self.store.clone();
        match action {
            Action::Propose { record, compares } => {
                let epoch = record.counter;
                tracing::info!(epoch = epoch.0, accuses = record.excluded.len(), "proposing");
                let op = Op::put(self.keys.epoch(&self.group), record.to_bytes());
                self.calls.spawn(async move {
                    let outcome = transact(&store, compares, op).await;
                    Done::Formation(Event::Proposed { epoch, outcome })
                });
            }
            Action::Activate { record, compares } => {
                let epoch = record.epoch;
                let op = Op::put(self.keys.active(&self.group), record.to_bytes());
                self.calls.spawn(async move {
                    let outcome = transact(&store, compares, op).await;
                    Done::Formation(Event::Activated { epoch, outcome })
                });
            }
            Action::PublishLastEpoch { epoch } => {
                if let MemberRole::Decoder(place) = &mut self.me.role {
                    place.last_epoch = epoch;
                }
                self.put_leased(self.keys.member(self.me.instance), self.me.to_bytes());
            }
            Action::PutId { record } => {
                self.put_leased(self.keys.id(&self.group, record.epoch), record.to_bytes());
            }
            Action::PutReady { record } => {
                let key = self.keys.ready(&self.group, record.epoch, record.instance);
                self.put_leased(key, record.to_bytes());
            }
            Action::Forget { keys } => keys.into_iter().for_each(|key| self.forget_leased(key)),
            Action::MakeId { epoch } => self.make_id(epoch),
            Action::InitCommunicator { spec, id, deadline } => {
                self.init_communicator(*spec, id, deadline);
            }
            Action::RunCanary { epoch } => self.want_canary(epoch),
            Action::Serve { epoch } => {
                tracing::info!(epoch = epoch.0, slot = self.config.slot, "epoch serves");
                self.next_canary_at = clock::now();
            }
            Action::Leave { epoch, reason } => self.leave(epoch, &reason),
            Action::Probe { instance, address } => {
                let request = pb::HealthRequest {
                    cluster: self.cluster.to_string(),
                    group: self.group.to_string(),
                };
                self.calls.spawn(async move {
                    let reachable = probe(instance, &address, request).await;
                    Done::Formation(Event::ProbeResult { instance, reachable })
                });
            }
        }
    }

    fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Nothing) => {}
            Ok(Done::Formation(event)) => self.events.push_back(event),
            Ok(Done::Joined { spec, result }) => self.on_joined(spec, result),
            Ok(Done::RanksLeft { epoch, result }) => {
                self.on_ranks_left(epoch, "the epoch ended", result);
            }
            Ok(Done::FirstCanary { epoch, result }) => self.on_first_canary(epoch, result),
            Ok(Done::IdleCanary { epoch, result }) => self.on_idle_canary(epoch, result),
            Ok(Done::Drain(event)) => self.feed_drain(event),
            Err(error) => {
                tracing::error!(%error, "a call of the lifecycle panicked");
                self.outcome = Some(Err(DecoderError::Panicked));
            }
        }
    }

    fn on_letter(&mut self, letter: Letter) {
        match letter {
            Letter::AllConnected { epoch } => self.on_all_connected(epoch),
            Letter::Ended(end) => self.events.push_back(Event::Ended(end)),
            Letter::EngineEnded(end) => {
                let left = end.left.map_err(|error| chain(&error));
                self.on_ranks_left(end.epoch, &end.reason, left);
            }
            Letter::DrainAsked => self.begin_drain(),
        }
    }

    fn on_lease(&mut self, state: &LeaseState) {
        match state {
            LeaseState::Lost { reason } if reason.is_final() => {
                let reason = reason.to_string();
                self.outcome = Some(Err(DecoderError::Fenced { reason }));
            }
            LeaseState::Lost { reason } => tracing::warn!(%reason, "lease lost, registering anew"),
            LeaseState::Alive { .. } | LeaseState::Unknown { .. } => {}
        }
    }

    fn on_first_canary(&mut self, epoch: Epoch, result: Result<Vec<TokenId>, String>) {
        match result {
            Ok(token_ids) => {
                if let Some(run) = self.run.as_mut().filter(|run| run.is_in(epoch)) {
                    run.canary = Some(token_ids);
                }
                self.events.push_back(Event::CanaryPassed { epoch });
            }
            Err(detail) => self.events.push_back(Event::CanaryFailed { epoch, detail }),
        }
    }

    /// An idle leader proves from time to time that all ranks still work.
    fn run_idle_canary(&mut self) {
        let (Worker::Leader { engine, .. }, State::Serving(epoch)) =
            (&self.worker, self.formation.state())
        else {
            return;
        };
        let load = engine.load();
        let is_idle = load.scheduler.running + load.scheduler.waiting == 0;
        if !is_idle || self.canary_runs || clock::now() < self.next_canary_at {
            return;
        }
        self.canary_runs = true;
        let engine = engine.clone();
        self.calls.spawn(async move {
            Done::IdleCanary { epoch, result: crate::canary::run(&engine).await }
        });
    }

    fn on_idle_canary(&mut self, epoch: Epoch, result: Result<Vec<TokenId>, String>) {
        self.canary_runs = false;
        let interval = Duration::from_millis(self.config.canary_interval_ms.into());
        self.next_canary_at = clock::now() + interval;
        let Some(run) = self.run.as_ref().filter(|run| run.is_in(epoch)) else { return };
        // A canary that was lost or refused says nothing: the epoch's own watch judges progress.
        if let (Ok(token_ids), Some(expected), Some(link)) = (result, &run.canary, &run.link)
            && token_ids != *expected
        {
            let detail = format!("it gave tokens {token_ids:?} instead of {expected:?}");
            link.end(EndReason::CanaryFailed { detail });
        }
    }

    fn put_leased(&mut self, key: String, value: Vec<u8>) {
        let registration = Arc::clone(&self.registration);
        self.calls.spawn(async move {
            if let Err(error) = registration.put_leased(key.clone(), value).await {
                tracing::warn!(key, error = %chain(&error), "a key was not written");
            }
            Done::Nothing
        });
    }

    fn forget_leased(&mut self, key: String) {
        let registration = Arc::clone(&self.registration);
        self.calls.spawn(async move {
            // It goes with the lease at the latest.
            if let Err(error) = registration.forget_leased(key.clone()).await {
                tracing::debug!(key, error = %chain(&error), "a key was not deleted");
            }
            Done::Nothing
        });
    }

    fn publish(&mut self) {
        let (epoch, state) = match self.formation.state() {
            State::Serving(epoch) if self.draining => (epoch, pb::GroupState::Draining),
            State::Serving(epoch) => (epoch, pb::GroupState::Serving),
            State::Forming(epoch) => (epoch, pb::GroupState::Forming),
            State::Outside | State::Leaving(_) => (Epoch(0), pb::GroupState::Forming),
            State::Retired => (Epoch(0), pb::GroupState::Left),
        };
        let takes_attempts = self.leads() && state == pb::GroupState::Serving;
        let standing = Standing { fence: self.fence(epoch), state, takes_attempts };
        self.metrics.epoch.set(i64::try_from(epoch.0).unwrap_or(i64::MAX));
        self.standing.send_if_modified(|current| {
            let changed = *current != standing;
            *current = standing;
            changed
        });
        let reason = match self.formation.obstacle() {
            Some(obstacle) => format!("{:?}: {obstacle:?}", self.formation.state()),
            None => format!("{:?}", self.formation.state()),
        };
        self.reason.send_if_modified(|current| {
            let changed = *current != reason;
            if changed {
                tracing::debug!(reason, "standing");
                *current = reason;
            }
            changed
        });
    }

    fn fence(&self, epoch: Epoch) -> Fence {
        Fence { cluster: self.cluster.clone(), group: self.group.clone(), epoch }
    }

    fn leads(&self) -> bool {
        matches!(self.worker, Worker::Leader { .. })
    }

    /// Leaves nothing behind in the store.
    async fn finish(mut self) {
        self.current.set(None);
        self.calls.shutdown().await;
        let last_writes = async { while self.last_writes.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_WRITES_TIMEOUT, last_writes).await;
        // All other holders were calls, which are shut down.
        if let Some(registration) = Arc::into_inner(self.registration) {
            registration.revoke().await;
        }
    }
}

/// A watch ends only with its runtime, where nothing follows.
async fn next_of(watch: &mut PrefixWatch) -> tessera_membership::WatchEvent {
    match watch.next().await {
        Some(event) => event,
        None => std::future::pending().await,
    }
}

/// This process as the store knows it.
pub(crate) fn member_info(
    config: &DecoderConfig,
    address: String,
    group: GroupName,
    slot_lock_host: Option<String>,
    shard: &crate::shard::Shard,
) -> MemberInfo {
    MemberInfo {
        instance: InstanceId::random(),
        address,
        build: env!("CARGO_PKG_VERSION").into(),
        model: Some(shard.identity.clone()),
        role: MemberRole::Decoder(DecoderMember {
            group,
            slot: config.slot,
            num_slots: config.num_slots(),
            first_rank: tessera_types::Rank(config.first_rank()),
            num_ranks: config.ranks_per_process,
            world_size: config.tp,
            device: config.device.clone(),
            slot_lock_host,
            last_epoch: Epoch(0),
            capacity: shard.capacity,
        }),
    }
}
