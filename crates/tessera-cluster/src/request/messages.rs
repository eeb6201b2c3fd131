//! What goes into a session and what comes out.

use std::time::Duration;

use tessera_types::{
    Attempt, EmbeddingKey, Epoch, FinishReason, InstanceId, NumericsId, TokenId, TokenLogprobs,
};

use crate::keys::GroupName;

/// What the session is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionSpec {
    pub num_choices: u32,
    /// Effective seed of the request; choice `i` draws with [`crate::choice_seed`].
    pub seed: u64,
    /// When unfinished choices end, on the machine's clock.
    pub deadline: Option<Duration>,
    pub media: Vec<MediaItem>,
    /// Output that a resuming client already has, by choice; missing entries are empty.
    pub resumed: Vec<Vec<TokenId>>,
}

/// One media item of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaItem {
    pub embedding_key: EmbeddingKey,
    /// Encode at once, without waiting until a decoder asks.
    pub eager: bool,
}

/// Where an attempt runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub group: GroupName,
    pub epoch: Epoch,
    /// The leader.
    pub instance: InstanceId,
    /// host:port of the leader's gRPC server.
    pub address: String,
    pub numerics: NumericsId,
    /// Whether equal numerics promise equal bits there.
    pub deterministic: bool,
}

/// A token as the decoder reports it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRecord {
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// Why an attempt ended without finishing its choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptFailure {
    /// The stream or the epoch behind it broke.
    Lost { detail: String },
    /// Not taken here: a stale epoch, a drain.
    Refused { detail: String },
    /// No room here.
    Overloaded { retry_after: Option<Duration> },
    /// The request itself is at fault; no other place will take it.
    Rejected { reason: String, field: String, detail: String },
}

/// Why the request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("the decoder group was lost while the request was running: {detail}")]
    GroupLost { detail: String, retry_after: Duration },
    #[error("no decoder group can take the request: {detail}")]
    NoPlace { detail: String, retry_after: Duration },
    #[error("every decoder group is full")]
    Overloaded { retry_after: Duration },
    #[error("{detail}")]
    Rejected { reason: String, field: String, detail: String },
    #[error("media item {item} cannot be used: {detail}")]
    MediaRejected { item: u32, detail: String },
    #[error("media item {item} could not be encoded: {detail}")]
    MediaUnavailable { item: u32, detail: String, retry_after: Duration },
    #[error("the deadline passed before the first token")]
    DeadlineExceeded,
}

impl SessionError {
    /// Stable reason for error details.
    pub fn reason(&self) -> &str {
        match self {
            Self::GroupLost { .. } => "GROUP_LOST",
            Self::NoPlace { .. } => "NO_GROUP_READY",
            Self::Overloaded { .. } => "OVERLOADED",
            Self::Rejected { reason, .. } => reason,
            Self::MediaRejected { .. } => "MEDIA_REJECTED",
            Self::MediaUnavailable { .. } => "ENCODER_UNAVAILABLE",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
        }
    }

    /// Least wait before the same request may succeed; `None` if it never will.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::GroupLost { retry_after, .. }
            | Self::NoPlace { retry_after, .. }
            | Self::Overloaded { retry_after }
            | Self::MediaUnavailable { retry_after, .. } => Some(*retry_after),
            Self::Rejected { .. } | Self::MediaRejected { .. } | Self::DeadlineExceeded => None,
        }
    }
}

/// Whether a choice is what the undisturbed run would have given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuation {
    /// It never moved after its first token.
    Undisturbed,
    /// It moved between places that promise equal bits.
    Exact,
    /// What follows the move may differ from the undisturbed run.
    Resampled,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Start,
    /// Answers to `Place`.
    Placed {
        choice: u32,
        target: Target,
    },
    NoPlace {
        choice: u32,
        detail: String,
        retry_after: Option<Duration>,
    },
    /// The decoder admitted the attempt.
    Accepted {
        choice: u32,
        attempt: Attempt,
    },
    /// A token, with its index among all output of the choice.
    Token {
        choice: u32,
        attempt: Attempt,
        index: u32,
        record: TokenRecord,
    },
    Finished {
        choice: u32,
        attempt: Attempt,
        num_output_tokens: u32,
        reason: FinishReason,
    },
    MediaNeeded {
        choice: u32,
        attempt: Attempt,
        items: Vec<u32>,
    },
    AttemptFailed {
        choice: u32,
        attempt: Attempt,
        failure: AttemptFailure,
    },
    /// Answers to `Encode`.
    Encoded {
        item: u32,
        endpoint: String,
        key: EmbeddingKey,
    },
    EncodeFailed {
        item: u32,
        endpoint: Option<String>,
        retryable: bool,
        detail: String,
    },
    /// The router ends a choice itself, at a stop string or a tool call.
    StopChoice {
        choice: u32,
        reason: FinishReason,
    },
    /// The client left.
    Cancel,
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Choose a group for the choice, not one of `avoid`, with these numerics if there is one.
    Place {
        choice: u32,
        avoid: Vec<(GroupName, Epoch)>,
        prefer: Option<NumericsId>,
    },
    /// Open a stream; `output` is forced and not reported again.
    OpenAttempt {
        choice: u32,
        attempt: Attempt,
        target: Target,
        output: Vec<TokenId>,
        seed: u64,
    },
    /// Cancel the stream.
    CloseAttempt {
        choice: u32,
        attempt: Attempt,
    },
    /// Have the item encoded, at none of the endpoints in `avoid` if there is another.
    Encode {
        item: u32,
        avoid: Vec<String>,
    },
    SendMediaAt {
        choice: u32,
        attempt: Attempt,
        item: u32,
        endpoint: String,
        key: EmbeddingKey,
    },
    /// The next token of the choice, for the client.
    Deliver {
        choice: u32,
        index: u32,
        record: TokenRecord,
    },
    Finish {
        choice: u32,
        reason: FinishReason,
    },
    /// All choices are finished.
    Complete,
    /// The request failed as a whole.
    Fail {
        error: SessionError,
    },
}
