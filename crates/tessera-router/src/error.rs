//! Errors of the service and of single requests. A [`RequestError`] is turned into a gRPC status or an
//! OpenAI error object at the faces; everything in between handles the typed value.

use std::borrow::Cow;
use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use tessera_processor::{CheckpointError, ProcessorError};
use tessera_proto::ErrorReason;
use tessera_types::MediaId;

/// Why the router could not start, or ended on its own.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    #[error("setting {field} is not valid: {detail}")]
    Config { field: &'static str, detail: String },
    #[error("the model's processor files cannot be loaded")]
    Processor(#[source] CheckpointError),
    #[error("the {face} server cannot listen on {address}")]
    Listen {
        face: &'static str,
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("membership {url:?} is not usable")]
    Membership {
        url: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("telemetry failed")]
    Telemetry(#[from] tessera_telemetry::TelemetryError),
    #[error("the gRPC server failed")]
    Grpc(#[source] tonic::transport::Error),
    #[error("the {server} server ended without being told to")]
    EndedEarly { server: &'static str },
    #[error("the reflection service cannot be built")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// Why one request was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("the body is not valid JSON")]
    Json(#[source] serde_json::Error),
    #[error("{field}: {detail}")]
    Invalid { field: String, detail: String },
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    #[error("the body must be application/json, not {found:?}")]
    ContentType { found: String },
    #[error("the request exceeds {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the request did not arrive within {timeout_ms} ms")]
    TooSlow { timeout_ms: u64 },
    #[error("{field}")]
    Media {
        field: String,
        #[source]
        source: ProcessorError,
    },
    #[error("{field}: the media item cannot be used: {detail}")]
    MediaRefused { field: String, detail: String },
    #[error("{field}: {detail}")]
    MediaUrl { field: String, detail: Cow<'static, str> },
    #[error("{field}: no uploaded media item has the id {media_id}; it may have expired")]
    MediaNotFound { field: String, media_id: MediaId },
    #[error("{field}: {feature} is not supported yet")]
    Unsupported { field: String, feature: String },
    #[error("the model {requested:?} does not exist; this server serves {served:?}")]
    ModelNotFound { requested: String, served: String },
    #[error("{detail}")]
    Rejected { reason: ErrorReason, field: String, detail: String },
    #[error("{what}: at the limit of {limit}")]
    Overloaded { what: &'static str, limit: u64, retry_after: Duration },
    #[error("{detail}")]
    Busy { detail: String, retry_after: Duration },
    #[error("not ready: {detail}")]
    NotReady { detail: String, retry_after: Duration },
    #[error("the group that ran the request was lost: {detail}")]
    GroupLost { detail: String, retry_after: Duration },
    #[error("media item {item} could not be encoded: {detail}")]
    EncoderFailed { item: u32, detail: String, retry_after: Duration },
    #[error("the request was not complete within its time limit")]
    DeadlineExceeded,
    #[error("this router is shutting down")]
    Draining { retry_after: Duration },
    #[error("the request was cancelled")]
    Cancelled,
    #[error("internal error: {detail}")]
    Internal { detail: String },
}

impl RequestError {
    /// A field with a value outside of what it may hold.
    pub fn invalid(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), detail: detail.into() }
    }

    /// The class that clients can match on.
    pub fn reason(&self) -> ErrorReason {
        match self {
            Self::Json(_)
            | Self::ContentType { .. }
            | Self::Invalid { .. }
            | Self::TooSlow { .. } => ErrorReason::InvalidArgument,
            Self::Processor(source) | Self::Media { source, .. } => reason_of(source),
            Self::TooLarge { .. } => ErrorReason::RequestTooLarge,
            Self::MediaRefused { .. } => ErrorReason::InvalidMedia,
            Self::Rejected { reason, .. } => *reason,
            Self::MediaUrl { .. } => ErrorReason::MediaUrlRefused,
            Self::MediaNotFound { .. } => ErrorReason::MediaNotFound,
            Self::Unsupported { .. } => ErrorReason::Unsupported,
            Self::ModelNotFound { .. } => ErrorReason::ModelNotFound,
            Self::Overloaded { .. } | Self::Busy { .. } => ErrorReason::Overloaded,
            Self::NotReady { .. } => ErrorReason::NotReady,
            Self::GroupLost { .. } => ErrorReason::GroupLost,
            Self::EncoderFailed { .. } => ErrorReason::EncoderFailed,
            Self::DeadlineExceeded => ErrorReason::DeadlineExceeded,
            Self::Draining { .. } => ErrorReason::Draining,
            Self::Cancelled => ErrorReason::Cancelled,
            Self::Internal { .. } => ErrorReason::Internal,
        }
    }

    /// The request field at fault, as a path like `messages[0].content[1].image_url`.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Invalid { field, .. }
            | Self::Media { field, .. }
            | Self::MediaRefused { field, .. }
            | Self::MediaUrl { field, .. }
            | Self::MediaNotFound { field, .. }
            | Self::Unsupported { field, .. } => Some(field),
            Self::Rejected { field, .. } => (!field.is_empty()).then_some(field),
            Self::Processor(source) => Some(source.param()),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// Least time a client should wait before it tries again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. }
            | Self::Busy { retry_after, .. }
            | Self::NotReady { retry_after, .. }
            | Self::GroupLost { retry_after, .. }
            | Self::EncoderFailed { retry_after, .. }
            | Self::Draining { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// The whole chain of causes in one line, for clients: they see no `source()`.
    pub fn message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// The class of what the processor refuses.
fn reason_of(error: &ProcessorError) -> ErrorReason {
    match error {
        ProcessorError::PromptTooLong { .. } | ProcessorError::OutputTooLong { .. } => {
            ErrorReason::PromptTooLong
        }
        ProcessorError::Media { .. } | ProcessorError::Frame { .. } => ErrorReason::InvalidMedia,
        ProcessorError::ToolsUnsupported { .. } | ProcessorError::NoToolTags => {
            ErrorReason::Unsupported
        }
        _ => ErrorReason::InvalidArgument,
    }
}

impl From<RequestError> for tonic::Status {
    fn from(error: RequestError) -> Self {
        let mut status = error.reason().status(error.message());
        if let Some(field) = error.field() {
            status = status.field(field);
        }
        if let Some(wait) = error.retry_after() {
            status = status.retry_after(wait);
        }
        status.into()
    }
}

#[cfg(test)]
mod tests {
    use tessera_proto::error_detail;
    use tonic::{Code, Status};

    use super::*;

    #[test]
    fn a_status_carries_class_field_and_hint() {
        let status: Status = RequestError::Overloaded {
            what: "requests waiting",
            limit: 8,
            retry_after: Duration::from_millis(750),
        }
        .into();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let detail = error_detail(&status).expect("a detail");
        assert_eq!(detail.reason, "OVERLOADED");
        assert_eq!((detail.retryable, detail.retry_after_ms), (true, 750));

        let status: Status = RequestError::invalid("messages[0].role", "unknown role").into();
        let detail = error_detail(&status).expect("a detail");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(detail.field, "messages[0].role");
        assert!(!detail.retryable);
    }

    #[test]
    fn causes_are_told_once() {
        let error = RequestError::Media {
            field: "messages[0].content[0]".to_owned(),
            source: ProcessorError::EmptyPrompt,
        };
        assert_eq!(error.message(), "messages[0].content[0]: the prompt is empty");
    }
}
