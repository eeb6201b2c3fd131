//! Reads the request stream of `Encode` and `Describe`: a header, then the bytes of each frame. Nothing is
//! kept beyond what the header announced and what was reserved for it.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tessera_media::{MediaLimits, frame_list_id, media_id};
use tessera_proto::encoder::v1::{EncodeHeader, EncodeRequest, FrameChunk, encode_request};
use tessera_proto::{ErrorReason, hash_from_bytes};
use tessera_types::{EmbeddingKey, GridThw, MediaId, MediaKind};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

/// Bytes of one permit of [`MediaBudget`].
const PERMIT_BYTES: u64 = 4096;

/// Bounds the media bytes that all requests together hold.
#[derive(Debug, Clone)]
pub struct MediaBudget {
    permits: Arc<Semaphore>,
    limit_bytes: u64,
}

impl MediaBudget {
    /// Room for `limit_bytes`.
    pub fn new(limit_bytes: u64) -> Self {
        let permits = (limit_bytes / PERMIT_BYTES).min(Semaphore::MAX_PERMITS as u64) as usize;
        Self { permits: Arc::new(Semaphore::new(permits)), limit_bytes }
    }

    /// Reserves room for one item.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` when the room is taken.
    fn reserve(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Status> {
        let permits = u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        self.permits.clone().try_acquire_many_owned(permits).map_err(|_| {
            let message =
                format!("no room for {bytes} media bytes, at most {} are held", self.limit_bytes);
            ErrorReason::Overloaded
                .status(message)
                .retry_after(std::time::Duration::from_millis(200))
                .into()
        })
    }
}

/// What a header announces, checked field by field.
#[derive(Debug, Clone, PartialEq)]
pub struct Announced {
    pub kind: MediaKind,
    pub media_id: MediaId,
    pub resized_width: u32,
    pub resized_height: u32,
    pub grid: GridThw,
    pub key: EmbeddingKey,
    pub num_frames: u32,
    pub num_bytes: u64,
    pub cached_only: bool,
}

impl Announced {
    /// Pixels the item costs: every frame after resizing.
    pub fn pixels(&self) -> u64 {
        u64::from(self.resized_width) * u64::from(self.resized_height) * u64::from(self.num_frames)
    }
}

/// A received item. The budget is returned when it is dropped.
#[derive(Debug)]
pub struct Received {
    pub frames: Vec<Bytes>,
    _reserved: OwnedSemaphorePermit,
}

fn invalid(field: &'static str, message: impl Into<String>) -> Status {
    ErrorReason::InvalidArgument.status(message).field(field).into()
}

/// Takes and checks the first message.
///
/// # Errors
/// `INVALID_ARGUMENT` naming the field.
pub async fn read_header<S>(stream: &mut S, limits: &MediaLimits) -> Result<Announced, Status>
where
    S: Stream<Item = Result<EncodeRequest, Status>> + Unpin,
{
    let first = stream.next().await.transpose()?.and_then(|message| message.part);
    match first {
        Some(encode_request::Part::Header(header)) => announced(&header, limits),
        _ => Err(invalid("header", "the first message must be a header")),
    }
}

fn announced(header: &EncodeHeader, limits: &MediaLimits) -> Result<Announced, Status> {
    let kind = MediaKind::try_from(header.kind())?;
    let grid: GridThw = header.grid.ok_or_else(|| invalid("grid", "grid is missing"))?.into();
    let num_frames = header.num_frames;
    if num_frames == 0 || (kind == MediaKind::Image && num_frames != 1) {
        return Err(invalid("num_frames", format!("{num_frames} frames make no {kind:?}")));
    }
    if num_frames > limits.max_frames {
        let message = format!("{num_frames} frames, at most {} are allowed", limits.max_frames);
        return Err(invalid("num_frames", message));
    }
    let largest = limits.max_bytes.saturating_mul(u64::from(num_frames));
    if !header.cached_only && (header.num_bytes == 0 || header.num_bytes > largest) {
        let message = format!("{} bytes announced, 1 to {largest} are allowed", header.num_bytes);
        return Err(invalid("num_bytes", message));
    }
    Ok(Announced {
        kind,
        media_id: MediaId(hash_from_bytes(&header.media_id, "media_id")?),
        resized_width: header.resized_width,
        resized_height: header.resized_height,
        grid,
        key: EmbeddingKey(hash_from_bytes(&header.embedding_key, "embedding_key")?),
        num_frames,
        num_bytes: header.num_bytes,
        cached_only: header.cached_only,
    })
}

/// Reads the announced bytes and checks that they have the announced hash.
///
/// # Errors
/// `RESOURCE_EXHAUSTED` without room, `INVALID_ARGUMENT` for anything but the announced frames in order.
pub async fn read_frames<S>(
    stream: &mut S,
    announced: &Announced,
    budget: &MediaBudget,
) -> Result<Received, Status>
where
    S: Stream<Item = Result<EncodeRequest, Status>> + Unpin,
{
    let reserved = budget.reserve(announced.num_bytes)?;
    let mut frames = vec![BytesMut::new(); announced.num_frames as usize];
    let (mut received, mut current) = (0u64, 0u32);
    while let Some(message) = stream.next().await.transpose()? {
        let Some(encode_request::Part::Chunk(FrameChunk { frame, data })) = message.part else {
            return Err(invalid("chunk", "only chunks may follow the header"));
        };
        received += data.len() as u64;
        if frame < current || frame >= announced.num_frames {
            return Err(invalid("frame", format!("frame {frame} after frame {current}")));
        }
        if received > announced.num_bytes {
            return Err(invalid("num_bytes", "more bytes than announced"));
        }
        current = frame;
        frames[frame as usize].extend_from_slice(&data);
    }
    if received != announced.num_bytes {
        let message = format!("{received} bytes of {} announced", announced.num_bytes);
        return Err(invalid("num_bytes", message));
    }
    let frames: Vec<Bytes> = frames.into_iter().map(BytesMut::freeze).collect();
    if content_id(announced.kind, &frames) != announced.media_id {
        return Err(crate::error::EncodeError::HashMismatch.into());
    }
    Ok(Received { frames, _reserved: reserved })
}

/// Content hash of an item, as the router computes it.
fn content_id(kind: MediaKind, frames: &[Bytes]) -> MediaId {
    match (kind, frames) {
        (MediaKind::Image, [image]) => media_id(image),
        _ => frame_list_id(&frames.iter().map(|frame| media_id(frame)).collect::<Vec<_>>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tessera_proto::common::v1 as common;
    use tessera_proto::error_detail;
    use tonic::Code;

    fn header(data: &[u8]) -> EncodeHeader {
        EncodeHeader {
            kind: common::MediaKind::Image.into(),
            media_id: media_id(data).0.as_bytes().to_vec().into(),
            resized_width: 56,
            resized_height: 56,
            grid: Some(common::GridThw { t: 1, h: 4, w: 4 }),
            embedding_key: vec![1; 32].into(),
            num_frames: 1,
            num_bytes: data.len() as u64,
            ..EncodeHeader::default()
        }
    }

    fn chunk(frame: u32, data: &'static [u8]) -> Result<EncodeRequest, Status> {
        let chunk = FrameChunk { frame, data: data.into() };
        Ok(EncodeRequest { part: Some(encode_request::Part::Chunk(chunk)) })
    }

    async fn read(
        header: EncodeHeader,
        chunks: Vec<Result<EncodeRequest, Status>>,
        budget: u64,
    ) -> Result<Vec<Bytes>, Status> {
        let first = Ok(EncodeRequest { part: Some(encode_request::Part::Header(header)) });
        let mut stream = tokio_stream::iter(std::iter::once(first).chain(chunks));
        let announced = read_header(&mut stream, &MediaLimits::default()).await?;
        let received = read_frames(&mut stream, &announced, &MediaBudget::new(budget)).await?;
        Ok(received.frames)
    }

    #[tokio::test]
    async fn chunks_are_joined() {
        let frames =
            read(header(b"abcdef"), vec![chunk(0, b"abc"), chunk(0, b"def")], 1 << 20).await;
        assert_eq!(frames.expect("read"), [Bytes::from_static(b"abcdef")]);
    }

    #[tokio::test]
    async fn what_was_not_announced_is_refused() {
        let wrong_hash = read(header(b"abc"), vec![chunk(0, b"abd")], 1 << 20).await;
        let detail = error_detail(&wrong_hash.expect_err("another hash")).expect("a detail");
        assert_eq!(detail.reason, "INVALID_MEDIA");
        type Case = (&'static str, EncodeHeader, Vec<Result<EncodeRequest, Status>>);
        let cases: Vec<Case> = vec![
            ("num_bytes", header(b"abc"), vec![chunk(0, b"abcd")]),
            ("num_bytes", header(b"abc"), vec![chunk(0, b"ab")]),
            ("frame", header(b"abc"), vec![chunk(1, b"abc")]),
            ("num_frames", EncodeHeader { num_frames: 0, ..header(b"abc") }, vec![]),
            ("num_frames", EncodeHeader { num_frames: 2, ..header(b"abc") }, vec![]),
            ("num_bytes", EncodeHeader { num_bytes: u64::MAX, ..header(b"abc") }, vec![]),
            (
                "embedding_key",
                EncodeHeader { embedding_key: vec![1].into(), ..header(b"a") },
                vec![],
            ),
            ("grid", EncodeHeader { grid: None, ..header(b"a") }, vec![]),
        ];
        for (field, header, chunks) in cases {
            let status = read(header, chunks, 1 << 20).await.expect_err(field);
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
            assert_eq!(error_detail(&status).expect("a detail").field, field, "{status}");
        }
    }

    #[tokio::test]
    async fn room_is_reserved_before_bytes_are_read() {
        let data: &'static [u8] = &[7; 9000];
        let status = read(header(data), vec![chunk(0, data)], 8192).await.expect_err("no room");
        assert_eq!(status.code(), Code::ResourceExhausted);
    }
}
