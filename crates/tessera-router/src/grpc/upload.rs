//! `UploadMedia`: chunks in, content hash out.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tessera_media::{media_id, probe};
use tessera_processor::ProcessorError;
use tessera_proto::inference::v1 as pb;
use tessera_proto::{MAX_CHUNK_BYTES, hash_bytes};
use tokio::time::Instant;
use tonic::{Code, Streaming};

use crate::error::RequestError;
use crate::service::Service;

/// Receives one media item, checks its header and keeps it.
///
/// # Errors
/// Broken or oversized media, a full store, a client that is too slow or leaves.
pub(super) async fn receive(
    service: &Service,
    chunks: Streaming<pb::UploadMediaRequest>,
) -> Result<pb::UploadMediaResponse, RequestError> {
    let timeout_ms = service.config().uploads.timeout_ms;
    let receiving = receive_untimed(service, chunks);
    match tokio::time::timeout(Duration::from_millis(timeout_ms), receiving).await {
        Ok(received) => received,
        Err(_) => Err(RequestError::TooSlow { timeout_ms }),
    }
}

async fn receive_untimed(
    service: &Service,
    mut chunks: Streaming<pb::UploadMediaRequest>,
) -> Result<pb::UploadMediaResponse, RequestError> {
    let limit = service.model().media_limits().max_bytes;
    let mut reservation = service.uploads().reserve();
    let mut bytes = BytesMut::new();
    while let Some(message) = chunks.message().await.map_err(|status| broken(&status))? {
        let chunk = message.chunk;
        if chunk.len() > MAX_CHUNK_BYTES {
            let detail = format!("a chunk has at most {MAX_CHUNK_BYTES} bytes");
            return Err(RequestError::invalid("chunk", detail));
        }
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(RequestError::TooLarge { limit: limit as usize });
        }
        reservation.grow(chunk.len(), Instant::now())?;
        bytes.extend_from_slice(&chunk);
    }
    let bytes: Bytes = bytes.freeze();
    let num_bytes = bytes.len();
    let limits = *service.model().media_limits();
    let hashed = bytes.clone();
    let (info, id) =
        service.run_sized(num_bytes, move || (probe(&hashed, &limits), media_id(&hashed))).await?;
    let info = info.map_err(|source| RequestError::Media {
        field: "chunk".to_owned(),
        source: ProcessorError::Media { item: 0, source },
    })?;
    reservation.keep(id, bytes, Instant::now());
    Ok(pb::UploadMediaResponse {
        media_id: hash_bytes(&id.0),
        num_bytes: num_bytes as u64,
        width: info.width,
        height: info.height,
    })
}

/// A stream that breaks is a client that left, unless the message itself was refused.
fn broken(status: &tonic::Status) -> RequestError {
    match status.code() {
        Code::OutOfRange | Code::InvalidArgument => {
            RequestError::invalid("chunk", status.message())
        }
        _ => RequestError::Cancelled,
    }
}
