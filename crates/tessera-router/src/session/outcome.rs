//! What a request was like: usage, timings, media, metrics, and how it failed.

use std::time::Duration;

use tessera_cluster::request::SessionError;
use tessera_proto::ErrorReason;
use tessera_proto::decoder::v1 as pb;
use tessera_types::TokenId;
use tokio::time::Instant;

use super::Job;
use super::text::ChoiceText;
use crate::error::RequestError;
use crate::events::{Completion, Event, Timings, Usage};
use crate::metrics::Metrics;
use crate::prepare::Prepared;

/// Notes taken while a request runs.
pub(super) struct Record {
    pub(super) cancelled: bool,
    pub(super) shut_down: bool,
    /// The last word of a failed request, to be sent.
    pub(super) error: Option<RequestError>,
    /// By choice: index of the stop string that ended it.
    pub(super) matched_stop: Vec<Option<usize>>,
    /// By choice.
    pub(super) last_token: Vec<Option<TokenId>>,
    /// Prompt token whose log probabilities the client gets next.
    pub(super) next_prompt_logprob: u32,
    accepted: bool,
    failed: bool,
    placed_at: Option<Instant>,
    first_token_at: Option<Instant>,
    encode_begun: Option<Instant>,
    encode_ended: Option<Instant>,
    /// By item: whether an encoder had it; `None` if no encoder was asked, since a prefix had it.
    cache_hits: Vec<Option<bool>>,
    /// Of the first choice; the others find its prefix.
    num_cached_tokens: u32,
    /// By choice: when its last delta was sent.
    last_delta: Vec<Option<Instant>>,
}

impl Record {
    pub(super) fn new(job: &Job) -> Self {
        let num_choices = job.num_choices as usize;
        Self {
            cancelled: false,
            shut_down: false,
            error: None,
            matched_stop: vec![None; num_choices],
            last_token: vec![None; num_choices],
            next_prompt_logprob: 1,
            accepted: false,
            failed: false,
            placed_at: None,
            first_token_at: None,
            encode_begun: None,
            encode_ended: None,
            cache_hits: vec![None; job.prepared.media.len()],
            num_cached_tokens: 0,
            last_delta: vec![None; num_choices],
        }
    }

    /// A decoder has taken the request.
    pub(super) fn is_accepted(&self) -> bool {
        self.accepted
    }

    /// Notes what the machine has no use for. True for the decoder's acceptance.
    pub(super) fn note(&mut self, choice: u32, message: &pb::GenerateResponse) -> bool {
        use pb::generate_response::Message;
        let num_cached_tokens = match &message.message {
            Some(Message::Accepted(accepted)) => Some(accepted.num_cached_tokens),
            Some(Message::Finished(finished)) => Some(finished.num_cached_tokens),
            Some(Message::Tokens(_) | Message::PromptLogprobs(_)) => None,
            Some(Message::MediaNeeded(_)) | None => return false,
        };
        self.accepted = true;
        if let (0, Some(cached)) = (choice, num_cached_tokens) {
            self.num_cached_tokens = cached;
        }
        matches!(&message.message, Some(Message::Accepted(_)))
    }

    pub(super) fn on_placed(&mut self) {
        self.placed_at.get_or_insert_with(Instant::now);
    }

    pub(super) fn on_token(&mut self) {
        self.first_token_at.get_or_insert_with(Instant::now);
    }

    pub(super) fn on_encode_begin(&mut self) {
        self.encode_begun.get_or_insert_with(Instant::now);
    }

    pub(super) fn on_encode_end(&mut self) {
        self.encode_ended = Some(Instant::now());
    }

    /// An item counts as found only if no encoder ever had to work for it.
    pub(super) fn on_encoded(&mut self, item: u32, cache_hit: bool) {
        let hit = &mut self.cache_hits[item as usize];
        *hit = Some(hit.unwrap_or(true) && cache_hit);
    }

    pub(super) fn on_failed(&mut self) {
        self.failed = true;
    }

    /// Deltas are about to be sent.
    pub(super) fn on_flush(&mut self, events: &[Event], metrics: &Metrics) {
        let now = Instant::now();
        for event in events {
            let Event::Delta(delta) = event else { continue };
            if let Some(last) = self.last_delta[delta.choice as usize].replace(now) {
                metrics.inter_token_seconds.observe((now - last).as_secs_f64());
            }
        }
    }

    pub(super) fn completion(&self, job: &Job, texts: &[ChoiceText]) -> Completion {
        let mut media = job.info.media.clone();
        for (info, hit) in media.iter_mut().zip(&self.cache_hits) {
            info.cache_hit = hit.unwrap_or(true);
        }
        Completion { usage: self.usage(job, texts), timings: self.timings(job), media }
    }

    fn usage(&self, job: &Job, texts: &[ChoiceText]) -> Usage {
        let num_prompt_tokens = job.prepared.prompt.tokens.len() as u32;
        Usage {
            num_prompt_tokens,
            num_cached_tokens: self.num_cached_tokens.min(num_prompt_tokens),
            num_output_tokens: texts.iter().map(ChoiceText::num_tokens).sum(),
            num_media_tokens: job.prepared.num_media_tokens(),
        }
    }

    fn timings(&self, job: &Job) -> Timings {
        let since_arrival = |at: Option<Instant>| at.map_or(0.0, |at| millis(at - job.arrival));
        let encode = self.encode_begun.zip(self.encode_ended);
        Timings {
            prepare_ms: since_arrival(self.placed_at),
            encode_ms: encode.map_or(0.0, |(begun, ended)| millis(ended - begun)),
            first_token_ms: since_arrival(self.first_token_at),
            total_ms: millis(job.arrival.elapsed()),
        }
    }

    /// Counts a request that is over.
    pub(super) fn observe(&self, job: &Job, texts: &[ChoiceText], metrics: &Metrics) {
        let seconds = |at: Instant| (at - job.arrival).as_secs_f64();
        if let Some(placed) = self.placed_at {
            metrics.prepare_seconds.observe(seconds(placed));
        }
        if let Some(first_token) = self.first_token_at {
            metrics.first_token_seconds.observe(seconds(first_token));
        }
        let usage = self.usage(job, texts);
        metrics.prompt_tokens_total.inc_by(usage.num_prompt_tokens.into());
        metrics.cached_tokens_total.inc_by(usage.num_cached_tokens.into());
        metrics.output_tokens_total.inc_by(usage.num_output_tokens.into());
        for media in &job.prepared.media {
            metrics.media_pixels.observe(media.num_pixels as f64);
        }
        if !self.failed && !self.cancelled && !self.shut_down {
            metrics.generation_seconds.observe(job.arrival.elapsed().as_secs_f64());
            metrics.prompt_tokens.observe(usage.num_prompt_tokens.into());
            metrics.output_tokens.observe(usage.num_output_tokens.into());
        }
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What the machine's verdict is to a client.
pub(super) fn request_error(error: SessionError, prepared: &Prepared) -> RequestError {
    match error {
        SessionError::GroupLost { detail, retry_after } => {
            RequestError::GroupLost { detail, retry_after }
        }
        SessionError::NoPlace { detail, retry_after } => {
            RequestError::NotReady { detail, retry_after }
        }
        SessionError::Overloaded { retry_after } => {
            RequestError::Busy { detail: "every decoder group is full".to_owned(), retry_after }
        }
        SessionError::Rejected { reason, field, detail } => {
            let reason = ErrorReason::from_name(&reason).unwrap_or(ErrorReason::Internal);
            let field = match field.as_str() {
                // The decoder does not know where the client put it.
                "grammar" => prepared.grammar_field.clone(),
                _ => field,
            };
            RequestError::Rejected { reason, field, detail }
        }
        SessionError::MediaRejected { item, detail } => RequestError::MediaRefused {
            field: prepared
                .media
                .get(item as usize)
                .map_or_else(|| "messages".to_owned(), |media| media.field.clone()),
            detail,
        },
        SessionError::MediaUnavailable { item, detail, retry_after } => {
            RequestError::EncoderFailed { item, detail, retry_after }
        }
        SessionError::DeadlineExceeded => RequestError::DeadlineExceeded,
    }
}
