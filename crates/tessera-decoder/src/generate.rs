//! One `Generate` stream: an attempt at one choice, between a router and the engine.
//!
//! The stream's task owns the sequence: whatever ends the stream (its last event, the client, the deadline)
//! ends the sequence too.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tessera_cluster::Fence;
use tessera_engine::{EngineHandle, Event, EventSink, SinkError, Submission, SubmitError};
use tessera_processor::BlockKeyChain;
use tessera_proto::common::v1 as common;
use tessera_proto::decoder::v1 as pb;
use tessera_proto::{ErrorReason, hash_from_bytes};
use tessera_types::{Epoch, FinishReason, Prompt, SequenceId, TenantId};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::error::{refused, sequence_status, submit_status};
use crate::fetch::{EncoderPool, FetchError, Wanted};
use crate::metrics::DecoderMetrics;
use crate::service::refusal_status;

/// Events beside tokens that one sequence may have: accepted, needed, started, the last.
const EXTRA_EVENTS: usize = 64;
/// Messages on their way to a router; a slow one makes the stream's task wait, not the engine.
pub const RESPONSES_IN_FLIGHT: usize = 32;
/// Tokens that one message may carry when they have piled up.
const MAX_RECORDS: usize = 64;
/// Hint to routers when the engine's inbox is full.
const BUSY_RETRY: Duration = Duration::from_millis(50);

/// What all streams of a leader share.
pub struct Attempts {
    pub engine: EngineHandle,
    pub encoders: EncoderPool,
    pub metrics: DecoderMetrics,
    /// Keys of KV blocks, for the prefix cache.
    pub block_keys: BlockKeyChain,
    /// Values per embedding row.
    pub hidden_size: u32,
    pub numerics_id: String,
    pub fetch_timeout: Duration,
    pub max_fetches: u32,
    /// Cancelled when what still runs must go on elsewhere.
    pub move_rest: CancellationToken,
    /// Streams that are not over.
    pub num_open: Arc<AtomicUsize>,
}

/// Counts a stream while it lasts.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(num_open: &Arc<AtomicUsize>) -> Self {
        num_open.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(num_open))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Events of one sequence, from the engine thread to the stream's task. Never waits.
struct Sink(mpsc::Sender<Event>);

impl EventSink for Sink {
    fn send(&mut self, event: Event) -> Result<(), SinkError> {
        self.0.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SinkError::Full,
            mpsc::error::TrySendError::Closed(_) => SinkError::Closed,
        })
    }
}

/// The end of a pull of one item.
type Arrival = (u32, Result<Arc<[f32]>, FetchError>);

type Responses = mpsc::Sender<Result<pb::GenerateResponse, Status>>;

/// One attempt in progress.
struct Attempt {
    shared: Arc<Attempts>,
    sequence: Sequence,
    prompt: Arc<Prompt>,
    attempt: u32,
    /// The epoch that the router asked for.
    fence: Fence,
    /// Pulls tried so far, by item.
    fetches: HashMap<u32, u32>,
    fetched: mpsc::Sender<Arrival>,
    responses: Responses,
}

/// Ends the sequence with its stream.
struct Sequence {
    engine: EngineHandle,
    id: SequenceId,
    ended: bool,
}

impl Drop for Sequence {
    fn drop(&mut self) {
        if !self.ended {
            abort(&self.engine, self.id, FinishReason::Cancelled);
        }
    }
}

/// A full inbox must not leave a sequence running for nobody, so this is tried until it is taken.
fn abort(engine: &EngineHandle, id: SequenceId, reason: FinishReason) {
    if engine.abort(id, reason) == Err(SubmitError::Busy) {
        let engine = engine.clone();
        tokio::spawn(async move {
            while engine.abort(id, reason) == Err(SubmitError::Busy) {
                tokio::time::sleep(BUSY_RETRY).await;
            }
        });
    }
}

/// Serves one attempt whose first message is `start`. Returns when it is over.
///
/// `fence` has admitted `start`; the engine may have gone on to another epoch since.
pub async fn serve(
    shared: Arc<Attempts>,
    fence: Fence,
    start: pb::Start,
    mut requests: Streaming<pb::GenerateRequest>,
    responses: Responses,
) {
    let _open = Open::new(&shared.num_open);
    let status = match begin(&shared, fence, start, &responses) {
        Ok((attempt, events, fetched, deadline)) => {
            attempt.run(&mut requests, events, fetched, deadline).await
        }
        Err(status) => Err(status),
    };
    if let Err(status) = status {
        // A router that is gone needs no status.
        let _ = responses.send(Err(status)).await;
    }
}

type Begun =
    (Attempt, mpsc::Receiver<Event>, mpsc::Receiver<Arrival>, Option<tokio::time::Instant>);

fn begin(
    shared: &Arc<Attempts>,
    fence: Fence,
    start: pb::Start,
    responses: &Responses,
) -> Result<Begun, Status> {
    let missing = |field| Status::from(tessera_proto::ConvertError::Missing { field });
    let prompt = start.prompt.as_ref().ok_or_else(|| missing("prompt"))?;
    let prompt: Arc<Prompt> = Arc::new(prompt.try_into()?);
    let sampling = start.sampling.as_ref().ok_or_else(|| missing("sampling"))?;
    let sampling = Arc::new(tessera_types::SamplingParams::try_from(sampling)?);
    let (events, receiver) = mpsc::channel(num_events(&prompt, &sampling));
    let submission = Submission {
        block_keys: shared.block_keys.keys(&prompt, &start.output_token_ids),
        prompt: prompt.clone(),
        output: start.output_token_ids,
        sampling,
        seed: start.effective_seed,
        priority: start.priority,
        tenant: TenantId(start.tenant),
        age: Duration::from_millis(u64::from(start.age_ms)),
    };
    let deadline = (start.remaining_ms > 0).then(|| {
        tokio::time::Instant::now() + Duration::from_millis(u64::from(start.remaining_ms))
    });
    let id = shared
        .engine
        .submit(submission, Box::new(Sink(events)))
        .map_err(|error| submit_status(error, BUSY_RETRY))?;
    let (fetched, arrivals) = mpsc::channel(prompt.media.len().max(1));
    let attempt = Attempt {
        sequence: Sequence { engine: shared.engine.clone(), id, ended: false },
        shared: shared.clone(),
        prompt,
        attempt: start.attempt,
        fence,
        fetches: HashMap::new(),
        fetched,
        responses: responses.clone(),
    };
    Ok((attempt, receiver, arrivals, deadline))
}

/// Most events of a sequence. A chunk of prompt whose tokens are scored is one, and may be a single token.
fn num_events(prompt: &Prompt, sampling: &tessera_types::SamplingParams) -> usize {
    let num_scored = sampling.prompt_logprobs.map_or(0, |_| prompt.tokens.len());
    sampling.max_tokens as usize + num_scored + EXTRA_EVENTS
}

impl Attempt {
    async fn run(
        mut self,
        requests: &mut Streaming<pb::GenerateRequest>,
        mut events: mpsc::Receiver<Event>,
        mut arrivals: mpsc::Receiver<Arrival>,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<(), Status> {
        let expired = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(expired);
        let mut is_expired = false;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => {
                        if self.report(event, &mut events).await? {
                            return Ok(());
                        }
                    }
                    None => {
                        let message = "the router reads too slowly, or the engine has stopped";
                        return Err(ErrorReason::GroupLost.status(message).into());
                    }
                },
                Some((item, result)) = arrivals.recv() => self.arrived(item, result).await?,
                request = requests.next() => match request {
                    Some(Ok(request)) => self.request(request)?,
                    // The router is gone or has cancelled the call; dropping self ends the sequence.
                    Some(Err(_)) | None => return Ok(()),
                },
                () = self.shared.move_rest.cancelled() => {
                    let message = "the group drains and the time for running requests is over";
                    return Err(ErrorReason::Draining.status(message).into());
                }
                () = &mut expired, if !is_expired => {
                    is_expired = true;
                    abort(&self.sequence.engine, self.sequence.id, FinishReason::DeadlineExceeded);
                }
            }
        }
    }

    /// Passes one event on, with the tokens that stand right behind it. True after the last.
    async fn report(
        &mut self,
        event: Event,
        events: &mut mpsc::Receiver<Event>,
    ) -> Result<bool, Status> {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let Event::Token { output_index, token, logprobs } = event else {
                return self.report_one(event).await;
            };
            let mut records = vec![record(output_index, token, logprobs.as_ref())];
            while records.len() < MAX_RECORDS {
                match events.try_recv() {
                    Ok(Event::Token { output_index, token, logprobs }) => {
                        records.push(record(output_index, token, logprobs.as_ref()));
                    }
                    Ok(other) => {
                        next = Some(other);
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.shared.metrics.output_tokens.inc_by(records.len() as u64);
            let tokens = pb::Tokens { attempt: self.attempt, records };
            self.respond(pb::generate_response::Message::Tokens(tokens)).await?;
        }
        Ok(false)
    }

    async fn report_one(&mut self, event: Event) -> Result<bool, Status> {
        let attempt = self.attempt;
        match event {
            Event::Accepted { epoch } => {
                self.fence.check_epoch(epoch).map_err(refusal_status)?;
                let message = accepted(attempt, epoch, &self.shared.numerics_id);
                self.respond(pb::generate_response::Message::Accepted(message)).await?;
            }
            Event::MediaNeeded { items } => {
                let message = pb::MediaNeeded { attempt, items };
                self.respond(pb::generate_response::Message::MediaNeeded(message)).await?;
            }
            Event::Started { .. } => {}
            Event::PromptLogprobs { first_token, tokens } => {
                let tokens = tokens.iter().map(Into::into).collect();
                let message = pb::PromptLogprobs { attempt, first_token, tokens };
                self.respond(pb::generate_response::Message::PromptLogprobs(message)).await?;
            }
            Event::Token { .. } => unreachable!("tokens are reported in runs"),
            Event::Finished { reason, num_output_tokens, num_cached_tokens, timings } => {
                self.sequence.ended = true;
                self.shared.metrics.finished(reason, &timings);
                let message = pb::Finished {
                    attempt,
                    reason: common::FinishReason::from(reason).into(),
                    num_output_tokens,
                    num_cached_tokens,
                    queue_ms: timings.queue.as_secs_f64() * 1e3,
                    prefill_ms: timings.prefill.as_secs_f64() * 1e3,
                };
                self.respond(pb::generate_response::Message::Finished(message)).await?;
                return Ok(true);
            }
            Event::Failed { error } => {
                self.sequence.ended = true;
                self.shared.metrics.failed(&error);
                return Err(sequence_status(&error));
            }
        }
        Ok(false)
    }

    async fn respond(&self, message: pb::generate_response::Message) -> Result<(), Status> {
        let response = pb::GenerateResponse { message: Some(message) };
        let gone = |_| Status::from(ErrorReason::Cancelled.status("the router is gone"));
        self.responses.send(Ok(response)).await.map_err(gone)
    }

    fn request(&mut self, request: pb::GenerateRequest) -> Result<(), Status> {
        use pb::generate_request::Message;
        match request.message {
            Some(Message::MediaAt(at)) => self.fetch(at),
            Some(Message::MediaFailed(failed)) => {
                self.item(failed.item)?;
                self.media_failed(failed.item, failed.reason)
            }
            Some(Message::Cancel(_)) => {
                abort(&self.sequence.engine, self.sequence.id, FinishReason::Cancelled);
                Ok(())
            }
            Some(Message::Start(_)) | None => {
                Err(refused("message", "only one start, and it is first"))
            }
        }
    }

    fn item(&self, item: u32) -> Result<&tessera_types::MediaSpan, Status> {
        let found = self.prompt.media.iter().find(|span| span.item == item);
        found.ok_or_else(|| refused("item", format!("there is no media item {item}")))
    }

    /// Pulls an embedding beside the stream; the result comes back as an arrival.
    fn fetch(&mut self, at: pb::MediaAt) -> Result<(), Status> {
        let span = self.item(at.item)?;
        if hash_from_bytes(&at.embedding_key, "embedding_key")? != span.embedding_key.0 {
            return Err(refused("embedding_key", "is not the key of this item"));
        }
        let wanted = Wanted {
            key: span.embedding_key,
            num_rows: span.num_tokens,
            num_cols: self.shared.hidden_size,
        };
        *self.fetches.entry(at.item).or_default() += 1;
        let (shared, fetched) = (self.shared.clone(), self.fetched.clone());
        tokio::spawn(async move {
            let timeout = shared.fetch_timeout;
            let pull = shared.encoders.fetch(&at.endpoint, &wanted, timeout);
            // An attempt that ended closes the channel; its pull is then dropped.
            tokio::select! {
                result = pull => { let _ = fetched.send((at.item, result)).await; }
                () = fetched.closed() => {}
            }
        });
        Ok(())
    }

    async fn arrived(
        &mut self,
        item: u32,
        result: Result<Arc<[f32]>, FetchError>,
    ) -> Result<(), Status> {
        let error = match result {
            Ok(rows) => {
                self.shared.metrics.fetched_bytes.inc_by((rows.len() * size_of::<f32>()) as u64);
                let engine = &self.shared.engine;
                return engine
                    .media_arrived(self.sequence.id, item, rows)
                    .map_err(|error| submit_status(error, BUSY_RETRY));
            }
            Err(error) => error,
        };
        self.shared.metrics.failed_fetches.inc();
        tracing::warn!(item, %error, "embedding not pulled");
        if self.fetches.get(&item).copied().unwrap_or(0) >= self.shared.max_fetches {
            return self.media_failed(item, error.to_string());
        }
        let needed = pb::MediaNeeded { attempt: self.attempt, items: vec![item] };
        self.respond(pb::generate_response::Message::MediaNeeded(needed)).await
    }

    fn media_failed(&self, item: u32, reason: String) -> Result<(), Status> {
        let engine = &self.shared.engine;
        engine
            .media_failed(self.sequence.id, item, reason)
            .map_err(|error| submit_status(error, BUSY_RETRY))
    }
}

fn accepted(attempt: u32, epoch: Epoch, numerics_id: &str) -> pb::Accepted {
    pb::Accepted {
        attempt,
        epoch: epoch.0,
        num_cached_tokens: 0,
        numerics_id: numerics_id.to_owned(),
    }
}

fn record(
    output_index: u32,
    token_id: u32,
    logprobs: Option<&tessera_types::TokenLogprobs>,
) -> pb::TokenRecord {
    pb::TokenRecord {
        output_index,
        token_id,
        logprobs: logprobs.map(common::PositionLogprobs::from),
    }
}
