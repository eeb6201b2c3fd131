//! One media item to one encoder.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use tessera_proto::common::v1 as common;
use tessera_proto::encoder::v1 as pb;
use tessera_proto::encoder::v1::encoder_client::EncoderClient;
use tessera_proto::{ErrorReason, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, hash_bytes, hash_from_bytes};
use tessera_types::{EmbeddingKey, InstanceId};
use tonic::{Code, Status};

use crate::prepare::PreparedMedia;
use crate::upstream::{EncoderChoice, Upstream, reason_of};

/// Items of at least this many bytes are first looked up in the encoder's cache, which saves sending
/// them again.
const LOOK_UP_BYTES: usize = 256 << 10;

/// How often the judgement on an encoder at work is looked at.
const LIFE_POLL: Duration = Duration::from_millis(250);

/// What became of an item.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) item: u32,
    pub(super) endpoint: String,
    pub(super) took: Duration,
    pub(super) result: Result<Embedding, EncodeFailure>,
}

/// An embedding that an encoder holds.
#[derive(Debug)]
pub(super) struct Embedding {
    pub(super) key: EmbeddingKey,
    pub(super) cache_hit: bool,
}

/// Why there is none.
#[derive(Debug)]
pub(super) struct EncodeFailure {
    /// Whether another encoder, or this one later, may do better.
    pub(super) retryable: bool,
    pub(super) detail: String,
}

/// Sends the item and waits until the embedding can be pulled, at most `timeout`, and only as long as the
/// encoder gives signs of life.
pub(super) async fn encode(
    upstream: Upstream,
    choice: EncoderChoice,
    header: pb::EncodeHeader,
    frames: Vec<Bytes>,
    item: u32,
    timeout: Duration,
) -> Encoded {
    let begun = std::time::Instant::now();
    let result = tokio::select! {
        result = call(&upstream, &choice, header, frames) => result,
        () = tokio::time::sleep(timeout) => {
            Err(Status::deadline_exceeded("the encoder did not answer in time"))
        }
        () = is_out(&upstream, choice.instance) => {
            Err(Status::unavailable("the encoder is gone or gives no sign of life"))
        }
    };
    let result = result.and_then(embedding).map_err(|status| {
        if speaks_against(&status) {
            upstream.call_failed(choice.instance);
        }
        failure(&status)
    });
    if result.is_ok() {
        upstream.call_ok(choice.instance);
    }
    Encoded { item, endpoint: choice.address.clone(), took: begun.elapsed(), result }
}

/// Returns once the encoder is judged out.
async fn is_out(upstream: &Upstream, instance: InstanceId) {
    while !upstream.encoder_is_out(instance) {
        tokio::time::sleep(LIFE_POLL).await;
    }
}

async fn call(
    upstream: &Upstream,
    choice: &EncoderChoice,
    header: pb::EncodeHeader,
    frames: Vec<Bytes>,
) -> Result<pb::EncodeResponse, Status> {
    let channel = upstream
        .channel(&choice.address)
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client = EncoderClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    if frames.iter().map(Bytes::len).sum::<usize>() >= LOOK_UP_BYTES {
        let look_up = pb::EncodeHeader { cached_only: true, ..header.clone() };
        match client.encode(stream::iter([header_message(look_up)])).await {
            Ok(found) => return Ok(found.into_inner()),
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => return Err(status),
        }
    }
    let chunks = frames.into_iter().enumerate().flat_map(|(frame, bytes)| chunks(frame, bytes));
    let messages = std::iter::once(header_message(header)).chain(chunks);
    Ok(client.encode(stream::iter(messages)).await?.into_inner())
}

/// The header of an item.
pub(super) fn header(
    request_id: &str,
    media: &PreparedMedia,
    key: EmbeddingKey,
) -> pb::EncodeHeader {
    let description = &media.description;
    pb::EncodeHeader {
        request_id: request_id.to_owned(),
        kind: common::MediaKind::from(description.kind).into(),
        media_id: hash_bytes(&description.media_id.0),
        resized_width: description.resized.width,
        resized_height: description.resized.height,
        grid: Some(description.grid.into()),
        embedding_key: hash_bytes(&key.0),
        num_frames: media.frames.len() as u32,
        cached_only: false,
        num_bytes: media.frames.iter().map(|frame| frame.len() as u64).sum(),
    }
}

fn header_message(header: pb::EncodeHeader) -> pb::EncodeRequest {
    pb::EncodeRequest { part: Some(pb::encode_request::Part::Header(header)) }
}

/// Slices of one frame; nothing is copied.
fn chunks(frame: usize, mut rest: Bytes) -> impl Iterator<Item = pb::EncodeRequest> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let data = rest.split_to(rest.len().min(MAX_CHUNK_BYTES));
        let chunk = pb::FrameChunk { frame: frame as u32, data };
        Some(pb::EncodeRequest { part: Some(pb::encode_request::Part::Chunk(chunk)) })
    })
}

fn embedding(response: pb::EncodeResponse) -> Result<Embedding, Status> {
    let info = response
        .embedding
        .ok_or_else(|| Status::internal("the encoder's reply names no embedding"))?;
    let key = hash_from_bytes(&info.key, "embedding.key")?;
    Ok(Embedding { key: EmbeddingKey(key), cache_hit: response.cache_hit })
}

/// A refusal with a typed reason is an answer; anything else may be the endpoint's own trouble.
fn speaks_against(status: &Status) -> bool {
    reason_of(status).is_none()
        && matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Unknown)
}

fn failure(status: &Status) -> EncodeFailure {
    let is_items_fault = match reason_of(status) {
        Some(reason) => matches!(
            reason,
            ErrorReason::InvalidMedia | ErrorReason::InvalidArgument | ErrorReason::RequestTooLarge
        ),
        None => status.code() == Code::InvalidArgument,
    };
    EncodeFailure { retryable: !is_items_fault, detail: status.message().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_travel_in_bounded_chunks_without_loss() {
        let bytes = Bytes::from((0..MAX_CHUNK_BYTES * 2 + 7).map(|i| i as u8).collect::<Vec<_>>());
        let mut joined = Vec::new();
        for message in chunks(3, bytes.clone()) {
            let Some(pb::encode_request::Part::Chunk(chunk)) = message.part else {
                panic!("only chunks follow");
            };
            assert!(chunk.frame == 3 && chunk.data.len() <= MAX_CHUNK_BYTES);
            joined.extend_from_slice(&chunk.data);
        }
        assert_eq!(joined, bytes);
    }

    #[test]
    fn only_faults_of_the_item_are_final() {
        let typed = |reason: ErrorReason| failure(&reason.status("x").into()).retryable;
        assert!(!typed(ErrorReason::InvalidMedia));
        assert!(typed(ErrorReason::Overloaded));
        assert!(typed(ErrorReason::ModelMismatch));
        assert!(failure(&Status::unavailable("x")).retryable);
        assert!(!failure(&Status::invalid_argument("x")).retryable);
        assert!(speaks_against(&Status::unavailable("x")));
        assert!(!speaks_against(&ErrorReason::Draining.status("x").into()));
    }
}
