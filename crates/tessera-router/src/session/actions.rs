//! What the machine tells a session to do.

use std::time::Duration;

use tessera_cluster::GroupName;
use tessera_cluster::request::{Action, AttemptFailure, Event as Input, SessionError, Target};
use tessera_proto::ErrorReason;
use tessera_proto::decoder::v1 as pb;
use tessera_types::{Attempt, EmbeddingKey, Epoch, FinishReason, NumericsId, TokenId};
use tokio::time::Instant;

use super::attempt::AttemptStream;
use super::outcome::request_error;
use super::text::{Spoken, ends_choice};
use super::{Job, Session, encode};
use crate::error::RequestError;
use crate::events::{ChoiceFinish, Delta, Event, OutputToken, PromptLogprobs, push_call};
use crate::upstream::{GroupQuery, NoEncoder};

/// How often an item that waits for an encoder looks for one.
const ENCODER_POLL: Duration = Duration::from_millis(50);

impl Session {
    /// Does one thing; what it leads to at once is returned.
    pub(super) fn perform(&mut self, action: Action) -> Option<Input> {
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
            Action::Encode { item, avoid } => self.encode(item, avoid),
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
        avoid: &[(GroupName, Epoch)],
        prefer: Option<NumericsId>,
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
        // Choices share the prompt, so the first one's log probabilities are everyone's.
        let mut sampling = pb::Sampling::from(&*prepared.sampling);
        sampling.prompt_logprobs = sampling.prompt_logprobs.filter(|_| choice == 0);
        let start = pb::Start {
            fence: Some(self.upstream.fence(&target)),
            request_id: info.request_id.clone(),
            attempt: attempt.0,
            choice,
            prompt: Some((&*prepared.prompt).into()),
            output_token_ids: output,
            sampling: Some(sampling),
            effective_seed: seed,
            // Clients count as vLLM does, lower first.
            priority: -self.job.priority,
            tenant: self.job.tenant.0,
            // 0 would mean "no deadline".
            remaining_ms: millis(deadline.saturating_duration_since(Instant::now())).max(1),
            age_ms: millis(arrival.elapsed()),
        };
        let stream = AttemptStream::open(channel, attempt, &target, start);
        self.attempts[choice as usize] = Some(stream);
        None
    }

    /// Has an item encoded. Where only encoders that failed it are known, or none, it waits a little for
    /// another: encoders are restarted, and then have a new address.
    pub(super) fn encode(&mut self, item: u32, avoid: Vec<String>) -> Option<Input> {
        let media = &self.job.prepared.media[item as usize];
        let key = self.job.prepared.prompt.media[item as usize].embedding_key;
        let (media_id, identity) = (media.description.media_id, &self.job.identity);
        let chosen = self.upstream.choose_encoder(media_id, media.num_pixels, identity, &avoid);
        let is_last_resort = match &chosen {
            Ok(choice) => avoid.contains(&choice.address),
            // After a failure the next one may be known and not yet serve.
            Err(missing) => missing.is_unknown || (missing.retryable && !avoid.is_empty()),
        };
        let first_deadline = Instant::now() + self.job.encoder_wait;
        if is_last_resort
            && Instant::now() < *self.encoder_deadlines.entry(item).or_insert(first_deadline)
        {
            let wait = async move {
                tokio::time::sleep(ENCODER_POLL).await;
                (item, avoid)
            };
            self.encoder_waits.push(Box::pin(wait));
            return None;
        }
        let choice = match chosen {
            Ok(choice) => choice,
            Err(NoEncoder { retryable, detail, .. }) => {
                let detail = detail.to_owned();
                return Some(Input::EncodeFailed { item, endpoint: None, retryable, detail });
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
        let reason = match (spoken.matched, spoken.calls_are_over) {
            (Some(matched), _) => {
                self.record.matched_stop[choice as usize] = Some(matched);
                Some(FinishReason::StopString)
            }
            (None, true) => Some(FinishReason::ToolCalls),
            (None, false) => None,
        };
        self.speak(choice, spoken);
        reason.map(|reason| Input::StopChoice { choice, reason })
    }

    fn speak(&mut self, choice: u32, spoken: Spoken) {
        let Spoken { text, tokens, tool_calls, .. } = spoken;
        if text.is_empty() && tokens.is_empty() && tool_calls.is_empty() {
            return;
        }
        match self.ready.last_mut() {
            Some(Event::Delta(last)) if last.choice == choice => {
                last.text.push_str(&text);
                last.tokens.extend(tokens);
                tool_calls.into_iter().for_each(|call| push_call(&mut last.tool_calls, call));
            }
            _ => self.ready.push(Event::Delta(Delta { choice, text, tokens, tool_calls })),
        }
    }

    /// A piece of the prompt's log probabilities. After a move they come again: what the client has is
    /// skipped.
    pub(super) fn on_prompt_logprobs(&mut self, piece: &pb::PromptLogprobs) {
        let next = self.record.next_prompt_logprob;
        let known = next.saturating_sub(piece.first_token) as usize;
        let tokens: Vec<_> = piece.tokens.iter().skip(known).map(Into::into).collect();
        // A gap would shift all that follows; the decoder sends none.
        if piece.first_token > next || tokens.is_empty() {
            return;
        }
        self.record.next_prompt_logprob += tokens.len() as u32;
        self.ready.push(Event::PromptLogprobs(PromptLogprobs { first_token: next, tokens }));
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
            let matched = spoken.matched;
            self.speak(choice, spoken);
            if matched.is_some() {
                self.record.matched_stop[index] = matched;
                reason = FinishReason::StopString;
            }
        }
        if self.texts[index].has_calls()
            && matches!(reason, FinishReason::EndOfSequence | FinishReason::StopToken)
        {
            reason = FinishReason::ToolCalls;
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
        match error.reason() {
            ErrorReason::GroupLost | ErrorReason::EncoderFailed | ErrorReason::Internal => {
                tracing::warn!(request_id, error = error.message(), "request failed");
            }
            _ => tracing::debug!(request_id, error = error.message(), "request failed"),
        }
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
}
