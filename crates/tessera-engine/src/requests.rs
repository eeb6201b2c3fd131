//! The engine's side of every sequence: admission, media, events.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_scheduler::{SequenceEvent, SequenceRequest};
use tessera_types::{EmbeddingKey, Prompt, SequenceId};

use crate::canary::{Canary, CanaryReply, CanarySink};
use crate::constraints::sampling_of_ranks;
use crate::engine::Engine;
use crate::error::{ExecutorError, SequenceError};
use crate::handle::Submission;
use crate::stream::{Event, EventSink, SinkError, Timings};

/// Arrivals count from here, so that a request older than the engine still precedes its first.
const ARRIVAL_ORIGIN_US: u64 = 1 << 48;

/// A sequence that the engine knows.
pub(crate) struct Stream {
    sink: Box<dyn EventSink>,
    prompt: Arc<Prompt>,
    submitted: Instant,
    timings: Timings,
    has_token: bool,
    /// Embeddings that it holds or has reserved.
    pinned: Vec<EmbeddingKey>,
    /// Items that the scheduler wants, while there is no room for their embeddings.
    postponed: Vec<u32>,
    /// What keeps it in the queue.
    awaits_room: bool,
    awaits_grammar: bool,
}

impl Stream {
    fn new(sink: Box<dyn EventSink>, prompt: Arc<Prompt>, submitted: Instant) -> Self {
        Self {
            sink,
            prompt,
            submitted,
            timings: Timings::default(),
            has_token: false,
            pinned: Vec::new(),
            postponed: Vec::new(),
            awaits_room: false,
            awaits_grammar: false,
        }
    }

    fn key_of(&self, item: u32) -> Option<EmbeddingKey> {
        let span = self.prompt.media.iter().find(|span| span.item == item)?;
        Some(span.embedding_key)
    }
}

impl Engine {
    /// Takes a sequence, or fails it with a typed reason.
    pub(crate) fn submit(
        &mut self,
        sequence: SequenceId,
        submission: Submission,
        mut sink: Box<dyn EventSink>,
    ) {
        let prompt = Arc::clone(&submission.prompt);
        let grammar = submission.sampling.grammar.clone();
        let output = submission.output.clone();
        let checked = self.check(&prompt);
        let checked = checked.and_then(|()| self.check_grammar(&submission.sampling));
        let request = self.request(sequence, submission);
        let added = checked.and_then(|()| self.scheduler.add(request).map_err(SequenceError::from));
        if let Err(error) = added {
            // There is no stream yet; whether the client hears of it is its own affair.
            let _ = sink.send(Event::Failed { error });
            return;
        }
        self.streams.insert(sequence, Stream::new(sink, prompt, (self.clock)()));
        if let Some(epoch) = self.scheduler.epoch() {
            self.send(sequence, Event::Accepted { epoch });
        }
        if !self.items(sequence).is_empty() {
            self.hold(sequence, |stream| stream.awaits_room = true);
            self.waiting_for_room.push_back(sequence);
        }
        if let Some(grammar) = grammar {
            self.constrain(sequence, grammar, output);
        }
    }

    /// Changes what a queued sequence waits for; it may run once that is nothing.
    fn hold(&mut self, sequence: SequenceId, change: impl FnOnce(&mut Stream)) {
        let Some(stream) = self.streams.get_mut(&sequence) else { return };
        change(stream);
        self.scheduler.set_held(sequence, stream.awaits_room || stream.awaits_grammar);
    }

    pub(crate) fn hold_for_grammar(&mut self, sequence: SequenceId, awaits: bool) {
        self.hold(sequence, |stream| stream.awaits_grammar = awaits);
    }

    /// Runs the canary as a sequence of its own.
    pub(crate) fn start_canary(&mut self, sequence: SequenceId, reply: CanaryReply) {
        let mut sink = CanarySink::new(reply);
        let request = Canary::request(sequence, &self.config.scheduler, self.config.vocab_size);
        let prompt = Arc::clone(&request.prompt);
        match self.scheduler.add(request) {
            Err(error) => drop(sink.send(Event::Failed { error: error.into() })),
            Ok(()) => {
                let stream = Stream::new(Box::new(sink), prompt, (self.clock)());
                self.streams.insert(sequence, stream);
            }
        }
    }

    /// An embedding arrived: it goes to rank 0 and to every sequence that waits for it.
    pub(crate) fn media_arrived(
        &mut self,
        sequence: SequenceId,
        item: u32,
        rows: Arc<[f32]>,
    ) -> Result<(), ExecutorError> {
        // The sequence may have ended, or the item was never asked for.
        let Some(stream) = self.streams.get(&sequence) else { return Ok(()) };
        let Some(span) = stream.prompt.media.iter().find(|span| span.item == item) else {
            return Ok(());
        };
        let key = span.embedding_key;
        let expected = u64::from(span.num_tokens) * u64::from(self.config.hidden_size);
        let got = rows.len() as u64;
        if got != expected {
            self.end_with_error(sequence, SequenceError::EmbeddingShape { item, expected, got });
            return Ok(());
        }
        if !stream.pinned.contains(&key) || !self.embeddings.arrived(key) {
            return Ok(());
        }
        self.executor.install_embedding(key, rows)?;
        for (&sequence, stream) in
            self.streams.iter().filter(|(_, stream)| stream.pinned.contains(&key))
        {
            let spans = stream.prompt.media.iter().filter(|span| span.embedding_key == key);
            for span in spans {
                self.scheduler.media_arrived(sequence, span.item);
            }
        }
        Ok(())
    }

    /// Ends a sequence with an error instead of a finish reason.
    pub(crate) fn end_with_error(&mut self, sequence: SequenceId, error: SequenceError) {
        self.scheduler.remove(sequence);
        self.fail(sequence, error);
    }

    /// Tells a sequence, which the scheduler does not know any more, that it failed.
    pub(crate) fn fail(&mut self, sequence: SequenceId, error: SequenceError) {
        self.send(sequence, Event::Failed { error });
        self.forget(sequence);
    }

    /// Hands the scheduler's events to their streams. Returns whether there were any.
    pub(crate) fn report(&mut self) -> bool {
        let events = self.scheduler.take_events();
        let any = !events.is_empty();
        events.into_iter().for_each(|event| self.report_one(event));
        any
    }

    fn report_one(&mut self, event: SequenceEvent) {
        match event {
            SequenceEvent::MediaNeeded { sequence, items } => self.need_media(sequence, items),
            SequenceEvent::Admitted { sequence, num_cached_tokens } => {
                self.note_time(sequence, |timings, elapsed| timings.queue = elapsed);
                self.send(sequence, Event::Started { num_cached_tokens: num_cached_tokens as u32 });
            }
            SequenceEvent::PromptLogprobs { sequence, first_token, tokens } => {
                self.send(sequence, Event::PromptLogprobs { first_token, tokens });
            }
            SequenceEvent::Token { sequence, output_index, token, logprobs } => {
                let first = self.streams.get_mut(&sequence);
                if first.is_some_and(|stream| !std::mem::replace(&mut stream.has_token, true)) {
                    self.note_time(sequence, |timings, elapsed| timings.prefill = elapsed);
                }
                self.send(sequence, Event::Token { output_index, token, logprobs });
            }
            SequenceEvent::Finished { sequence, reason, num_output_tokens, num_cached_tokens } => {
                let timings = self.streams.get(&sequence).map(|stream| stream.timings);
                let timings = timings.unwrap_or_default();
                let event =
                    Event::Finished { reason, num_output_tokens, num_cached_tokens, timings };
                self.send(sequence, event);
                self.forget(sequence);
            }
        }
    }

    /// Delivers an event. A client that does not take it loses its sequence.
    fn send(&mut self, sequence: SequenceId, event: Event) {
        let Some(stream) = self.streams.get_mut(&sequence) else { return };
        let Err(error) = stream.sink.send(event) else { return };
        tracing::debug!(sequence = sequence.0, %error, "event not taken, sequence dropped");
        self.num_slow_clients += u64::from(error == SinkError::Full);
        self.scheduler.remove(sequence);
        self.forget(sequence);
    }

    /// Drops a stream and what it holds.
    fn forget(&mut self, sequence: SequenceId) {
        let Some(stream) = self.streams.remove(&sequence) else { return };
        stream.pinned.into_iter().for_each(|key| self.embeddings.unpin(key));
        self.constraints.forget(sequence);
        self.waiting_for_room.retain(|&waiting| waiting != sequence);
    }

    /// Asks for embeddings that are not here; those that are count as arrived.
    fn need_media(&mut self, sequence: SequenceId, items: Vec<u32>) {
        let Some(stream) = self.streams.get_mut(&sequence) else { return };
        if stream.pinned.is_empty() {
            stream.postponed.extend(items);
            return;
        }
        let key_of = |item: &u32| stream.key_of(*item);
        let is_here = |item: &u32| key_of(item).is_some_and(|key| self.embeddings.is_present(key));
        let (here, missing): (Vec<u32>, Vec<u32>) = items.into_iter().partition(is_here);
        for item in here {
            self.scheduler.media_arrived(sequence, item);
        }
        if !missing.is_empty() {
            self.send(sequence, Event::MediaNeeded { items: missing });
        }
    }

    /// Lets sequences in whose embeddings find room, in the order they came.
    pub(crate) fn grant_room(&mut self) -> Result<(), ExecutorError> {
        while let Some(&sequence) = self.waiting_for_room.front() {
            let items = self.items(sequence);
            let bytes: u64 = items.iter().map(|(_, bytes)| bytes).sum();
            let max_bytes = self.embeddings.max_bytes();
            if bytes > max_bytes {
                self.end_with_error(
                    sequence,
                    SequenceError::EmbeddingsTooLarge { bytes, max_bytes },
                );
                continue;
            }
            let Some(evicted) = self.embeddings.reserve(&items) else { return Ok(()) };
            self.waiting_for_room.pop_front();
            evicted.into_iter().try_for_each(|key| self.executor.drop_embedding(key))?;
            self.hold(sequence, |stream| stream.awaits_room = false);
            let stream = self.streams.get_mut(&sequence).expect("waiting sequences have a stream");
            stream.pinned = items.into_iter().map(|(key, _)| key).collect();
            let postponed = std::mem::take(&mut stream.postponed);
            self.need_media(sequence, postponed);
        }
        Ok(())
    }

    /// Distinct embeddings of a sequence with their bytes.
    fn items(&self, sequence: SequenceId) -> Vec<(EmbeddingKey, u64)> {
        let Some(stream) = self.streams.get(&sequence) else { return Vec::new() };
        let mut seen = BTreeSet::new();
        let spans = stream.prompt.media.iter().filter(|span| seen.insert(span.embedding_key));
        spans
            .map(|span| (span.embedding_key, self.config.embedding_bytes(span.num_tokens)))
            .collect()
    }

    /// Checks what the scheduler does not know.
    fn check(&self, prompt: &Prompt) -> Result<(), SequenceError> {
        let vocab_size = self.config.vocab_size;
        let mut tokens = prompt.tokens.iter().enumerate();
        match tokens.find(|(_, token)| **token >= vocab_size) {
            None => Ok(()),
            Some((index, &token)) => Err(SequenceError::UnknownToken { token, index, vocab_size }),
        }
    }

    fn request(&self, sequence: SequenceId, submission: Submission) -> SequenceRequest {
        let age_us = submission.age.as_micros() as u64;
        let elapsed = (self.clock)().saturating_duration_since(self.started);
        let now_us = ARRIVAL_ORIGIN_US + elapsed.as_micros() as u64;
        SequenceRequest {
            sequence,
            prompt: submission.prompt,
            sampling: sampling_of_ranks(submission.sampling, &submission.output),
            output: submission.output,
            eos_token_ids: Arc::clone(&self.eos_token_ids),
            seed: submission.seed,
            priority: submission.priority,
            tenant: submission.tenant,
            arrival: now_us.saturating_sub(age_us),
            block_keys: submission.block_keys,
            use_reserve: false,
        }
    }

    fn note_time(&mut self, sequence: SequenceId, note: impl FnOnce(&mut Timings, Duration)) {
        let now = (self.clock)();
        if let Some(stream) = self.streams.get_mut(&sequence) {
            note(&mut stream.timings, now.saturating_duration_since(stream.submitted));
        }
    }
}
