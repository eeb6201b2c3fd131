//! Typed errors in [`tonic::Status`]: the code gives the class, an
//! [`ErrorDetail`](crate::common::v1::ErrorDetail) in the status details says what to do about it.

use std::time::Duration;

use prost::Message;
use tonic::{Code, Status};

use crate::common::v1::ErrorDetail;

const DETAIL_TYPE_URL: &str = "type.googleapis.com/tessera.common.v1.ErrorDetail";

/// What went wrong, as clients can match on it. The wire carries the name in SCREAMING_SNAKE_CASE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorReason {
    /// A field has an invalid value.
    InvalidArgument,
    /// Media bytes are broken, of an unknown format, or beyond a limit.
    InvalidMedia,
    /// A media URL that may not or cannot be fetched.
    MediaUrlRefused,
    /// The prompt, or prompt and `max_tokens` together, exceed the context.
    PromptTooLong,
    /// The request can never fit the KV cache.
    RequestTooLarge,
    /// The feature is known and not supported.
    Unsupported,
    /// The model named in the request is not served here.
    ModelNotFound,
    /// An uploaded media item is unknown or expired.
    MediaNotFound,
    /// A queue is full.
    Overloaded,
    /// No decoder group or encoder is ready.
    NotReady,
    /// The group running the request was lost.
    GroupLost,
    /// An encoder failed to encode or deliver.
    EncoderFailed,
    /// The sender's epoch is not the receiver's.
    StaleEpoch,
    /// Weights or numerics differ from what the sender expects.
    ModelMismatch,
    /// The member is draining.
    Draining,
    /// The deadline passed.
    DeadlineExceeded,
    /// The client went away.
    Cancelled,
    /// A defect in the server.
    Internal,
}

impl ErrorReason {
    const ALL: [(Self, &'static str, Code, bool); 18] = [
        (Self::InvalidArgument, "INVALID_ARGUMENT", Code::InvalidArgument, false),
        (Self::InvalidMedia, "INVALID_MEDIA", Code::InvalidArgument, false),
        (Self::MediaUrlRefused, "MEDIA_URL_REFUSED", Code::InvalidArgument, false),
        (Self::PromptTooLong, "PROMPT_TOO_LONG", Code::InvalidArgument, false),
        (Self::RequestTooLarge, "REQUEST_TOO_LARGE", Code::InvalidArgument, false),
        (Self::Unsupported, "UNSUPPORTED", Code::InvalidArgument, false),
        (Self::ModelNotFound, "MODEL_NOT_FOUND", Code::NotFound, false),
        (Self::MediaNotFound, "MEDIA_NOT_FOUND", Code::NotFound, false),
        (Self::Overloaded, "OVERLOADED", Code::ResourceExhausted, true),
        (Self::NotReady, "NOT_READY", Code::Unavailable, true),
        (Self::GroupLost, "GROUP_LOST", Code::Unavailable, true),
        (Self::EncoderFailed, "ENCODER_FAILED", Code::Unavailable, true),
        (Self::StaleEpoch, "STALE_EPOCH", Code::FailedPrecondition, true),
        (Self::ModelMismatch, "MODEL_MISMATCH", Code::FailedPrecondition, false),
        (Self::Draining, "DRAINING", Code::Unavailable, true),
        (Self::DeadlineExceeded, "DEADLINE_EXCEEDED", Code::DeadlineExceeded, false),
        (Self::Cancelled, "CANCELLED", Code::Cancelled, false),
        (Self::Internal, "INTERNAL", Code::Internal, false),
    ];

    fn row(self) -> &'static (Self, &'static str, Code, bool) {
        Self::ALL.iter().find(|row| row.0 == self).expect("every reason has a row")
    }

    /// Name on the wire.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// gRPC code of the class.
    pub fn code(self) -> Code {
        self.row().2
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        self.row().3
    }

    /// The reason with this name on the wire.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Starts a status of this reason.
    pub fn status(self, message: impl Into<String>) -> StatusBuilder {
        let (_, name, _, retryable) = *self.row();
        let detail =
            ErrorDetail { reason: name.into(), field: String::new(), retryable, retry_after_ms: 0 };
        StatusBuilder { code: self.code(), message: message.into(), detail }
    }
}

/// A status in the making; becomes a [`Status`] by `into()`.
#[derive(Debug, Clone)]
pub struct StatusBuilder {
    code: Code,
    message: String,
    detail: ErrorDetail,
}

impl StatusBuilder {
    /// Names the request field at fault.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.detail.field = field.into();
        self
    }

    /// Asks clients to wait at least this long.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.detail.retry_after_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        self
    }
}

/// google.rpc.Status, the form in which gRPC carries details.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

impl From<StatusBuilder> for Status {
    fn from(builder: StatusBuilder) -> Self {
        let any = prost_types::Any {
            type_url: DETAIL_TYPE_URL.into(),
            value: builder.detail.encode_to_vec(),
        };
        let rpc = RpcStatus {
            code: builder.code as i32,
            message: builder.message.clone(),
            details: vec![any],
        };
        Status::with_details(builder.code, builder.message, rpc.encode_to_vec().into())
    }
}

/// The typed detail of a status, if it carries one.
pub fn error_detail(status: &Status) -> Option<ErrorDetail> {
    let rpc = RpcStatus::decode(status.details()).ok()?;
    let any = rpc.details.iter().find(|any| any.type_url == DETAIL_TYPE_URL)?;
    ErrorDetail::decode(any.value.as_slice()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_survives_its_status() {
        let status: Status = ErrorReason::Overloaded
            .status("the queue is full")
            .field("messages")
            .retry_after(Duration::from_millis(250))
            .into();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let detail = error_detail(&status).expect("a detail");
        assert_eq!(ErrorReason::from_name(&detail.reason), Some(ErrorReason::Overloaded));
        assert_eq!(
            (detail.field.as_str(), detail.retryable, detail.retry_after_ms),
            ("messages", true, 250)
        );
        assert_eq!(error_detail(&Status::internal("plain")), None);
    }

    #[test]
    fn every_reason_has_one_row_and_its_own_name() {
        for (reason, name, ..) in ErrorReason::ALL {
            assert_eq!(ErrorReason::from_name(name), Some(reason));
            assert_eq!(reason.name(), name);
        }
    }
}
