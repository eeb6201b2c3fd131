//! What the engine tells about one sequence, and to whom.

use std::time::Duration;

use tessera_types::{Epoch, FinishReason, TokenId, TokenLogprobs};

use crate::error::SequenceError;

/// News of one sequence, in order. [`Event::Finished`] or [`Event::Failed`] is the last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The sequence was queued in this epoch; all its tokens will belong to it.
    Accepted {
        epoch: Epoch,
    },
    /// Embeddings of these items are wanted; room for them is reserved. Answer each by
    /// [`crate::EngineHandle::media_arrived`] or [`crate::EngineHandle::media_failed`].
    MediaNeeded {
        items: Vec<u32>,
    },
    /// The sequence took a slot for the first time.
    Started {
        num_cached_tokens: u32,
    },
    /// Log probabilities of prompt tokens from `first_token` on, in order and before the first output token.
    PromptLogprobs {
        first_token: u32,
        tokens: Vec<TokenLogprobs>,
    },
    /// A new output token. Indices count all output of the choice and have no gaps.
    Token {
        output_index: u32,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    },
    Finished {
        reason: FinishReason,
        /// Output in all, forced output included.
        num_output_tokens: u32,
        num_cached_tokens: u32,
        timings: Timings,
    },
    Failed {
        error: SequenceError,
    },
}

/// Stages of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// From submission to the first slot.
    pub queue: Duration,
    /// From submission to the first token.
    pub prefill: Duration,
}

/// Takes the events of one sequence on the engine thread. `send` must not wait.
///
/// A sink is bounded; a client too slow to keep it from filling loses its sequence, since the engine
/// neither waits for one client nor keeps tokens for it: on any error the sequence is aborted and the
/// sink dropped, so the reader sees its stream end without a last event. A sink with room for
/// `max_tokens` and a few more events never fills.
pub trait EventSink: Send {
    fn send(&mut self, event: Event) -> Result<(), SinkError>;
}

/// An event that was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    #[error("the client is too slow: its stream is full")]
    Full,
    #[error("the client is gone")]
    Closed,
}

impl<F: FnMut(Event) -> Result<(), SinkError> + Send> EventSink for F {
    fn send(&mut self, event: Event) -> Result<(), SinkError> {
        self(event)
    }
}

impl EventSink for crossbeam_channel::Sender<Event> {
    fn send(&mut self, event: Event) -> Result<(), SinkError> {
        use crossbeam_channel::TrySendError;
        self.try_send(event).map_err(|error| match error {
            TrySendError::Full(_) => SinkError::Full,
            TrySendError::Disconnected(_) => SinkError::Closed,
        })
    }
}
