//! Reads a request's body within its bounds of size, time and memory.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;

use crate::admission::HeldBytes;
use crate::error::RequestError;

/// A refused body is read and thrown away up to this many times the limit, so that the client, still
/// sending, sees the answer and not a reset connection.
const DISCARD_LIMITS: usize = 2;

/// Reads the whole body, counting its bytes in `held`. With a `refusal` the body is only thrown away.
///
/// # Errors
/// `refusal`, [`RequestError::ContentType`], [`RequestError::TooLarge`], [`RequestError::TooSlow`],
/// [`RequestError::Overloaded`] from `held`, or [`RequestError::Cancelled`] if the client goes away.
pub(super) async fn read_body(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    timeout: Duration,
    held: &mut HeldBytes,
    refusal: Option<RequestError>,
) -> Result<Bytes, RequestError> {
    let refusal = refusal.or_else(|| check_type(headers).err());
    match tokio::time::timeout(timeout, collect(headers, body, limit, held, refusal)).await {
        Ok(read) => read,
        Err(_) => Err(RequestError::TooSlow { timeout_ms: timeout.as_millis() as u64 }),
    }
}

/// Accepts JSON and bodies of no stated type. Browsers let any page send the types of HTML forms, which
/// would make every visitor of a page a client.
fn check_type(headers: &HeaderMap) -> Result<(), RequestError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match essence == "application/json" || essence.ends_with("+json") {
        true => Ok(()),
        false => Err(RequestError::ContentType { found: essence.chars().take(80).collect() }),
    }
}

async fn collect(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    held: &mut HeldBytes,
    mut refusal: Option<RequestError>,
) -> Result<Bytes, RequestError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut stream = body.into_data_stream();
    if refusal.is_none() && announced.is_some_and(|length| length > limit) {
        refusal = Some(RequestError::TooLarge { limit });
    }
    let mut buffer = BytesMut::new();
    let mut received = 0usize;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| RequestError::Cancelled)?;
        received = received.saturating_add(chunk.len());
        if received > limit && refusal.is_none() {
            refusal = Some(RequestError::TooLarge { limit });
        }
        if refusal.is_none() {
            refusal = held.grow(chunk.len()).err();
        }
        match &refusal {
            None if buffer.is_empty() && announced == Some(chunk.len()) => return Ok(chunk),
            None => {
                if buffer.is_empty() {
                    buffer.reserve(announced.unwrap_or(chunk.len()));
                }
                buffer.extend_from_slice(&chunk);
            }
            Some(_) => {
                buffer = BytesMut::new();
                if received > limit.saturating_mul(DISCARD_LIMITS) {
                    break;
                }
            }
        }
    }
    match refusal {
        Some(error) => Err(error),
        None => Ok(buffer.freeze()),
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;
    use crate::admission::Admission;
    use crate::config::LimitsConfig;

    fn admission(max_held_bytes: u64) -> Admission {
        Admission::new(&LimitsConfig { max_held_bytes, ..LimitsConfig::default() })
    }

    fn held(max_held_bytes: u64) -> HeldBytes {
        admission(max_held_bytes).held_bytes()
    }

    fn chunks(num: usize) -> Body {
        Body::from_stream(stream::iter(
            (0..num).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(&[7; 1024]))),
        ))
    }

    async fn read(body: Body, limit: usize, held: &mut HeldBytes) -> Result<Bytes, RequestError> {
        read_body(&HeaderMap::new(), body, limit, Duration::from_secs(60), held, None).await
    }

    #[tokio::test]
    async fn a_body_is_read_and_counted() {
        let admission = admission(1 << 20);
        let mut held = admission.held_bytes();
        let bytes = read(chunks(3), 4096, &mut held).await.expect("fits");
        assert_eq!((bytes.len(), admission.held()), (3072, 3072));
        drop(held);
        assert_eq!(admission.held(), 0);
    }

    #[tokio::test]
    async fn bounds_of_size_and_memory_are_kept() {
        let error = read(chunks(9), 4096, &mut held(1 << 20)).await;
        assert!(matches!(error, Err(RequestError::TooLarge { limit: 4096 })));
        let error = read(chunks(9), 1 << 20, &mut held(2048)).await;
        assert!(matches!(error, Err(RequestError::Overloaded { .. })));
        let (wait, refusal) = (Duration::from_secs(60), RequestError::Cancelled);
        let held = &mut held(1 << 20);
        let refused =
            read_body(&HeaderMap::new(), chunks(3), 4096, wait, held, Some(refusal)).await;
        assert!(matches!(refused, Err(RequestError::Cancelled)));
    }

    #[test]
    fn only_json_and_unnamed_types_are_read() {
        let with_type = |text: &'static str| {
            check_type(&HeaderMap::from_iter([(
                header::CONTENT_TYPE,
                header::HeaderValue::from_static(text),
            )]))
        };
        assert!(check_type(&HeaderMap::new()).is_ok());
        for json in ["application/json", "Application/JSON; charset=utf-8", "application/x+json"] {
            assert!(with_type(json).is_ok(), "{json}");
        }
        for other in ["text/plain", "multipart/form-data; boundary=x", "", "application/jsonp"] {
            assert!(matches!(with_type(other), Err(RequestError::ContentType { .. })), "{other}");
        }
    }

    #[tokio::test]
    async fn a_body_without_end_is_given_up() {
        let endless = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let wait = Duration::from_millis(1);
        let read = read_body(&HeaderMap::new(), endless, 10, wait, &mut held(10), None).await;
        assert!(matches!(read, Err(RequestError::TooSlow { timeout_ms: 1 })));
    }
}
