//! A [`RequestError`] in OpenAI's form: `{"error": {message, type, param, code}}` with the HTTP status
//! that its clients act on.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde::Serialize;
use tessera_proto::ErrorReason;

use crate::error::RequestError;

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: &'a str,
}

/// Status of an error.
pub(crate) fn status_of(error: &RequestError) -> StatusCode {
    match error {
        RequestError::ContentType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        RequestError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        RequestError::TooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
        _ => match error.reason() {
            ErrorReason::InvalidArgument
            | ErrorReason::InvalidMedia
            | ErrorReason::MediaUrlRefused
            | ErrorReason::PromptTooLong
            | ErrorReason::RequestTooLarge
            | ErrorReason::Unsupported => StatusCode::BAD_REQUEST,
            ErrorReason::ModelNotFound | ErrorReason::MediaNotFound => StatusCode::NOT_FOUND,
            ErrorReason::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            ErrorReason::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            ErrorReason::Cancelled => {
                StatusCode::from_u16(499).expect("499 is in the range of status codes")
            }
            ErrorReason::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            ErrorReason::NotReady
            | ErrorReason::GroupLost
            | ErrorReason::EncoderFailed
            | ErrorReason::StaleEpoch
            | ErrorReason::ModelMismatch
            | ErrorReason::Draining => StatusCode::SERVICE_UNAVAILABLE,
        },
    }
}

fn type_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    }
}

/// OpenAI's word where clients match on it, ours in lower case elsewhere.
fn code_of(reason: ErrorReason) -> String {
    match reason {
        ErrorReason::PromptTooLong => "context_length_exceeded".to_owned(),
        ErrorReason::Overloaded => "rate_limit_exceeded".to_owned(),
        other => other.name().to_ascii_lowercase(),
    }
}

/// The error object as JSON.
pub(crate) fn error_json(error: &RequestError) -> Vec<u8> {
    let message = error.message();
    let code = code_of(error.reason());
    let envelope = Envelope {
        error: Inner {
            message: &message,
            r#type: type_of(status_of(error)),
            param: error.field(),
            code: &code,
        },
    };
    serde_json::to_vec(&envelope).expect("strings always serialize")
}

/// The whole response.
pub(crate) fn error_response(error: &RequestError) -> Response<Body> {
    let mut response = Response::new(Body::from(error_json(error)));
    *response.status_mut() = status_of(error);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(wait) = error.retry_after() {
        // Whole seconds, rounded up: the header knows no fractions.
        let seconds = wait.as_millis().div_ceil(1000).max(1) as u64;
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tessera_processor::ProcessorError;

    use super::*;

    #[test]
    fn errors_have_the_status_and_code_that_clients_match_on() {
        let wait = Duration::from_millis(1200);
        let cases = [
            (RequestError::invalid("stop", "x"), 400, "invalid_argument"),
            (RequestError::ContentType { found: "text/plain".into() }, 415, "invalid_argument"),
            (RequestError::TooLarge { limit: 1 }, 413, "request_too_large"),
            (
                ProcessorError::PromptTooLong { tokens: 9, context: 8 }.into(),
                400,
                "context_length_exceeded",
            ),
            (
                RequestError::ModelNotFound { requested: "a".into(), served: "b".into() },
                404,
                "model_not_found",
            ),
            (
                RequestError::Overloaded { what: "w", limit: 1, retry_after: wait },
                429,
                "rate_limit_exceeded",
            ),
            (RequestError::GroupLost { detail: "d".into(), retry_after: wait }, 503, "group_lost"),
            (RequestError::DeadlineExceeded, 504, "deadline_exceeded"),
            (RequestError::Cancelled, 499, "cancelled"),
        ];
        for (error, status, code) in cases {
            let response = error_response(&error);
            assert_eq!(response.status(), status);
            let retry = response.headers().get(header::RETRY_AFTER);
            assert_eq!(retry.is_some(), error.retry_after().is_some());
            assert!(retry.is_none_or(|seconds| seconds == "2"));
            let json: serde_json::Value =
                serde_json::from_slice(&error_json(&error)).expect("is JSON");
            assert_eq!(json["error"]["code"], code);
            assert_eq!(json["error"]["message"], error.message());
            assert_eq!(json["error"]["param"].as_str(), error.field());
            assert!(json["error"]["type"].is_string());
        }
    }
}
