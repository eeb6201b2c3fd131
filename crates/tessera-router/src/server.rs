//! Starts the router, keeps its servers running, and stops them in order.

use std::error::Error;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use tessera_cluster::ClusterName;
use tessera_membership::{MembershipUrl, Store, StoreConfig};
use tessera_proto::inference::v1::inference_server::InferenceServer;
use tessera_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES};
use tessera_telemetry::{AdminServer, ReadyState, Registry};
use tokio::net::TcpListener;
use tokio::task::JoinError;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::config::RouterConfig;
use crate::error::RouterError;
use crate::grpc::InferenceService;
use crate::http;
use crate::listen::{BoundedListener, BoundedStream};
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::service::{Lifecycle, Service};
use crate::upstream::Upstream;

/// How often readiness is published and gauges are refreshed.
const REFRESH: Duration = Duration::from_millis(100);
/// Longest wait for everything to end once it was told to.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// Names of the public services.
const INFERENCE: &str = "tessera.inference.v1.Inference";
const HEALTH: &str = "grpc.health.v1.Health";

/// Bound sockets of one router.
#[derive(Debug)]
pub struct Listeners {
    pub http: TcpListener,
    pub grpc: TcpListener,
    pub admin: TcpListener,
}

impl Listeners {
    /// Takes the addresses of `config`.
    ///
    /// # Errors
    /// Names the face whose address cannot be had.
    pub async fn bind(config: &RouterConfig) -> Result<Self, RouterError> {
        Ok(Self {
            http: bind("http", config.http.listen).await?,
            grpc: bind("grpc", config.grpc.listen).await?,
            admin: bind("admin", config.admin.listen).await?,
        })
    }
}

async fn bind(face: &'static str, address: SocketAddr) -> Result<TcpListener, RouterError> {
    let listen = |source| RouterError::Listen { face, address, source };
    TcpListener::bind(address).await.map_err(listen)
}

/// A router, made but not serving yet.
#[derive(Debug)]
pub struct Router {
    service: Service,
    registry: Registry,
    listeners: Listeners,
    tasks: Tasks,
}

/// What runs, and how it is told to end.
#[derive(Debug, Clone)]
struct Tasks {
    /// Connections and requests.
    foreground: TaskTracker,
    /// Followers of the cluster, the admin server.
    background: TaskTracker,
    /// No new connections; those that are open finish their reply.
    drain: CancellationToken,
    /// Requests that are still running fail.
    abort: CancellationToken,
    /// The background ends.
    stop: CancellationToken,
}

/// Runs a router until `shutdown` completes and running requests have ended or the drain time is over.
///
/// # Errors
/// Start-up: settings, model files, addresses. Later: a server that fails.
pub async fn run(
    config: RouterConfig,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RouterError> {
    config.validate()?;
    let listeners = Listeners::bind(&config).await?;
    Router::new(config, listeners).await?.serve(shutdown).await
}

impl Router {
    /// Loads the model's files and begins to follow the cluster. The store need not answer yet.
    ///
    /// # Errors
    /// Settings or model files at fault, by name.
    pub async fn new(config: RouterConfig, listeners: Listeners) -> Result<Self, RouterError> {
        config.validate()?;
        let cluster = ClusterName::new(config.cluster.clone())
            .map_err(|error| RouterError::Config { field: "cluster", detail: error.to_string() })?;
        let store = connect(&config.membership).await?;
        let model = load_model(&config).await?;
        let registry = Registry::new();
        let metrics = Arc::new(Metrics::register(&registry)?);
        let tasks = Tasks {
            foreground: TaskTracker::new(),
            background: TaskTracker::new(),
            drain: CancellationToken::new(),
            abort: CancellationToken::new(),
            stop: CancellationToken::new(),
        };
        let upstream = Upstream::start(
            config.upstream.clone(),
            cluster,
            config.model_name.clone(),
            store,
            Arc::clone(&metrics),
            tasks.background.clone(),
            tasks.stop.clone(),
        );
        let service = Service::new(
            config,
            model,
            upstream,
            metrics,
            tasks.foreground.clone(),
            Lifecycle { drain: tasks.drain.clone(), abort: tasks.abort.clone() },
        );
        Ok(Self { service, registry, listeners, tasks })
    }

    /// Serves until `shutdown` completes, then drains.
    ///
    /// # Errors
    /// A server that fails.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), RouterError> {
        let Self { service, registry, listeners, tasks } = self;
        let config = service.config().clone();
        let admin = AdminServer::from_listener(
            listeners.admin,
            registry,
            Arc::new(readiness(service.clone())),
        )?;
        log_addresses(&listeners.http, &listeners.grpc, &admin);

        let http = BoundedListener::new(listeners.http, config.http.max_connections);
        let header_timeout = Duration::from_millis(config.http.header_timeout_ms);
        let (app, drain) = (http::app(service.clone()), tasks.drain.clone());
        let http = http::serve(http, app, header_timeout, drain, tasks.foreground.clone());
        tasks.foreground.spawn(http);

        let grpc = BoundedListener::new(listeners.grpc, config.grpc.max_connections);
        let mut grpc =
            tasks.foreground.spawn(serve_grpc(service.clone(), grpc, tasks.clone()).await?);
        let mut admin = tasks.background.spawn(admin.serve(tasks.stop.clone().cancelled_owned()));

        let ended = tokio::select! {
            () = shutdown => Ok(()),
            ended = &mut grpc => ended_early("gRPC", ended.map(|r| r.map_err(RouterError::Grpc))),
            ended = &mut admin => ended_early("admin", ended.map(|r| r.map_err(RouterError::from))),
        };
        tasks.end(Duration::from_millis(config.limits.drain_ms)).await;
        ended
    }
}

impl Tasks {
    /// Lets running requests end within `grace`, then ends everything.
    async fn end(self, grace: Duration) {
        tracing::info!(tasks = self.foreground.len(), "router drains");
        self.drain.cancel();
        self.foreground.close();
        self.background.close();
        if tokio::time::timeout(grace, self.foreground.wait()).await.is_err() {
            tracing::warn!("running requests did not end in time and fail");
        }
        self.abort.cancel();
        self.stop.cancel();
        let all = async {
            self.foreground.wait().await;
            self.background.wait().await;
        };
        if tokio::time::timeout(LAST_WAIT, all).await.is_err() {
            tracing::warn!("some connections did not close in time");
        }
        tracing::info!("router stopped");
    }
}

/// The gRPC server with health and reflection, as a future that serves until the drain.
async fn serve_grpc(
    service: Service,
    listener: BoundedListener,
    tasks: Tasks,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + Send, RouterError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The descriptors hold the internal services too; they are not served here.
            .with_service_name(INFERENCE)
            .with_service_name(HEALTH)
    };
    let reflection_v1 = reflection().build_v1().map_err(RouterError::Reflection)?;
    let reflection_v1alpha = reflection().build_v1alpha().map_err(RouterError::Reflection)?;
    let (reporter, health) = tonic_health::server::health_reporter();
    // Known from the first call on, and true once `publish` has looked.
    for name in ["", INFERENCE] {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
    let publishing = publish(service.clone(), reporter);
    tasks.background.spawn(tasks.stop.clone().run_until_cancelled_owned(publishing));
    let config = &service.config().grpc;
    let keepalive = Duration::from_millis(config.keepalive_ms);
    let mut builder = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(keepalive))
        .http2_keepalive_timeout(Some(keepalive))
        .max_concurrent_streams(config.max_streams_per_connection);
    let inference = InferenceServer::new(InferenceService::new(service))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let router = builder
        .add_service(inference)
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    Ok(router.serve_with_incoming_shutdown(accepted(listener), tasks.drain.cancelled_owned()))
}

/// Connections as they come; never ends.
fn accepted(listener: BoundedListener) -> impl Stream<Item = io::Result<BoundedStream>> + Send {
    stream::unfold(listener, |listener| async move {
        let stream = listener.accept().await;
        Some((Ok(stream), listener))
    })
}

/// Keeps `grpc.health.v1` and the gauges true.
async fn publish(service: Service, health: HealthReporter) {
    let mut ticks = tokio::time::interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut published = None;
    loop {
        ticks.tick().await;
        service.refresh_gauges();
        let status = match service.check_ready().is_ok() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        if published.replace(status) != Some(status) {
            health.set_service_status("", status).await;
            health.set_service_status(INFERENCE, status).await;
        }
    }
}

fn readiness(service: Service) -> impl Fn() -> ReadyState {
    move || match service.check_ready() {
        Ok(()) => ReadyState::Ready,
        Err(error) => ReadyState::NotReady { reason: error.message() },
    }
}

async fn connect(membership: &str) -> Result<Store, RouterError> {
    let unusable = |source: Box<dyn Error + Send + Sync>| RouterError::Membership {
        url: membership.to_owned(),
        source,
    };
    let endpoints = match membership.parse::<MembershipUrl>().map_err(|e| unusable(e.into()))? {
        MembershipUrl::Etcd(endpoints) => endpoints,
        MembershipUrl::Embedded => {
            return Err(unusable("a router needs the address of a store".into()));
        }
    };
    Store::connect(StoreConfig::new(endpoints)).await.map_err(|error| unusable(error.into()))
}

async fn load_model(config: &RouterConfig) -> Result<ServedModel, RouterError> {
    let (name, directory) = (config.model_name.clone(), config.model.clone());
    let limits = config.limits.clone();
    let load = move || ServedModel::load(name, &directory, &limits);
    match tokio::task::spawn_blocking(load).await {
        Ok(loaded) => loaded.map_err(RouterError::Processor),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn log_addresses(http: &TcpListener, grpc: &TcpListener, admin: &AdminServer) {
    let address = |listener: &TcpListener| listener.local_addr().map(|a| a.to_string());
    tracing::info!(
        http = address(http).unwrap_or_default(),
        grpc = address(grpc).unwrap_or_default(),
        admin = %admin.local_addr(),
        "router listens"
    );
}

/// Servers end only when told to; anything else is an error even without a cause.
fn ended_early(
    server: &'static str,
    ended: Result<Result<(), RouterError>, JoinError>,
) -> Result<(), RouterError> {
    match ended {
        Ok(Err(error)) => Err(error),
        Ok(Ok(())) | Err(_) => Err(RouterError::EndedEarly { server }),
    }
}
