//! The gRPC service `Encoder`: admits items, joins equal ones, prepares and encodes them, hands
//! embeddings to whoever pulls.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use tessera_media::{MediaLimits, PixelRecipe, Size};
use tessera_processor::VisionIdentity;
use tessera_processor::keys::embedding_key_of;
use tessera_proto::encoder::v1 as pb;
use tessera_proto::{ErrorReason, MAX_CHUNK_BYTES, hash_bytes, hash_from_bytes};
use tessera_types::{EmbeddingKey, MediaKind};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

use crate::cache::{Embedding, EmbeddingCache};
use crate::config::EncoderConfig;
use crate::error::EncodeError;
use crate::ingest::{Announced, MediaBudget, Received, read_frames, read_header};
use crate::metrics::EncoderMetrics;
use crate::tower::Identity;
use crate::vision::{PatchItem, VisionHandle};

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub struct EncoderService {
    inner: Arc<Inner>,
}

struct Inner {
    config: EncoderConfig,
    limits: MediaLimits,
    identity: Identity,
    recipe: PixelRecipe,
    vision: VisionHandle,
    metrics: EncoderMetrics,
    budget: MediaBudget,
    prepare: Semaphore,
    queued_pixels: AtomicU64,
    queued_items: AtomicU64,
    draining: AtomicBool,
    started: Instant,
    state: Mutex<State>,
}

/// Cache and encodes in progress, changed together.
struct State {
    cache: EmbeddingCache,
    /// Weak: those who wait keep an encode alive, nobody else.
    running: HashMap<EmbeddingKey, Running>,
    num_started: u64,
}

struct Running {
    number: u64,
    encode: WeakShared<EncodeFuture>,
}

impl State {
    fn running(&self, key: &EmbeddingKey) -> Option<Encode> {
        self.running.get(key)?.encode.upgrade()
    }
}

/// One encode that several requests may wait for; dropped by all, it is cancelled.
type Encode = Shared<EncodeFuture>;
type EncodeFuture = BoxFuture<'static, Result<Done, EncodeError>>;

#[derive(Debug, Clone)]
struct Done {
    embedding: Arc<Embedding>,
    prepare: Duration,
    forward: Duration,
}

/// How an embedding was come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Encoded,
    Joined,
    CacheHit,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Encoded => "encoded",
            Self::Joined => "joined",
            Self::CacheHit => "cache_hit",
        }
    }
}

impl EncoderService {
    /// A service over a loaded vision tower.
    pub fn new(
        config: EncoderConfig,
        identity: Identity,
        recipe: PixelRecipe,
        vision: VisionHandle,
        metrics: EncoderMetrics,
    ) -> Self {
        let state = State {
            cache: EmbeddingCache::new(config.cache_bytes),
            running: HashMap::new(),
            num_started: 0,
        };
        let inner = Inner {
            budget: MediaBudget::new(config.max_media_bytes),
            prepare: Semaphore::new(config.prepare_threads),
            queued_pixels: AtomicU64::new(0),
            queued_items: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            started: Instant::now(),
            state: Mutex::new(state),
            limits: config.media_limits(),
            config,
            identity,
            recipe,
            vision,
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Refuses new items from now on; pulls go on.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::Release);
    }

    /// Whether new items are refused.
    pub fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Acquire)
    }

    /// Items in work, and embeddings whose located rows were not pulled yet.
    pub fn num_outstanding(&self) -> usize {
        let held = self.inner.state().cache.num_held(self.inner.now());
        held + self.inner.queued_items.load(Ordering::Acquire) as usize
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the lock")
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn hold_until(&self) -> Duration {
        self.now() + self.config.hold()
    }

    /// The key this worker would give the item; a difference means other weights, numerics or sizes.
    fn check_key(&self, announced: &Announced) -> Result<(), Status> {
        let size = Size::new(announced.resized_width, announced.resized_height);
        let frames: Vec<u32> = match announced.kind {
            MediaKind::Image => Vec::new(),
            MediaKind::Video => (0..announced.num_frames).collect(),
        };
        let vision = VisionIdentity {
            weights: self.identity.vision_fingerprint,
            numerics: self.identity.vision_numerics,
        };
        let Announced { kind, media_id, .. } = *announced;
        let key = embedding_key_of(&vision, &self.recipe, kind, media_id, &frames, size);
        if key != announced.key {
            let message =
                "the embedding key names other weights, numerics or sizes than this encoder's";
            return Err(ErrorReason::ModelMismatch.status(message).field("embedding_key").into());
        }
        let grid = self.recipe.patch.grid(announced.num_frames, size);
        if grid != announced.grid {
            let (found, announced) = (format!("{grid:?}"), format!("{:?}", announced.grid));
            return Err(EncodeError::GridMismatch { found, announced }.into());
        }
        Ok(())
    }

    fn locate(&self, key: &EmbeddingKey) -> Option<Arc<Embedding>> {
        let hold_until = self.hold_until();
        self.state().cache.locate(key, hold_until)
    }
}

/// Counts an item's pixels while it is in work.
struct Queued {
    inner: Arc<Inner>,
    pixels: u64,
}

impl Queued {
    fn admit(inner: &Arc<Inner>, pixels: u64) -> Result<Self, EncodeError> {
        let limit = inner.config.max_queued_pixels;
        let admitted =
            inner.queued_pixels.fetch_update(Ordering::AcqRel, Ordering::Acquire, |queued| {
                // An item larger than the whole queue is let in alone; its size is bounded by patches.
                (queued == 0 || queued.saturating_add(pixels) <= limit)
                    .then_some(queued.saturating_add(pixels))
            });
        let queued = admitted.map_err(|pixels| EncodeError::QueueFull { pixels, limit })?;
        inner.queued_items.fetch_add(1, Ordering::AcqRel);
        inner.metrics.queued_pixels.set((queued + pixels) as i64);
        Ok(Self { inner: inner.clone(), pixels })
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let before = self.inner.queued_pixels.fetch_sub(self.pixels, Ordering::AcqRel);
        self.inner.queued_items.fetch_sub(1, Ordering::AcqRel);
        self.inner.metrics.queued_pixels.set((before - self.pixels) as i64);
    }
}

/// Decodes, resizes, encodes and caches one item.
async fn encode(
    inner: Arc<Inner>,
    announced: Announced,
    received: Received,
    queued: Queued,
) -> Result<Done, EncodeError> {
    let permit = inner.prepare.acquire().await.map_err(|_| EncodeError::ShuttingDown)?;
    let started = Instant::now();
    let (recipe, limits) = (inner.recipe, inner.limits);
    let size = Size::new(announced.resized_width, announced.resized_height);
    let prepared = tokio::task::spawn_blocking(move || {
        tessera_media::prepare(&received.frames, size, &recipe, &limits)
    });
    let patches = prepared
        .await
        .map_err(|error| EncodeError::Vision(error.to_string()))?
        .map_err(|error| EncodeError::Media(Arc::new(error)))?;
    drop(permit);
    let prepare = started.elapsed();
    inner.metrics.prepare_seconds.observe(prepare.as_secs_f64());
    let item = PatchItem { grid: patches.grid, values: patches.pixel_values };
    let encoded = inner.vision.encode(item).await?;
    let embedding = Arc::new(Embedding::new(announced.key, encoded.num_cols, &encoded.rows));
    let (now, hold_until) = (inner.now(), inner.hold_until());
    let mut state = inner.state();
    state.cache.insert(embedding.clone(), now, hold_until)?;
    inner.metrics.cache_bytes.set(state.cache.used_bytes() as i64);
    drop(state);
    drop(queued);
    Ok(Done { embedding, prepare, forward: encoded.forward })
}

/// Takes an encode out of the table when it ends or when everyone who waited has left.
struct Entry {
    inner: Arc<Inner>,
    key: EmbeddingKey,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        // A successor may have taken the place already.
        if state.running.get(&self.key).is_some_and(|running| running.number == self.number) {
            state.running.remove(&self.key);
        }
    }
}

impl EncoderService {
    async fn encode_item<S>(
        &self,
        announced: Announced,
        stream: &mut S,
    ) -> Result<(Done, Outcome), Status>
    where
        S: tokio_stream::Stream<Item = Result<pb::EncodeRequest, Status>> + Unpin,
    {
        let inner = &self.inner;
        inner.check_key(&announced)?;
        if let Some(embedding) = inner.locate(&announced.key) {
            let done = Done { embedding, prepare: Duration::ZERO, forward: Duration::ZERO };
            return Ok((done, Outcome::CacheHit));
        }
        if announced.cached_only {
            let message = "the embedding is not cached here";
            return Err(ErrorReason::MediaNotFound.status(message).into());
        }
        if self.is_draining() {
            return Err(EncodeError::ShuttingDown.into());
        }
        let (patches, limit) =
            (announced.grid.num_patches(), u64::from(inner.vision.max_patches()));
        if patches > limit {
            return Err(EncodeError::TooLarge { patches, limit }.into());
        }
        let running = inner.state().running(&announced.key);
        if let Some(running) = running {
            return Ok((running.await?, Outcome::Joined));
        }
        let queued = Queued::admit(inner, announced.pixels())?;
        let received = read_frames(stream, &announced, &inner.budget).await?;
        let (encode, outcome) = self.start_or_join(announced, received, queued);
        Ok((encode.await?, outcome))
    }

    /// While the bytes came in, another request may have started the same item.
    fn start_or_join(
        &self,
        announced: Announced,
        received: Received,
        queued: Queued,
    ) -> (Encode, Outcome) {
        let key = announced.key;
        let mut state = self.inner.state();
        if let Some(running) = state.running(&key) {
            return (running, Outcome::Joined);
        }
        state.num_started += 1;
        let number = state.num_started;
        let entry = Entry { inner: self.inner.clone(), key, number };
        let work = encode(self.inner.clone(), announced, received, queued);
        let encode = async move {
            let result = work.await;
            drop(entry);
            result
        };
        let encode = encode.boxed().shared();
        let weak = encode.downgrade().expect("the future was not polled yet");
        state.running.insert(key, Running { number, encode: weak });
        (encode, Outcome::Encoded)
    }

    fn respond(&self, done: &Done, outcome: Outcome) -> pb::EncodeResponse {
        pb::EncodeResponse {
            embedding: Some(info(&done.embedding)),
            cache_hit: outcome == Outcome::CacheHit,
            preprocess_ms: done.prepare.as_secs_f64() * 1e3,
            forward_ms: done.forward.as_secs_f64() * 1e3,
            hold_ms: self.inner.config.hold_ms,
        }
    }
}

fn info(embedding: &Embedding) -> pb::EmbeddingInfo {
    pb::EmbeddingInfo {
        key: hash_bytes(&embedding.key.0),
        num_rows: embedding.num_rows,
        num_cols: embedding.num_cols,
        dtype: pb::DType::F32.into(),
        digest: hash_bytes(&embedding.digest),
    }
}

type FetchStream =
    Pin<Box<dyn tokio_stream::Stream<Item = Result<pb::FetchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl pb::encoder_server::Encoder for EncoderService {
    type FetchStream = FetchStream;

    async fn describe(
        &self,
        request: Request<Streaming<pb::EncodeRequest>>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        let inner = &self.inner;
        let mut stream = request.into_inner();
        let announced = read_header(&mut stream, &inner.limits).await?;
        let received = read_frames(&mut stream, &announced, &inner.budget).await?;
        let media = |error| Status::from(EncodeError::Media(Arc::new(error)));
        let first = tessera_media::probe(&received.frames[0], &inner.limits).map_err(media)?;
        let recipe = &inner.recipe;
        let size = Size::new(announced.resized_width, announced.resized_height);
        let grid = recipe.patch.grid(announced.num_frames, size);
        Ok(Response::new(pb::DescribeResponse {
            source_width: first.width,
            source_height: first.height,
            resized_width: size.width,
            resized_height: size.height,
            grid: Some(grid.into()),
            num_tokens: grid.num_visual_tokens(recipe.patch.merge_size) as u32,
        }))
    }

    async fn encode(
        &self,
        request: Request<Streaming<pb::EncodeRequest>>,
    ) -> Result<Response<pb::EncodeResponse>, Status> {
        let mut stream = request.into_inner();
        let announced = read_header(&mut stream, &self.inner.limits).await?;
        let kind = announced.kind;
        let result = self.encode_item(announced, &mut stream).await;
        let outcome = match &result {
            Ok((_, outcome)) => outcome.label(),
            Err(status) if status.code() == tonic::Code::Unavailable => "failed",
            Err(_) => "refused",
        };
        self.inner.metrics.requests.with_label_values(&[outcome]).inc();
        let (done, outcome) = result.inspect_err(|status| {
            tracing::info!(kind = kind_name(kind), code = ?status.code(), message = status.message(), "item not encoded");
        })?;
        Ok(Response::new(self.respond(&done, outcome)))
    }

    async fn fetch(
        &self,
        request: Request<pb::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let key = EmbeddingKey(hash_from_bytes(&request.get_ref().key, "key")?);
        let embedding = self.inner.state().cache.pull(&key).ok_or_else(|| {
            Status::from(
                ErrorReason::MediaNotFound.status("the embedding is not here").field("key"),
            )
        })?;
        let metrics = self.inner.metrics.clone();
        let first = pb::fetch_response::Part::Info(info(&embedding));
        let chunks = chunks(embedding.values.clone()).map(move |chunk| {
            metrics.fetched_bytes.inc_by(chunk.len() as u64);
            pb::fetch_response::Part::Data(chunk)
        });
        let parts = std::iter::once(first).chain(chunks);
        let responses = parts.map(|part| Ok(pb::FetchResponse { part: Some(part) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(responses))))
    }

    async fn load(
        &self,
        _: Request<pb::LoadRequest>,
    ) -> Result<Response<pb::LoadResponse>, Status> {
        if self.is_draining() {
            return Err(EncodeError::ShuttingDown.into());
        }
        let inner = &self.inner;
        let state = inner.state();
        Ok(Response::new(pb::LoadResponse {
            queued_pixels: inner.queued_pixels.load(Ordering::Acquire),
            queued_items: inner.queued_items.load(Ordering::Acquire),
            cache_bytes: state.cache.used_bytes(),
            cache_capacity_bytes: state.cache.capacity_bytes(),
        }))
    }
}

fn kind_name(kind: MediaKind) -> &'static str {
    match kind {
        MediaKind::Image => "image",
        MediaKind::Video => "video",
    }
}

fn chunks(values: Bytes) -> impl Iterator<Item = Bytes> {
    (0..values.len())
        .step_by(MAX_CHUNK_BYTES)
        .map(move |at| values.slice(at..values.len().min(at + MAX_CHUNK_BYTES)))
}
