//! Runs one request: carries events into [`RequestSession`], does what it says, and speaks to the client
//! through a bounded channel. One task per request; when the channel is full the decoder's stream is not
//! read, so a slow client slows its own sequence and nothing else.
//!
//! Modules: `actions` (what the machine tells to do), `attempt` (streams to decoders), `encode` (calls to
//! encoders), `text` (what a choice says), `outcome` (usage, timings, errors).

mod actions;
mod attempt;
mod encode;
mod outcome;
mod text;

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tessera_cluster::request::{
    Action, AttemptFailure, Event as Input, MediaItem, SessionSpec, Target,
};
use tessera_cluster::{ModelIdentity, RequestSession, SessionConfig};
use tessera_processor::StopMatcher;
use tessera_proto::decoder::v1 as pb;
use tessera_types::{Attempt, TenantId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admission::{HeldBytes, Place};
use crate::clock;
use crate::error::RequestError;
use crate::events::{Event, PromptInfo};
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::prepare::Prepared;
use crate::upstream::Upstream;
use attempt::{AttemptStream, Broken};
use encode::Encoded;
use outcome::Record;
use text::ChoiceText;

/// Longest sleep between two looks at the machine's deadline.
const MAX_SLEEP: Duration = Duration::from_secs(3600);

/// A prepared and admitted request.
pub(crate) struct Job {
    pub(crate) info: Arc<PromptInfo>,
    /// Weights and numerics that the prompt's keys are made of.
    pub(crate) identity: ModelIdentity,
    pub(crate) prepared: Prepared,
    pub(crate) num_choices: u32,
    pub(crate) stop: StopMatcher,
    pub(crate) stop_strings: Vec<String>,
    /// As the client counts: lower goes first.
    pub(crate) priority: i32,
    pub(crate) tenant: TenantId,
    /// Effective seed of the request.
    pub(crate) seed: u64,
    /// Whether deltas carry tokens.
    pub(crate) wants_tokens: bool,
    pub(crate) arrival: Instant,
    pub(crate) deadline: Instant,
    pub(crate) client_stall: Duration,
    pub(crate) encode_timeout: Duration,
    pub(crate) encoder_wait: Duration,
    pub(crate) retry_after: Duration,
    pub(crate) _place: Place,
    pub(crate) _held: HeldBytes,
}

/// The task's state.
pub(crate) struct Session {
    job: Job,
    upstream: Upstream,
    model: Arc<ServedModel>,
    metrics: Arc<Metrics>,
    machine: RequestSession,
    todo: VecDeque<Action>,
    /// By choice.
    attempts: Vec<Option<AttemptStream>>,
    texts: Vec<ChoiceText>,
    encodes: FuturesUnordered<BoxFuture<'static, Encoded>>,
    /// Items that wait for an encoder: which, and the encoders that failed it.
    encoder_waits: FuturesUnordered<BoxFuture<'static, (u32, Vec<String>)>>,
    /// Until when each item waits for an encoder, from its first wait on.
    encoder_deadlines: HashMap<u32, Instant>,
    /// Where the first choice went, so that the others share its prefix.
    home: Option<Target>,
    record: Record,
    /// Events that wait to be sent together.
    ready: Vec<Event>,
    out: mpsc::Sender<Result<Event, RequestError>>,
    accepted: Option<oneshot::Sender<Result<(), RequestError>>>,
}

/// What the task waits for.
enum Happened {
    FromDecoder { choice: u32, attempt: Attempt, message: Result<pb::GenerateResponse, Broken> },
    Encoded(Encoded),
    LookForEncoder { item: u32, avoid: Vec<String> },
    Tick,
    ClientLeft,
    Shutdown,
}

impl Session {
    pub(crate) fn new(
        job: Job,
        upstream: Upstream,
        model: Arc<ServedModel>,
        metrics: Arc<Metrics>,
        out: mpsc::Sender<Result<Event, RequestError>>,
        accepted: oneshot::Sender<Result<(), RequestError>>,
    ) -> Self {
        let media = job.prepared.prompt.media.iter();
        let media = media.map(|span| MediaItem { embedding_key: span.embedding_key, eager: false });
        let spec = SessionSpec {
            num_choices: job.num_choices,
            seed: job.seed,
            deadline: Some(clock::now() + job.deadline.saturating_duration_since(Instant::now())),
            media: media.collect(),
            resumed: Vec::new(),
        };
        let config = SessionConfig { retry_after: job.retry_after, ..SessionConfig::default() };
        let text = |_| {
            let detokenizer = model.processor().detokenizer();
            let tools = job.prepared.tool_reader.clone();
            ChoiceText::new(detokenizer, job.stop.clone(), tools, job.wants_tokens)
        };
        Self {
            machine: RequestSession::new(config, spec),
            todo: VecDeque::new(),
            attempts: (0..job.num_choices).map(|_| None).collect(),
            texts: (0..job.num_choices).map(text).collect(),
            encodes: FuturesUnordered::new(),
            encoder_waits: FuturesUnordered::new(),
            encoder_deadlines: HashMap::new(),
            home: None,
            record: Record::new(&job),
            ready: Vec::new(),
            out,
            accepted: Some(accepted),
            job,
            upstream,
            model,
            metrics,
        }
    }

    /// Runs to the end. The client's leaving cancels everything; `abort` fails the request.
    pub(crate) async fn run(mut self, abort: CancellationToken) {
        let out = self.out.clone();
        let closed = out.closed();
        let aborted = abort.cancelled();
        let timer = tokio::time::sleep(MAX_SLEEP);
        tokio::pin!(closed, aborted, timer);
        self.feed(Input::Start);
        let mut wake = None;
        while !self.machine.is_over() {
            if wake != self.machine.deadline() {
                wake = self.machine.deadline();
                timer.as_mut().reset(instant_of(wake));
            }
            let Self { attempts, encodes, encoder_waits, .. } = &mut self;
            let happened = tokio::select! {
                biased;
                () = &mut closed => Happened::ClientLeft,
                happened = next_message(attempts) => happened,
                Some(encoded) = encodes.next() => Happened::Encoded(encoded),
                Some((item, avoid)) = encoder_waits.next() => Happened::LookForEncoder { item, avoid },
                () = &mut aborted => Happened::Shutdown,
                () = &mut timer => {
                    // The two clocks may differ by a little: look again if it is not yet time.
                    wake = None;
                    Happened::Tick
                }
            };
            self.on(happened);
            if !self.flush(&abort).await {
                tracing::debug!(request_id = self.job.info.request_id, "client is gone or stuck");
                self.on(Happened::ClientLeft);
            }
        }
        self.record.observe(&self.job, &self.texts, &self.metrics);
    }

    fn on(&mut self, happened: Happened) {
        match happened {
            Happened::FromDecoder { choice, attempt, message } => {
                self.on_message(choice, attempt, message);
            }
            Happened::Encoded(encoded) => self.on_encoded(encoded),
            Happened::LookForEncoder { item, avoid } => {
                if let Some(input) = self.encode(item, avoid) {
                    self.feed(input);
                }
            }
            Happened::Tick => self.feed(Input::Tick),
            Happened::ClientLeft => {
                self.record.cancelled = true;
                self.feed(Input::Cancel);
            }
            Happened::Shutdown => {
                self.record.shut_down = true;
                self.feed(Input::Cancel);
            }
        }
    }

    fn on_message(
        &mut self,
        choice: u32,
        attempt: Attempt,
        message: Result<pb::GenerateResponse, Broken>,
    ) {
        use pb::generate_response::Message;
        let events = message.and_then(|message| {
            if self.record.note(choice, &message)
                && let Some(stream) = &self.attempts[choice as usize]
            {
                self.upstream.call_ok(stream.instance);
            }
            if let Some(Message::PromptLogprobs(piece)) = &message.message
                && choice == 0
            {
                self.on_prompt_logprobs(piece);
            }
            attempt::events(choice, message)
        });
        match events {
            Ok(events) => events.into_iter().for_each(|event| self.feed(event)),
            Err(Broken { failure, speaks_against }) => {
                self.metrics.on_attempt(failure_label(&failure));
                let stream = self.attempts[choice as usize].take();
                if let Some(stream) = stream.filter(|_| speaks_against) {
                    self.upstream.call_failed(stream.instance);
                }
                self.feed(Input::AttemptFailed { choice, attempt, failure });
            }
        }
    }

    fn on_encoded(&mut self, encoded: Encoded) {
        let Encoded { item, endpoint, took, result } = encoded;
        self.record.on_encode_end();
        match result {
            Ok(embedding) => {
                self.metrics
                    .on_encode(if embedding.cache_hit { "cached" } else { "encoded" }, took);
                self.record.on_encoded(item, embedding.cache_hit);
                self.feed(Input::Encoded { item, endpoint, key: embedding.key });
            }
            Err(failure) => {
                self.metrics.on_encode("failed", took);
                let request_id = &self.job.info.request_id;
                tracing::warn!(
                    request_id,
                    item,
                    endpoint,
                    error = failure.detail,
                    "encoding failed"
                );
                let (retryable, detail) = (failure.retryable, failure.detail);
                let endpoint = Some(endpoint);
                self.feed(Input::EncodeFailed { item, endpoint, retryable, detail });
            }
        }
    }

    /// Gives the machine an event and does all that follows from it.
    fn feed(&mut self, event: Input) {
        self.todo.extend(self.machine.on(event, clock::now()));
        while let Some(action) = self.todo.pop_front() {
            if let Some(event) = self.perform(action) {
                self.todo.extend(self.machine.on(event, clock::now()));
            }
        }
    }

    /// Sends what is ready. False if the client is gone or reads nothing for too long.
    async fn flush(&mut self, abort: &CancellationToken) -> bool {
        if self.record.is_accepted()
            && let Some(accepted) = self.accepted.take()
        {
            // Whoever waited has left if this fails; the closed channel will say so.
            let _ = accepted.send(Ok(()));
        }
        self.record.on_flush(&self.ready, &self.metrics);
        let error = self.record.error.take().map(Err);
        for event in self.ready.drain(..).map(Ok).chain(error) {
            let event = match self.out.try_send(event) {
                Ok(()) => continue,
                Err(mpsc::error::TrySendError::Closed(_)) => return false,
                Err(mpsc::error::TrySendError::Full(event)) => event,
            };
            let sent = tokio::select! {
                sent = tokio::time::timeout(self.job.client_stall, self.out.send(event)) => sent,
                () = abort.cancelled() => return false,
            };
            if !matches!(sent, Ok(Ok(()))) {
                return false;
            }
        }
        true
    }
}

fn instant_of(at: Option<Duration>) -> Instant {
    let wait = at.map_or(MAX_SLEEP, |at| at.saturating_sub(clock::now()));
    Instant::now() + wait.min(MAX_SLEEP)
}

/// The next message of any attempt.
async fn next_message(attempts: &mut [Option<AttemptStream>]) -> Happened {
    poll_fn(|cx: &mut Context<'_>| {
        for (choice, slot) in attempts.iter_mut().enumerate() {
            let Some(stream) = slot else { continue };
            if let Poll::Ready(message) = stream.poll_message(cx) {
                let (choice, attempt) = (choice as u32, stream.attempt);
                return Poll::Ready(Happened::FromDecoder { choice, attempt, message });
            }
        }
        Poll::Pending
    })
    .await
}

fn failure_label(failure: &AttemptFailure) -> &'static str {
    match failure {
        AttemptFailure::Lost { .. } => "lost",
        AttemptFailure::Refused { .. } => "refused",
        AttemptFailure::Overloaded { .. } => "overloaded",
        AttemptFailure::Rejected { .. } => "rejected",
    }
}
