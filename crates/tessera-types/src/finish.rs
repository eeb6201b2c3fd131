//! Why a sequence ended.

use serde::{Deserialize, Serialize};

/// Reason a choice is complete. Streams and replies carry exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token was sampled; it is counted in usage but has no text.
    EndOfSequence,
    /// A token of the request's stop token ids was sampled.
    StopToken,
    /// A stop string appeared; the text ends before it.
    StopString,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The turn ended in one or more tool calls.
    ToolCalls,
    /// The client went away or cancelled.
    Cancelled,
    /// The deadline passed.
    DeadlineExceeded,
}

impl FinishReason {
    /// The `finish_reason` of the OpenAI API. Cancelled choices are never reported there; the two last
    /// reasons map to `"length"`, the closest that clients accept.
    pub fn openai(self) -> &'static str {
        match self {
            Self::EndOfSequence | Self::StopToken | Self::StopString => "stop",
            Self::ToolCalls => "tool_calls",
            Self::Length | Self::Cancelled | Self::DeadlineExceeded => "length",
        }
    }
}
