//! What a request produces, face-neutral: prompt information once, then deltas, a finish per choice,
//! and the completion. gRPC and HTTP only change its form.

use std::sync::Arc;

use serde::Serialize;
use tessera_types::{FinishReason, GridThw, MediaId, MediaKind, Prompt, TokenId, TokenLogprobs};
use tokio::sync::mpsc;

use crate::error::RequestError;

/// An admitted request: what is known of its prompt, and the events to come.
#[derive(Debug)]
pub struct Generation {
    pub prompt: Arc<PromptInfo>,
    /// Ends after [`Event::Completion`] or an error. Dropping it cancels the request.
    pub events: mpsc::Receiver<Result<Event, RequestError>>,
}

/// Facts fixed at admission.
#[derive(Debug, Clone)]
pub struct PromptInfo {
    pub request_id: String,
    /// Name of the served model.
    pub model: String,
    /// Changes when weights or numerics do; equal seeds then need not give equal answers.
    pub system_fingerprint: String,
    /// Seconds since 1970.
    pub created: u64,
    pub prompt: Arc<Prompt>,
    pub media: Vec<MediaInfo>,
    pub effective_seed: u64,
}

/// What became of a media item.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaInfo {
    pub kind: MediaKind,
    pub media_id: MediaId,
    /// After EXIF orientation, in pixels; of the first frame for a video.
    pub source_width: u32,
    pub source_height: u32,
    /// What the model saw; boxes and points in replies are in these pixels.
    pub resized_width: u32,
    pub resized_height: u32,
    pub grid: GridThw,
    pub num_tokens: u32,
    /// Nothing was encoded for this request: a prefix or an encoder's cache had it.
    pub cache_hit: bool,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Comes before all deltas, in pieces.
    PromptLogprobs(PromptLogprobs),
    Delta(Delta),
    Finish(ChoiceFinish),
    Completion(Completion),
}

/// Log probabilities of prompt tokens, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogprobs {
    /// Prompt token of the first entry; the first token of a prompt has none.
    pub first_token: u32,
    pub tokens: Vec<TokenLogprobs>,
}

/// More of one choice. Text and tokens need not correspond: text waits for whole characters and for the
/// end of what may become a stop string, tokens do not.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    pub choice: u32,
    /// Whole characters only; may be empty.
    pub text: String,
    /// Empty unless token ids or log probabilities were asked for.
    pub tokens: Vec<OutputToken>,
    /// Text never follows a call.
    pub tool_calls: Vec<ToolCallDelta>,
}

/// More of one tool call.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCallDelta {
    /// Counts the calls of a choice from 0.
    pub index: u32,
    /// Of a call that begins here.
    pub start: Option<ToolCallStart>,
    /// Appended to those that came before.
    pub arguments: String,
}

/// What is known of a call at its beginning.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCallStart {
    /// Drawn by the router.
    pub id: String,
    pub name: String,
}

/// Adds a delta to others, as part of the last one if it goes on with that.
pub fn push_call(calls: &mut Vec<ToolCallDelta>, delta: ToolCallDelta) {
    match calls.last_mut() {
        Some(last) if last.index == delta.index && delta.start.is_none() => {
            last.arguments.push_str(&delta.arguments);
        }
        _ => calls.push(delta),
    }
}

/// A token that counts.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputToken {
    pub id: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// One choice is complete.
#[derive(Debug, Clone, PartialEq)]
pub struct ChoiceFinish {
    pub choice: u32,
    pub reason: FinishReason,
    /// The stop string, for [`FinishReason::StopString`].
    pub matched_stop: Option<String>,
    /// The token that ended it, for [`FinishReason::StopToken`].
    pub stop_token: Option<TokenId>,
}

/// All choices are complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    pub usage: Usage,
    pub timings: Timings,
    /// Final, with cache hits.
    pub media: Vec<MediaInfo>,
}

/// Token counts; stop strings and their tokens' successors are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub num_prompt_tokens: u32,
    /// Prompt tokens whose KV was found in the prefix cache, over the first admission of each choice.
    pub num_cached_tokens: u32,
    /// Over all choices.
    pub num_output_tokens: u32,
    /// Part of the prompt tokens.
    pub num_media_tokens: u32,
}

/// Durations as the router saw them, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Timings {
    /// Arrival until placed.
    pub prepare_ms: f64,
    /// First encode request until the last embedding was ready; 0 if nothing was encoded.
    pub encode_ms: f64,
    /// Arrival until the first token.
    pub first_token_ms: f64,
    /// Arrival until the end.
    pub total_ms: f64,
}
