//! What this router knows of encoders and decoder groups, and its connections to them.
//!
//! The machine [`tessera_cluster::View`] holds every opinion; this module feeds it (store, health, call
//! results), asks it, and keeps one channel per endpoint. While the store is away the last view stands.
//!
//! Modules: `follow` (the store's watch), `health` (streams and polls), `channels`, `place` (choosing).

mod channels;
mod follow;
mod health;
mod place;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tessera_cluster::request::Target;
use tessera_cluster::view::{Action, Event};
use tessera_cluster::{ClusterName, Verdict, View, ViewConfig};
use tessera_membership::Store;
use tessera_proto::decoder::v1::Fence;
use tessera_types::{InstanceId, ModelFingerprint};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

pub(crate) use health::reason_of;
pub(crate) use place::{EncoderChoice, GroupQuery, Identity, NoEncoder};

use crate::clock;
use crate::config::UpstreamConfig;
use crate::metrics::Metrics;
use channels::Channels;

/// The machine's timers have this resolution.
const TICK: Duration = Duration::from_millis(100);

/// The cluster as this router sees it. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Upstream {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: UpstreamConfig,
    cluster: ClusterName,
    model_name: String,
    /// Held for moments only, never across an await.
    state: Mutex<State>,
    channels: Channels,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Spreads requests over equal groups.
    turn: AtomicU64,
}

#[derive(Debug)]
struct State {
    view: View,
    /// Health tasks by endpoint; cancelling a token ends its task.
    health: HashMap<InstanceId, CancellationToken>,
    /// Pixels this router has sent and has no answer for: fresher than what encoders report.
    pixels_in_flight: HashMap<InstanceId, u64>,
    /// Language weights that are served; groups with others are not used.
    pinned: Option<ModelFingerprint>,
    /// Endpoints whose mismatch was logged.
    mismatched: HashSet<InstanceId>,
}

impl Upstream {
    /// Follows `store` until `stop`; tasks are tracked in `tasks`.
    pub(crate) fn start(
        config: UpstreamConfig,
        cluster: ClusterName,
        model_name: String,
        store: Store,
        metrics: Arc<Metrics>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let state = State {
            view: View::new(ViewConfig::default()),
            health: HashMap::new(),
            pixels_in_flight: HashMap::new(),
            pinned: None,
            mismatched: HashSet::new(),
        };
        let shared = Arc::new(Shared {
            channels: Channels::new(&config),
            config,
            cluster,
            model_name,
            state: Mutex::new(state),
            metrics,
            tasks: tasks.clone(),
            stop: stop.clone(),
            turn: AtomicU64::new(0),
        });
        let following = follow::follow(Arc::clone(&shared), store);
        tasks.spawn(stop.clone().run_until_cancelled_owned(following));
        let ticking = keep_time(Arc::clone(&shared));
        tasks.spawn(stop.run_until_cancelled_owned(ticking));
        Self { shared }
    }

    /// The channel to `host:port`.
    pub(crate) fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        self.shared.channels.get(address)
    }

    /// A call to an endpoint succeeded.
    pub(crate) fn call_ok(&self, instance: InstanceId) {
        self.shared.apply(Event::CallOk { instance });
    }

    /// A call to an endpoint failed in a way that speaks against it.
    pub(crate) fn call_failed(&self, instance: InstanceId) {
        self.shared.apply(Event::CallFailed { instance });
    }

    /// Names the epoch that a request is for.
    pub(crate) fn fence(&self, target: &Target) -> Fence {
        Fence {
            cluster: self.shared.cluster.to_string(),
            group: target.group.to_string(),
            epoch: target.epoch.0,
        }
    }

    /// Reads the view.
    pub(crate) fn with_view<T>(&self, read: impl FnOnce(&View, Duration) -> T) -> T {
        read(&self.shared.state().view, clock::now())
    }

    fn next_turn(&self) -> u64 {
        self.shared.turn.fetch_add(1, Ordering::Relaxed)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two calls of the machine, so a panic elsewhere leaves
        // nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds the machine and does what it says.
    fn apply(self: &Arc<Self>, event: Event) {
        let mut state = self.state();
        let actions = state.view.on(event, clock::now());
        for action in actions {
            self.perform(action, &mut state);
        }
    }

    fn perform(self: &Arc<Self>, action: Action, state: &mut State) {
        match action {
            Action::OpenHealth { instance, address, kind } => {
                let stop = self.stop.child_token();
                if let Some(older) = state.health.insert(instance, stop.clone()) {
                    older.cancel();
                }
                let health = health::observe(Arc::clone(self), instance, address, kind);
                self.tasks.spawn(stop.run_until_cancelled_owned(health));
            }
            Action::Drop { instance } => {
                if let Some(health) = state.health.remove(&instance) {
                    health.cancel();
                }
                state.pixels_in_flight.remove(&instance);
                state.mismatched.remove(&instance);
                self.channels.retain(|address| state.is_known(address));
            }
            Action::MassDelete { vanished, known } => {
                tracing::error!(
                    vanished,
                    known,
                    "so many endpoints vanished that the store is doubted"
                );
            }
        }
    }

    fn count_usable(&self) {
        let state = self.state();
        let now = clock::now();
        let usable = |verdict: Verdict| verdict <= Verdict::Suspect;
        let groups = state.view.groups(now).filter(|group| usable(group.verdict)).count();
        let encoders = state.view.encoders(now).filter(|e| usable(e.verdict)).count();
        self.metrics.groups_usable.set(groups as i64);
        self.metrics.encoders_usable.set(encoders as i64);
    }
}

impl State {
    fn is_known(&self, address: &str) -> bool {
        let now = clock::now();
        self.view.groups(now).any(|group| group.record.address == address)
            || self.view.encoders(now).any(|encoder| encoder.member.address == address)
    }
}

/// Gives the machine its ticks.
async fn keep_time(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        shared.apply(Event::Tick);
        shared.count_usable();
    }
}
