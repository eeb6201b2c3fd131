//! The encoder worker: media in, embeddings out. It decodes and resizes on threads of its own, packs
//! waiting items into one forward pass of the vision tower, keeps embeddings in a content-addressed cache
//! and hands them to the decoder that pulls.
//!
//! Invariants
//! - Bounded: media bytes held, pixels queued, patches per pass, bytes cached. What does not fit is refused
//!   with a retry hint.
//! - An embedding is encoded once, however many ask for it at the same time, and is never evicted between
//!   being announced and being pulled (within `hold_ms`).
//! - The key a request names must be the key this worker computes: other weights, numerics or sizes are
//!   refused, never silently encoded.
//! - A bad media item fails its own request only.
//!
//! Modules: [`config`], [`error`], [`metrics`], [`ingest`] (the request stream), [`cache`],
//! [`vision`] (the vision thread), [`tower`] (the model on a backend), [`warm_up`] (before it serves),
//! [`service`] (gRPC), [`member`] (registration).

pub mod cache;
pub mod config;
pub mod error;
pub mod ingest;
pub mod member;
pub mod metrics;
pub mod service;
pub mod tower;
pub mod vision;
pub mod warm_up;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_model::ModelConfig;
use tessera_processor::ProcessorConfig;
use tessera_proto::encoder::v1::encoder_server::EncoderServer;
use tessera_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES};
use tessera_telemetry::{AdminServer, ReadyState, Registry};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

pub use crate::config::EncoderConfig;
pub use crate::error::EncoderError;
use crate::member::Member;
use crate::metrics::EncoderMetrics;
use crate::service::EncoderService;
use crate::tower::Compute;
use crate::vision::VisionHandle;

/// How often a draining encoder looks whether everything was pulled.
const DRAIN_POLL: Duration = Duration::from_millis(50);

/// An image that takes longer is worth a warning.
const SLOW_IMAGE: Duration = Duration::from_secs(60);

/// Runs an encoder until `shutdown` completes: loads the tower, serves, registers; at the end
/// leaves the store, refuses new items, waits for issued embeddings to be pulled, stops.
///
/// # Errors
/// Bad settings, a broken checkpoint, an address in use, or being fenced.
pub async fn run(
    config: EncoderConfig,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), EncoderError> {
    config.validate()?;
    let registry = Registry::new();
    let metrics = EncoderMetrics::register(&registry)?;
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|source| EncoderError::Listen { address: config.listen, source })?;
    let address = listener
        .local_addr()
        .map_err(|source| EncoderError::Listen { address: config.listen, source })?;
    let source = config.model.clone();
    let model = ModelConfig::from_dir(&source.directory)
        .map_err(|error| EncoderError::Model(error.into()))?;
    let processor = ProcessorConfig::load(&source.directory)
        .map_err(|error| EncoderError::Model(error.into()))?;
    let compute = Compute {
        device: config.parse_device()?,
        threads: config.threads,
        deterministic: config.deterministic,
    };
    let identity = tower::identify(&model, &source.weights, compute)?;
    let max_patches = config.max_batch_patches;
    let load = move || tower::load(&model, &source.weights, max_patches, compute);
    let vision = VisionHandle::start(load, max_patches, metrics.clone()).await?;
    warm_up(&config, &vision, &processor).await?;
    let service = EncoderService::new(config.clone(), identity, processor.recipe, vision, metrics);

    let admin_service = service.clone();
    let (ready, is_ready) = watch::channel(false);
    let readiness = move || match (*is_ready.borrow(), admin_service.is_draining()) {
        (true, false) => ReadyState::Ready,
        (_, true) => ReadyState::NotReady { reason: "draining".into() },
        (false, _) => ReadyState::NotReady { reason: "not registered".into() },
    };
    let admin = AdminServer::bind(&config.admin, registry, Arc::new(readiness)).await?;
    let (stop, stopped) = watch::channel(false);
    let admin_task = tokio::spawn(admin.serve(until(stopped.clone())));
    let server_task = tokio::spawn(serve(listener, service.clone(), until(stopped)));

    let member = Member::register(&config, address, &identity).await?;
    ready.send_replace(true);
    tracing::info!(%address, instance = %member.instance(), "encoder serves");
    let result = tokio::select! {
        () = shutdown => Ok(()),
        reason = member.fenced() => Err(EncoderError::Fenced { reason }),
    };
    service.drain();
    drain(&service, config.drain_ms).await;
    member.leave().await;
    stop.send_replace(true);
    let served = server_task.await.map_err(|_| EncoderError::VisionThreadEnded)?;
    if let Ok(Err(error)) = admin_task.await {
        tracing::warn!(%error, "admin server failed");
    }
    result.and(served)
}

/// Encodes blank items, and says how long the largest image of the checkpoint takes at least.
async fn warm_up(
    config: &EncoderConfig,
    vision: &VisionHandle,
    processor: &ProcessorConfig,
) -> Result<(), EncoderError> {
    let budget = Duration::from_millis(config.warm_up_ms.into());
    let warm = warm_up::warm_up(vision, &processor.recipe, budget).await?;
    let patch_pixels = u64::from(processor.recipe.patch.patch_size).pow(2);
    let largest =
        (processor.pixel_bounds.max_pixels / patch_pixels).min(vision.max_patches().into());
    let (patches, forward_ms) = (warm.patches, warm.forward.as_millis() as u64);
    let largest_ms = warm.estimate(largest).map(|time| time.as_millis() as u64);
    tracing::info!(patches, forward_ms, largest, largest_ms, "vision tower is warm");
    if warm.estimate(largest).is_some_and(|time| time > SLOW_IMAGE) {
        tracing::warn!(
            largest_ms,
            max_pixels = processor.pixel_bounds.max_pixels,
            "the largest image takes long on this device; clients can lower max_pixels"
        );
    }
    Ok(())
}

async fn until(mut stopped: watch::Receiver<bool>) {
    // The sender outlives the servers; if it does not, they stop too.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn serve(
    listener: TcpListener,
    service: EncoderService,
    stop: impl Future<Output = ()>,
) -> Result<(), EncoderError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<EncoderServer<EncoderService>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let generated = "the descriptors were generated with the code";
    let reflection_v1 = reflection().build_v1().expect(generated);
    let reflection_v1alpha = reflection().build_v1alpha().expect(generated);
    let encoder = EncoderServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // The builder's setting of the same name counts only for listeners that it makes itself.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(health_service)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha)
        .add_service(encoder)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
        .map_err(EncoderError::Serve)
}

/// Waits until items in work are done and announced embeddings were pulled, at most `drain_ms`.
async fn drain(service: &EncoderService, drain_ms: u32) {
    let deadline = Instant::now() + Duration::from_millis(u64::from(drain_ms));
    while service.num_outstanding() > 0 && Instant::now() < deadline {
        tokio::time::sleep(DRAIN_POLL).await;
    }
}
