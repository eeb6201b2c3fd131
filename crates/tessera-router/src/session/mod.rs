//! Runs one request: carries events into [`RequestSession`], does what it says, and speaks to the client
//! through a bounded channel. One task per request; when the channel is full the decoder's stream is not
//! read, so a slow client slows its own sequence and nothing else.
//!
//! Modules: `attempt` (streams to decoders), `encode` (calls to encoders), `text` (what a choice says),
//! `outcome` (usage, timings, errors).

mod attempt;
mod encode;
mod outcome;
mod text;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tessera_cluster::request::{
    Action, AttemptFailure, Event as Input, MediaItem, SessionError, SessionSpec, Target,
};
use tessera_cluster::{ModelIdentity, RequestSession, SessionConfig};
use tessera_processor::StopMatcher;
use tessera_proto::decoder::v1 as pb;
use tessera_types::{Attempt, EmbeddingKey, FinishReason, TokenId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admission::{HeldBytes, Place};
use crate::clock;
use crate::error::RequestError;
use crate::events::{ChoiceFinish, Delta, Event, OutputToken, PromptInfo};
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::prepare::Prepared;
use crate::upstream::{GroupQuery, Upstream};
use attempt::{AttemptStream, Broken};
use encode::Encoded;
use outcome::{Record, request_error};
use text::{ChoiceText, ends_choice};

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
    /// Effective seed of the request.
    pub(crate) seed: u64,
    /// Whether deltas carry tokens.
    pub(crate) wants_tokens: bool,
    pub(crate) arrival: Instant,
    pub(crate) deadline: Instant,
    pub(crate) client_stall: Duration,
    pub(crate) encode_timeout: Duration,
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
            ChoiceText::new(detokenizer, job.stop.clone(), job.wants_tokens)
        };
        Self {
            machine: RequestSession::new(config, spec),
            todo: VecDeque::new(),
            attempts: (0..job.num_choices).map(|_| None).collect(),
            texts: (0..job.num_choices).map(text).collect(),
            encodes: FuturesUnordered::new(),
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
            let Self { attempts, encodes, .. } = &mut self;
            let happened = tokio::select! {
                biased;
                () = &mut closed => Happened::ClientLeft,
                happened = next_message(attempts) => happened,
                Some(encoded) = encodes.next() => Happened::Encoded(encoded),
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
        let events = message.and_then(|message| {
            if self.record.note(choice, &message)
                && let Some(stream) = &self.attempts[choice as usize]
            {
                self.upstream.call_ok(stream.instance);
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

    /// Does one thing; what it leads to at once is returned.
    fn perform(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Place { choice, avoid, prefer } => {
                let home = self.home.clone().filter(|_| avoid.is_empty());
                let placed = home.map_or_else(|| self.place(&avoid, prefer), Ok);
                Some(match placed {
                    Ok(target) => Input::Placed { choice, target },
                    Err(detail) => Input::NoPlace { choice, detail, retry_after: None },
                })
            }
            Action::OpenAttempt { choice, attempt, target, output, seed } => {
                self.open(choice, attempt, target, output, seed)
            }
            Action::CloseAttempt { choice, .. } => {
                if self.attempts[choice as usize].take().is_some() {
                    self.metrics.on_attempt("closed");
                }
                None
            }
            Action::Encode { item, avoid } => self.encode(item, &avoid),
            Action::SendMediaAt { choice, attempt, item, endpoint, key } => {
                self.send_media_at(choice, attempt, item, endpoint, key)
            }
            Action::Deliver { choice, record, .. } => {
                self.deliver(choice, OutputToken { id: record.token, logprobs: record.logprobs })
            }
            Action::Finish { choice, reason } => {
                self.finish(choice, reason);
                None
            }
            Action::Complete => {
                self.complete();
                None
            }
            Action::Fail { error } => {
                self.fail(error);
                None
            }
        }
    }

    fn place(
        &mut self,
        avoid: &[(tessera_cluster::GroupName, tessera_types::Epoch)],
        prefer: Option<tessera_types::NumericsId>,
    ) -> Result<Target, String> {
        let prepared = &self.job.prepared;
        let target = self.upstream.choose_group(&GroupQuery {
            identity: &self.job.identity,
            prompt_tokens: prepared.prompt.tokens.len() as u32,
            max_tokens: prepared.sampling.max_tokens,
            avoid,
            prefer,
        })?;
        self.home = Some(target.clone());
        Ok(target)
    }

    fn open(
        &mut self,
        choice: u32,
        attempt: Attempt,
        target: Target,
        output: Vec<TokenId>,
        seed: u64,
    ) -> Option<Input> {
        self.record.on_placed();
        let channel = match self.upstream.channel(&target.address) {
            Ok(channel) => channel,
            Err(error) => {
                let failure = AttemptFailure::Refused { detail: error.to_string() };
                return Some(Input::AttemptFailed { choice, attempt, failure });
            }
        };
        let Job { info, prepared, arrival, deadline, .. } = &self.job;
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let start = pb::Start {
            fence: Some(self.upstream.fence(&target)),
            request_id: info.request_id.clone(),
            attempt: attempt.0,
            choice,
            prompt: Some((&*prepared.prompt).into()),
            output_token_ids: output,
            sampling: Some((&*prepared.sampling).into()),
            effective_seed: seed,
            priority: 0,
            // 0 would mean "no deadline".
            remaining_ms: millis(deadline.saturating_duration_since(Instant::now())).max(1),
            age_ms: millis(arrival.elapsed()),
        };
        let stream = AttemptStream::open(channel, attempt, &target, start);
        self.attempts[choice as usize] = Some(stream);
        None
    }

    fn encode(&mut self, item: u32, avoid: &[String]) -> Option<Input> {
        let media = &self.job.prepared.media[item as usize];
        let key = self.job.prepared.prompt.media[item as usize].embedding_key;
        let (media_id, identity) = (media.description.media_id, &self.job.identity);
        let chosen = self.upstream.choose_encoder(media_id, media.num_pixels, identity, avoid);
        let choice = match chosen {
            Ok(choice) => choice,
            Err(detail) => {
                return Some(Input::EncodeFailed { item, endpoint: None, retryable: true, detail });
            }
        };
        self.record.on_encode_begin();
        let header = encode::header(&self.job.info.request_id, media, key);
        let frames = media.frames.clone();
        let timeout = self.job.encode_timeout;
        let call = encode::encode(self.upstream.clone(), choice, header, frames, item, timeout);
        self.encodes.push(Box::pin(call));
        None
    }

    fn send_media_at(
        &mut self,
        choice: u32,
        attempt: Attempt,
        item: u32,
        endpoint: String,
        key: EmbeddingKey,
    ) -> Option<Input> {
        let stream = self.attempts[choice as usize].as_ref()?;
        if stream.send_media_at(item, endpoint, key).is_ok() {
            return None;
        }
        self.attempts[choice as usize] = None;
        let failure = AttemptFailure::Lost { detail: "the decoder does not read".to_owned() };
        Some(Input::AttemptFailed { choice, attempt, failure })
    }

    /// A token that counts: speaks what becomes certain, and ends the choice at a stop string.
    fn deliver(&mut self, choice: u32, token: OutputToken) -> Option<Input> {
        self.record.on_token();
        let eos = self.model.processor().eos_token_ids();
        let is_silent = ends_choice(token.id, &self.job.prepared.sampling, eos);
        self.record.last_token[choice as usize] = Some(token.id);
        let spoken = self.texts[choice as usize].push(token, is_silent);
        self.speak(choice, spoken.text, spoken.tokens);
        let matched = spoken.matched?;
        self.record.matched_stop[choice as usize] = Some(matched);
        Some(Input::StopChoice { choice, reason: FinishReason::StopString })
    }

    fn speak(&mut self, choice: u32, text: String, tokens: Vec<OutputToken>) {
        if text.is_empty() && tokens.is_empty() {
            return;
        }
        match self.ready.last_mut() {
            Some(Event::Delta(last)) if last.choice == choice => {
                last.text.push_str(&text);
                last.tokens.extend(tokens);
            }
            _ => self.ready.push(Event::Delta(Delta { choice, text, tokens })),
        }
    }

    fn finish(&mut self, choice: u32, mut reason: FinishReason) {
        let index = choice as usize;
        if self.attempts[index].take().is_some() {
            self.metrics.on_attempt("finished");
        }
        if self.record.cancelled || self.record.shut_down {
            return;
        }
        if reason != FinishReason::StopString {
            let spoken = self.texts[index].finish();
            self.speak(choice, spoken.text, spoken.tokens);
            if let Some(matched) = spoken.matched {
                self.record.matched_stop[index] = Some(matched);
                reason = FinishReason::StopString;
            }
        }
        let matched = self.record.matched_stop[index];
        self.ready.push(Event::Finish(ChoiceFinish {
            choice,
            reason,
            matched_stop: matched.map(|stop| self.job.stop_strings[stop].clone()),
            stop_token: self.record.last_token[index].filter(|_| reason == FinishReason::StopToken),
        }));
    }

    fn complete(&mut self) {
        if self.record.cancelled {
            return;
        }
        if self.record.shut_down {
            let retry_after = self.job.retry_after;
            return self.end(Err(RequestError::Draining { retry_after }));
        }
        let completion = self.record.completion(&self.job, &self.texts);
        self.end(Ok(Event::Completion(completion)));
    }

    fn fail(&mut self, error: SessionError) {
        let error = request_error(error, &self.job.prepared);
        let request_id = &self.job.info.request_id;
        tracing::warn!(request_id, error = error.message(), "request failed");
        self.record.on_failed();
        self.end(Err(error));
    }

    /// The last word. Before acceptance it is the answer to whoever waits for that.
    fn end(&mut self, last: Result<Event, RequestError>) {
        match last {
            Ok(event) => self.ready.push(event),
            Err(error) => match self.accepted.take() {
                Some(accepted) => drop(accepted.send(Err(error))),
                None => self.record.error = Some(error),
            },
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
