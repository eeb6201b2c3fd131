//! The one path of a request, shared by both faces: admit, prepare, place, run.

use std::sync::Arc;
use std::time::Duration;

use tessera_processor::StopMatcher;
use tessera_types::{TenantId, TokenId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, HeldBytes};
use crate::clock;
use crate::config::RouterConfig;
use crate::error::RequestError;
use crate::events::{Generation, PromptInfo};
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::prepare::{Prepared, prepare, resolve_uploads};
use crate::request::ChatRequest;
use crate::session::{Job, Session};
use crate::uploads::Uploads;
use crate::upstream::{Identity, Upstream};

/// Everything the faces need. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: RouterConfig,
    model: Arc<ServedModel>,
    upstream: Upstream,
    admission: Admission,
    uploads: Uploads,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    lifecycle: Lifecycle,
    started_at: u64,
}

/// How a service learns that it is to end.
#[derive(Debug, Clone)]
pub(crate) struct Lifecycle {
    /// No new requests.
    pub(crate) drain: CancellationToken,
    /// Requests that outlive the drain fail.
    pub(crate) abort: CancellationToken,
}

impl Service {
    pub(crate) fn new(
        config: RouterConfig,
        model: ServedModel,
        upstream: Upstream,
        metrics: Arc<Metrics>,
        tasks: TaskTracker,
        lifecycle: Lifecycle,
    ) -> Self {
        let inner = Inner {
            admission: Admission::new(&config.limits),
            uploads: Uploads::new(&config.uploads),
            config,
            model: Arc::new(model),
            upstream,
            metrics,
            tasks,
            lifecycle,
            started_at: clock::unix_seconds(),
        };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn config(&self) -> &RouterConfig {
        &self.inner.config
    }

    pub(crate) fn model(&self) -> &Arc<ServedModel> {
        &self.inner.model
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.metrics
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.inner.admission
    }

    pub(crate) fn uploads(&self) -> &Uploads {
        &self.inner.uploads
    }

    pub(crate) fn upstream(&self) -> &Upstream {
        &self.inner.upstream
    }

    /// Seconds since 1970.
    pub(crate) fn started_at(&self) -> u64 {
        self.inner.started_at
    }

    /// Prompt and output tokens of the largest request that fits now.
    pub(crate) fn max_model_len(&self) -> u32 {
        let context = self.model().processor().config().max_context_len;
        match self.inner.upstream.identity() {
            Ok(identity) => context.min(identity.max_model_len),
            Err(_) => context,
        }
    }

    /// Whether a request would succeed now.
    ///
    /// # Errors
    /// [`RequestError::NotReady`] with what is missing, [`RequestError::Draining`].
    pub(crate) fn check_ready(&self) -> Result<(), RequestError> {
        self.check_not_draining()?;
        self.inner.upstream.check_ready().map_err(|detail| self.not_ready(detail))
    }

    /// Copies counts that others keep into the gauges.
    pub(crate) fn refresh_gauges(&self) {
        let Inner { metrics, admission, uploads, .. } = &*self.inner;
        metrics.running.set(admission.num_running() as i64);
        metrics.waiting.set(admission.num_waiting() as i64);
        metrics.held_bytes.set(admission.held() as i64);
        metrics.upload_bytes.set(uploads.bytes() as i64);
    }

    /// Runs `work` here, or on the blocking pool if it is about many bytes.
    ///
    /// # Errors
    /// [`RequestError::Internal`] if `work` panicked.
    pub(crate) async fn run_sized<T: Send + 'static>(
        &self,
        num_bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        if num_bytes < self.inner.config.limits.blocking_bytes {
            return Ok(work());
        }
        tokio::task::spawn_blocking(work).await.map_err(|error| {
            tracing::error!(%error, "preparing a request failed");
            RequestError::Internal { detail: "preparing the request failed".to_owned() }
        })
    }

    /// Admits a request and starts it. Returns when a decoder has accepted it; dropping the future or
    /// the result cancels it.
    ///
    /// # Errors
    /// Everything that can be said before the first token.
    pub(crate) async fn generate(
        &self,
        request: ChatRequest,
        mut held: HeldBytes,
    ) -> Result<Generation, RequestError> {
        self.check_not_draining()?;
        let inner = &self.inner;
        let place = inner.admission.place().await?;
        let (request_id, arrival) = (request.request_id.clone(), request.arrival);
        let job = JobOptions {
            num_choices: request.num_choices,
            stop: request.stop.clone(),
            seed: request.seed.unwrap_or_else(random_seed),
            return_token_ids: request.return_token_ids,
            timeout: self.timeout(request.timeout),
            priority: request.priority,
            tenant: request.tenant,
        };
        let identity = inner.upstream.identity().map_err(|detail| self.not_ready(detail))?;
        let (prepared, identity) = self.prepare(request, identity, &mut held).await?;
        let stop = StopMatcher::new(&job.stop, prepared.sampling.min_tokens as usize)?;
        let info = Arc::new(self.prompt_info(request_id, &prepared, &identity, job.seed));
        let (events, receiver) = mpsc::channel(inner.config.limits.max_buffered_events);
        let (accepted, acceptance) = oneshot::channel();
        let session = Session::new(
            Job {
                info: Arc::clone(&info),
                identity: identity.model,
                wants_tokens: job.return_token_ids || prepared.sampling.logprobs.is_some(),
                prepared,
                num_choices: job.num_choices,
                stop,
                stop_strings: job.stop,
                priority: job.priority,
                tenant: job.tenant,
                seed: job.seed,
                arrival,
                deadline: arrival + job.timeout,
                client_stall: Duration::from_millis(inner.config.limits.client_stall_ms),
                encode_timeout: Duration::from_millis(inner.config.upstream.encode_timeout_ms),
                encoder_wait: Duration::from_millis(inner.config.upstream.encoder_wait_ms),
                retry_after: inner.admission.retry_after(),
                _place: place,
                _held: held,
            },
            inner.upstream.clone(),
            Arc::clone(&inner.model),
            Arc::clone(&inner.metrics),
            events,
            accepted,
        );
        inner.tasks.spawn(session.run(inner.lifecycle.abort.clone()));
        match acceptance.await {
            Ok(Ok(())) => Ok(Generation { prompt: info, events: receiver }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(RequestError::Cancelled),
        }
    }

    /// Renders and tokenizes a conversation. No group need be known: keys are not told.
    ///
    /// # Errors
    /// As [`Service::generate`] until placement.
    pub(crate) async fn tokenize(
        &self,
        request: ChatRequest,
        mut held: HeldBytes,
    ) -> Result<Prepared, RequestError> {
        let identity = self.inner.upstream.identity().unwrap_or_else(|_| Identity::unknown());
        Ok(self.prepare(request, identity, &mut held).await?.0)
    }

    /// Tokenizes plain text, in which nothing is special.
    ///
    /// # Errors
    /// [`RequestError::ModelNotFound`], or text that cannot be tokenized.
    pub(crate) async fn tokenize_text(
        &self,
        model: &str,
        text: String,
    ) -> Result<Vec<TokenId>, RequestError> {
        self.model().check_name(model)?;
        let model = Arc::clone(self.model());
        self.run_sized(text.len(), move || {
            let mut tokens = Vec::new();
            model.processor().tokenizer().encode_plain(&text, &mut tokens)?;
            Ok(tokens)
        })
        .await?
    }

    async fn prepare(
        &self,
        mut request: ChatRequest,
        identity: Identity,
        held: &mut HeldBytes,
    ) -> Result<(Prepared, Identity), RequestError> {
        let inner = &self.inner;
        inner.model.check_name(&request.model)?;
        let sent_bytes = request.num_bytes();
        resolve_uploads(&mut request, &inner.uploads, Instant::now())?;
        let num_bytes = request.num_bytes();
        // Uploads may leave their store while the request still holds them.
        held.grow(num_bytes - sent_bytes)?;
        let model = Arc::clone(&inner.model);
        self.run_sized(num_bytes, move || {
            let prepared = prepare(&request, &model, &identity)?;
            Ok((prepared, identity))
        })
        .await?
    }

    fn check_not_draining(&self) -> Result<(), RequestError> {
        match self.inner.lifecycle.drain.is_cancelled() {
            true => Err(RequestError::Draining { retry_after: self.inner.admission.retry_after() }),
            false => Ok(()),
        }
    }

    fn prompt_info(
        &self,
        request_id: String,
        prepared: &Prepared,
        identity: &Identity,
        effective_seed: u64,
    ) -> PromptInfo {
        let weights = identity.model.language_fingerprint.to_string();
        let numerics = identity.model.language_numerics.to_string();
        PromptInfo {
            request_id,
            model: self.model().name().to_owned(),
            system_fingerprint: format!("fp_{}{}", &weights[..8], &numerics[..8]),
            created: clock::unix_seconds(),
            prompt: Arc::clone(&prepared.prompt),
            media: prepared.media_info(),
            effective_seed,
        }
    }

    fn timeout(&self, requested: Option<Duration>) -> Duration {
        let longest = Duration::from_millis(self.inner.config.limits.request_timeout_ms);
        requested.map_or(longest, |timeout| timeout.min(longest))
    }

    fn not_ready(&self, detail: String) -> RequestError {
        RequestError::NotReady { detail, retry_after: self.inner.admission.retry_after() }
    }
}

/// What of a request outlives its preparation.
struct JobOptions {
    num_choices: u32,
    stop: Vec<String>,
    seed: u64,
    return_token_ids: bool,
    timeout: Duration,
    priority: i32,
    tenant: TenantId,
}

/// Half of a random UUID: 62 random bits and a few fixed ones, mixed by the seed function later.
fn random_seed() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high ^ low.rotate_left(32)
}
