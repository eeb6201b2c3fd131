//! The body of a streamed reply: events become server-sent events as they come, many at once if many are
//! there, and a comment now and then while none are.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use bytes::Bytes;
use futures::stream;
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::chat_response::{ChunkWriter, write_error};
use super::error::{error_json, status_of};
use crate::error::RequestError;
use crate::events::{Event, Generation, PromptInfo};
use crate::metrics::CallGuard;
use crate::model::ServedModel;

/// Events put into one write.
const MAX_BATCH: usize = 64;

/// Ignored by clients, seen by proxies.
const KEEPALIVE: &[u8] = b": keep-alive\n\n";

/// How a stream is to look.
#[derive(Debug, Clone)]
pub(super) struct StreamOptions {
    pub(super) num_choices: u32,
    pub(super) include_usage: bool,
    pub(super) return_token_ids: bool,
    pub(super) keepalive: Duration,
}

struct State {
    events: mpsc::Receiver<Result<Event, RequestError>>,
    batch: Vec<Result<Event, RequestError>>,
    prompt: Arc<PromptInfo>,
    writer: ChunkWriter,
    model: Arc<ServedModel>,
    keepalive: Interval,
    call: CallGuard,
    /// What is written before the first event.
    start: Option<Vec<u8>>,
    is_over: bool,
}

/// The response whose body carries `generation`. Dropping the body cancels the request.
pub(super) fn stream_response(
    id: &str,
    generation: Generation,
    options: &StreamOptions,
    model: Arc<ServedModel>,
    call: CallGuard,
) -> Response<Body> {
    let Generation { prompt, events } = generation;
    let writer = ChunkWriter::new(id, &prompt, options.include_usage, options.return_token_ids);
    let mut start = Vec::new();
    writer.write_start(&prompt, options.num_choices, &mut start);
    let first_tick = Instant::now() + options.keepalive;
    let mut keepalive = tokio::time::interval_at(first_tick, options.keepalive);
    keepalive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let state = State {
        events,
        batch: Vec::with_capacity(MAX_BATCH),
        prompt,
        writer,
        model,
        keepalive,
        call,
        start: Some(start),
        is_over: false,
    };
    let body = stream::unfold(state, |mut state| async move {
        let bytes = state.next_write().await?;
        Some((Ok::<_, Infallible>(bytes), state))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would turn a stream into a lump.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl State {
    /// The next bytes to write; `None` at the end.
    async fn next_write(&mut self) -> Option<Bytes> {
        if let Some(start) = self.start.take() {
            return Some(start.into());
        }
        let mut out = Vec::new();
        while out.is_empty() {
            if self.is_over {
                return None;
            }
            tokio::select! {
                biased;
                received = self.events.recv_many(&mut self.batch, MAX_BATCH) => match received {
                    // Only a request that was cancelled ends without a result.
                    0 => self.fail(&RequestError::Cancelled, &mut out),
                    _ => self.write_batch(&mut out),
                },
                _ = self.keepalive.tick() => out.extend_from_slice(KEEPALIVE),
            }
        }
        Some(out.into())
    }

    fn write_batch(&mut self, out: &mut Vec<u8>) {
        let mut batch = std::mem::take(&mut self.batch);
        for event in batch.drain(..) {
            match event {
                Ok(event) => self.write(&event, out),
                Err(error) => self.fail(&error, out),
            }
        }
        self.batch = batch;
    }

    fn write(&mut self, event: &Event, out: &mut Vec<u8>) {
        let model = &self.model;
        match event {
            // Refused for streams.
            Event::PromptLogprobs(_) => {}
            Event::Delta(delta) => self.writer.write_delta(delta, &|id| model.token_bytes(id), out),
            Event::Finish(finish) => self.writer.write_finish(finish, out),
            Event::Completion(completion) => {
                self.writer.write_end(&self.prompt, completion, out);
                self.call.set_code("200");
                self.is_over = true;
            }
        }
    }

    fn fail(&mut self, error: &RequestError, out: &mut Vec<u8>) {
        write_error(&error_json(error), out);
        self.call.set_code(status_of(error).as_str());
        self.is_over = true;
    }
}
