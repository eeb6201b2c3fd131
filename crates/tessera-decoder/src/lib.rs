//! One process of a decoder group: it joins epochs with the other processes of its group, and either leads
//! (serves attempts, sends plans) or follows (computes what the plan stream says).
//!
//! Invariants
//! - Weights are loaded once and survive every epoch.
//! - Every stream is fenced by cluster, group and epoch; the comparison is `tessera_cluster`'s.
//! - An epoch ends flag first, then communicator; what was in flight is discarded, running attempts end
//!   with a typed retryable error.
//! - Embeddings are pulled into room that the engine reserved, and used whole or not at all.
//!
//! Modules: [`config`], [`error`], [`metrics`]; [`service`] (gRPC `Decoder`), [`generate`] (one attempt),
//! [`fetch`] (embeddings from encoders), `plans` (gRPC `Group`), `server`; `lifecycle` (formation, epochs,
//! drain), `shard` (weights), `loading` (their progress), `kv_memory` and
//! `gpus` (room for KV), `worker` (the ranks), `leading`, `following` and `fragments` (plan streams), `communicators`, `canary`, `probe`, `mailbox`, `slot_lock`, `clock`.

mod canary;
mod clock;
mod communicators;
pub mod config;
pub mod error;
pub mod fetch;
mod following;
mod fragments;
pub mod generate;
mod gpus;
mod kv_memory;
mod leading;
mod lifecycle;
mod loading;
mod mailbox;
pub mod metrics;
mod plans;
mod probe;
mod server;
pub mod service;
mod shard;
mod slot_lock;
mod worker;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tessera_cluster::{ClusterName, Fence, GroupName, Keys, Record};
use tessera_engine::error::chain;
use tessera_engine::{Engine, Follower, GroupExecutor};
use tessera_membership::{Membership, Store, StoreConfig};
use tessera_proto::decoder::v1 as pb;
use tessera_telemetry::{AdminServer, ReadyState, Registry};
use tessera_types::Epoch;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::DecoderConfig;
pub use error::DecoderError;
pub use loading::LoadObserver;

use crate::fetch::EncoderPool;
use crate::generate::Attempts;
use crate::lifecycle::{Lifecycle, Parts};
use crate::mailbox::{Letter, Mailbox};
use crate::metrics::DecoderMetrics;
use crate::plans::{CurrentLink, GroupService};
use crate::service::{DecoderService, Standing};
use crate::shard::Shard;
use crate::slot_lock::SlotLock;
use crate::worker::{RunningEngine, Worker};

/// Longest wait for streams and the engine when the process ends.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Exit code of a process whose ranks hang: its threads cannot be joined any more.
const EXIT_HUNG: i32 = 70;

/// Runs one process of a decoder group until `shutdown` completes and the drain that it asks for is done:
/// loads this process's share of the weights, registers, and joins epoch after epoch.
///
/// # Errors
/// Bad settings, a broken checkpoint, an address in use, or being fenced. If ranks hang after an abort the
/// process exits instead, since nothing can be joined or dropped any more (CLUSTER §2).
pub async fn run(
    config: DecoderConfig,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), DecoderError> {
    run_observed(config, loading::logged(), shutdown).await
}

/// The same; the progress of loading goes to `observe` instead of the log.
///
/// # Errors
/// As for [`run`].
pub async fn run_observed(
    config: DecoderConfig,
    observe: LoadObserver,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), DecoderError> {
    config.validate()?;
    let cluster = ClusterName::new(&config.cluster.name)?;
    let group = GroupName::new(&config.group)?;
    let registry = Registry::new();
    let metrics = DecoderMetrics::register(&registry)?;
    let listen_error = |source| DecoderError::Listen { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(listen_error)?;
    let bound = listener.local_addr().map_err(listen_error)?;
    let address = config.advertise.clone().unwrap_or_else(|| bound.to_string());
    let listen_ip = communicators::listen_ip(&config, &address).await?;
    let fence = Fence { cluster: cluster.clone(), group: group.clone(), epoch: Epoch(0) };
    let standing = Standing { fence, state: pb::GroupState::Forming, takes_attempts: false };
    let (standing, standing_seen) = watch::channel(standing);
    let (reason, reason_seen) = watch::channel("loading the model".to_owned());
    let stop = CancellationToken::new();
    let readiness = readiness(standing_seen.clone(), reason_seen);
    let admin = AdminServer::bind(&config.admin, registry, Arc::new(readiness)).await?;
    let admin = tokio::spawn(admin.serve(stop.clone().cancelled_owned()));

    tokio::pin!(shutdown);
    let prepared = tokio::select! {
        prepared = prepare(&config, observe) => prepared,
        () = &mut shutdown => return Ok(()),
    };
    let (lock, shard) = prepared?;
    let me = lifecycle::member_info(
        &config,
        address,
        group.clone(),
        lock.as_ref().map(|lock| lock.host().to_owned()),
        &shard,
    );
    let mailbox = Arc::new(Mailbox::default());
    let move_rest = CancellationToken::new();
    let (worker, attempts, engine) = start_worker(&config, shard, &mailbox, &metrics, &move_rest)?;
    let num_attempts = attempts.as_ref().map(|a| Arc::clone(&a.num_open)).unwrap_or_default();
    let tasks = TaskTracker::new();
    let current = CurrentLink::default();
    let service = DecoderService::new(me.instance, standing_seen.clone(), attempts, tasks.clone());
    let plans = GroupService {
        current: current.clone(),
        mailbox: Arc::clone(&mailbox),
        tasks: tasks.clone(),
    };
    let serving =
        server::serve(listener, service, plans, standing_seen, stop.clone().cancelled_owned());
    let mut server = tokio::spawn(serving);

    let keys = Keys::new(cluster.clone());
    let store_config = StoreConfig::new(config.cluster.endpoints.clone());
    let membership = |error| DecoderError::Membership(error);
    let store =
        Store::connect(store_config.clone()).await.map_err(|error| membership(error.into()))?;
    let ttl = Duration::from_secs(config.lease_ttl_seconds.into());
    let registration =
        Membership::register(store_config, keys.member(me.instance), me.to_bytes(), ttl)
            .map_err(|error| membership(error.into()))?;
    tracing::info!(instance = %me.instance, address = me.address, slot = config.slot, "registering");
    let lifecycle = Lifecycle::new(Parts {
        config,
        me,
        keys,
        cluster,
        group,
        listen_ip,
        worker: worker.clone(),
        store,
        registration,
        mailbox,
        current,
        standing,
        reason,
        metrics,
        tasks: tasks.clone(),
        move_rest,
        num_attempts,
    })?;
    let result = tokio::select! {
        result = lifecycle.run(shutdown) => result,
        served = &mut server => Err(match served {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => DecoderError::Panicked,
        }),
    };
    if let Err(DecoderError::Hung { reason }) = &result {
        tracing::error!(reason, "ranks hang, ending the process");
        std::process::exit(EXIT_HUNG);
    }
    stop.cancel();
    tasks.close();
    let streams = async {
        tasks.wait().await;
        if !server.is_finished() {
            let _ = server.await;
        }
        let _ = admin.await;
    };
    if tokio::time::timeout(STOP_TIMEOUT, streams).await.is_err() {
        tracing::debug!("streams did not end in time");
    }
    stop_worker(worker, engine).await;
    drop(lock);
    result
}

/// The slot's lock first: two processes of one slot must not hold its weights at the same time.
async fn prepare(
    config: &DecoderConfig,
    observe: LoadObserver,
) -> Result<(Option<SlotLock>, Shard), DecoderError> {
    let lock = SlotLock::take(config).await.map_err(DecoderError::SlotLock)?;
    let config = config.clone();
    let loaded = tokio::task::spawn_blocking(move || shard::load(&config, observe)).await;
    Ok((lock, loaded.map_err(|_| DecoderError::Panicked)??))
}

/// Ready means that this member's epoch serves; a follower's readiness is its group's.
fn readiness(
    standing: watch::Receiver<Standing>,
    reason: watch::Receiver<String>,
) -> impl Fn() -> ReadyState + Send + Sync + 'static {
    move || match standing.borrow().state {
        pb::GroupState::Serving => ReadyState::Ready,
        pb::GroupState::Draining => ReadyState::NotReady { reason: "draining".into() },
        _ => ReadyState::NotReady { reason: reason.borrow().clone() },
    }
}

type Started = (Worker, Option<Arc<Attempts>>, Option<RunningEngine>);

/// Slot 0 runs the engine, the others ranks that follow.
fn start_worker(
    config: &DecoderConfig,
    shard: Shard,
    mailbox: &Arc<Mailbox>,
    metrics: &DecoderMetrics,
    move_rest: &CancellationToken,
) -> Result<Started, DecoderError> {
    let leave_timeout = Duration::from_millis(config.leave_timeout_ms.into());
    if config.slot != 0 {
        let ranks = Arc::new(Mutex::new(Follower::new(shard.ranks, leave_timeout)));
        return Ok((Worker::Follower { ranks }, None, None));
    }
    let hidden_size = shard.engine.hidden_size;
    let executor = Box::new(GroupExecutor::new(shard.ranks, leave_timeout));
    let letters = Arc::clone(mailbox);
    let observer = Box::new(move |end| letters.post(Letter::EngineEnded(end)));
    let (engine, thread) = Engine::spawn(shard.engine, executor, observer)
        .map_err(|error| DecoderError::Engine(error.into()))?;
    let attempts = Attempts {
        engine: engine.clone(),
        encoders: EncoderPool::default(),
        metrics: metrics.clone(),
        block_keys: shard.block_keys,
        hidden_size,
        numerics_id: shard.identity.language_numerics.to_string(),
        fetch_timeout: Duration::from_millis(config.fetch_timeout_ms.into()),
        max_fetches: config.max_fetches,
        move_rest: move_rest.clone(),
        num_open: Arc::default(),
    };
    let running = RunningEngine::new(engine.clone(), thread);
    let worker = Worker::Leader { engine, progress: shard.progress };
    Ok((worker, Some(Arc::new(attempts)), Some(running)))
}

async fn stop_worker(worker: Worker, engine: Option<RunningEngine>) {
    let stop = move || {
        let joined = engine.is_none_or(RunningEngine::stop);
        // A follower's ranks end with their last holder, which this is.
        if let Worker::Follower { ranks } = &worker
            && let Err(error) = following::lock(ranks).end_epoch("the process ends")
        {
            tracing::error!(error = %chain(&error), "ranks hang, ending the process");
            std::process::exit(EXIT_HUNG);
        }
        joined
    };
    match tokio::task::spawn_blocking(stop).await {
        Ok(true) => {}
        Ok(false) | Err(_) => tracing::error!("the engine's thread panicked"),
    }
}
