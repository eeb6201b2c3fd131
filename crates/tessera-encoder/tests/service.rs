//! The gRPC service over a scripted vision tower: caching, joining, refusing, pulling.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tessera_encoder::cache::Embedding;
use tessera_encoder::metrics::EncoderMetrics;
use tessera_encoder::service::EncoderService;
use tessera_encoder::tower::Identity;
use tessera_encoder::vision::{PatchItem, VisionEncoder, VisionHandle};
use tessera_encoder::{EncoderConfig, EncoderError};
use tessera_media::{PixelRecipe, media_id};
use tessera_processor::VisionIdentity;
use tessera_processor::keys::embedding_key_of;
use tessera_proto::encoder::v1 as pb;
use tessera_proto::encoder::v1::encoder_client::EncoderClient;
use tessera_proto::encoder::v1::encoder_server::EncoderServer;
use tessera_proto::{error_detail, hash_bytes};
use tessera_telemetry::Registry;
use tessera_types::{Hash256, MediaKind, ModelFingerprint, NumericsId};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Status;
use tonic::transport::Channel;

const COLS: u32 = 3;

/// One row of `[patches, 0, 0]` per merged unit; waits for a permit before each pass.
struct Scripted {
    passes: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

impl VisionEncoder for Scripted {
    fn num_cols(&self) -> u32 {
        COLS
    }

    fn encode(
        &mut self,
        items: &[PatchItem],
    ) -> Result<Vec<Vec<f32>>, Box<dyn Error + Send + Sync>> {
        while self.gate.try_acquire().map(|permit| permit.forget()).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.passes.fetch_add(1, Ordering::SeqCst);
        let rows = |item: &PatchItem| {
            let patches = item.grid.num_patches();
            [patches as f32, 0.0, 0.0].repeat(patches as usize / 4)
        };
        Ok(items.iter().map(rows).collect())
    }
}

struct Rig {
    client: EncoderClient<Channel>,
    service: EncoderService,
    passes: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

fn identity() -> Identity {
    Identity {
        vision_fingerprint: ModelFingerprint(Hash256([1; 32])),
        language_fingerprint: ModelFingerprint(Hash256([2; 32])),
        vision_numerics: NumericsId(Hash256([3; 32])),
    }
}

async fn rig(config: EncoderConfig, passes_allowed: usize) -> Rig {
    let (passes, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(passes_allowed)));
    let metrics = EncoderMetrics::register(&Registry::new()).unwrap();
    let tower = Scripted { passes: passes.clone(), gate: gate.clone() };
    let make = move || Ok::<_, EncoderError>(tower);
    let vision =
        VisionHandle::start(make, config.max_batch_patches, metrics.clone()).await.unwrap();
    let service = EncoderService::new(config, identity(), PixelRecipe::default(), vision, metrics);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(EncoderServer::new(service.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    let client = EncoderClient::connect(url).await.unwrap();
    Rig { client, service, passes, gate }
}

fn photo() -> Bytes {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/media/photo.jpg");
    std::fs::read(path).unwrap().into()
}

/// A request for one image resized to `side` × `side`.
fn request(data: &Bytes, side: u32) -> Vec<pb::EncodeRequest> {
    let recipe = PixelRecipe::default();
    let size = tessera_media::Size::new(side, side);
    let identity = identity();
    let vision =
        VisionIdentity { weights: identity.vision_fingerprint, numerics: identity.vision_numerics };
    let id = media_id(data);
    let key = embedding_key_of(&vision, &recipe, MediaKind::Image, id, &[], size);
    let header = pb::EncodeHeader {
        kind: tessera_proto::common::v1::MediaKind::Image.into(),
        media_id: hash_bytes(&id.0),
        resized_width: side,
        resized_height: side,
        grid: Some(recipe.patch.grid(1, size).into()),
        embedding_key: hash_bytes(&key.0),
        num_frames: 1,
        num_bytes: data.len() as u64,
        ..pb::EncodeHeader::default()
    };
    let part = |part| pb::EncodeRequest { part: Some(part) };
    let chunks = data
        .chunks(10_000)
        .map(|chunk| pb::FrameChunk { frame: 0, data: Bytes::copy_from_slice(chunk) });
    std::iter::once(part(pb::encode_request::Part::Header(header)))
        .chain(chunks.map(|chunk| part(pb::encode_request::Part::Chunk(chunk))))
        .collect()
}

async fn encode(rig: &Rig, request: Vec<pb::EncodeRequest>) -> Result<pb::EncodeResponse, Status> {
    let mut client = rig.client.clone();
    client.encode(tokio_stream::iter(request)).await.map(tonic::Response::into_inner)
}

async fn fetch(rig: &Rig, key: Bytes) -> Result<(pb::EmbeddingInfo, Vec<u8>), Status> {
    let mut stream = rig.client.clone().fetch(pb::FetchRequest { key }).await?.into_inner();
    let Some(pb::fetch_response::Part::Info(info)) = stream.message().await?.unwrap().part else {
        panic!("the first message is the description");
    };
    let mut values = Vec::new();
    while let Some(message) = stream.message().await? {
        let Some(pb::fetch_response::Part::Data(data)) = message.part else {
            panic!("only data follows");
        };
        values.extend_from_slice(&data);
    }
    Ok((info, values))
}

fn reason(status: &Status) -> String {
    error_detail(status).map(|detail| detail.reason).unwrap_or_default()
}

#[tokio::test]
async fn an_image_is_encoded_once_and_pulled_whole() {
    let rig = rig(EncoderConfig::default(), 1).await;
    let first = encode(&rig, request(&photo(), 112)).await.unwrap();
    assert!(!first.cache_hit);
    let info = first.embedding.unwrap();
    assert_eq!((info.num_rows, info.num_cols), (16, COLS));
    let (pulled, values) = fetch(&rig, info.key.clone()).await.unwrap();
    assert_eq!(pulled, info);
    let rows = [64.0, 0.0, 0.0].repeat(16);
    let key = tessera_types::EmbeddingKey(Hash256::from_slice(&info.key).unwrap());
    let expected = Embedding::new(key, COLS, &rows);
    assert_eq!(values, expected.values);
    assert_eq!(info.digest, hash_bytes(&expected.digest));

    let again = encode(&rig, request(&photo(), 112)).await.unwrap();
    assert!(again.cache_hit);
    assert_eq!(rig.passes.load(Ordering::SeqCst), 1, "a second pass would have hung at the gate");
}

#[tokio::test]
async fn equal_items_at_the_same_time_share_one_pass() {
    let rig = Arc::new(rig(EncoderConfig::default(), 0).await);
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let rig = rig.clone();
            tokio::spawn(async move { encode(&rig, request(&photo(), 56)).await })
        })
        .collect();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    rig.gate.add_permits(1);
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().embedding.unwrap().num_rows, 4);
    }
    assert_eq!(rig.passes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn broken_bytes_fail_alone() {
    let rig = rig(EncoderConfig::default(), 1).await;
    let mut broken = photo().to_vec();
    broken.truncate(1000);
    let status = encode(&rig, request(&broken.into(), 56)).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status)),
        (tonic::Code::InvalidArgument, "INVALID_MEDIA".into())
    );
    assert!(encode(&rig, request(&photo(), 56)).await.is_ok());
    assert_eq!(rig.service.num_outstanding(), 1, "only the good one waits to be pulled");
}

#[tokio::test]
async fn other_weights_are_refused() {
    let rig = rig(EncoderConfig::default(), 1).await;
    let mut request = request(&photo(), 56);
    if let Some(pb::encode_request::Part::Header(header)) = &mut request[0].part {
        header.embedding_key = vec![9; 32].into();
    }
    let status = encode(&rig, request).await.unwrap_err();
    assert_eq!(reason(&status), "MODEL_MISMATCH", "{status}");
}

#[tokio::test]
async fn queued_pixels_are_bounded() {
    let config = EncoderConfig { max_queued_pixels: 56 * 56, ..EncoderConfig::default() };
    let rig = Arc::new(rig(config, 0).await);
    let running = tokio::spawn({
        let rig = rig.clone();
        async move { encode(&rig, request(&photo(), 56)).await }
    });
    while rig.service.num_outstanding() == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let status = encode(&rig, request(&photo(), 84)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
    rig.gate.add_permits(1);
    assert!(running.await.unwrap().is_ok());
}

#[tokio::test]
async fn an_item_larger_than_a_pass_is_refused() {
    let config = EncoderConfig { max_batch_patches: 16, ..EncoderConfig::default() };
    let rig = rig(config, 0).await;
    let status = encode(&rig, request(&photo(), 112)).await.unwrap_err();
    assert_eq!(reason(&status), "REQUEST_TOO_LARGE", "{status}");
}

#[tokio::test]
async fn a_draining_encoder_takes_nothing_new_but_serves_pulls() {
    let rig = rig(EncoderConfig::default(), 2).await;
    let done = encode(&rig, request(&photo(), 56)).await.unwrap();
    rig.service.drain();
    let status = encode(&rig, request(&photo(), 84)).await.unwrap_err();
    assert_eq!(reason(&status), "DRAINING", "{status}");
    let load = rig.client.clone().load(pb::LoadRequest {}).await.unwrap_err();
    assert_eq!(reason(&load), "DRAINING", "routers hear of it without trying: {load}");
    assert_eq!(rig.service.num_outstanding(), 1);
    fetch(&rig, done.embedding.unwrap().key).await.unwrap();
    assert_eq!(rig.service.num_outstanding(), 0);
}

#[tokio::test]
async fn an_abandoned_item_leaves_the_queue() {
    let rig = Arc::new(rig(EncoderConfig::default(), 0).await);
    let call = tokio::spawn({
        let rig = rig.clone();
        async move { encode(&rig, request(&photo(), 56)).await }
    });
    while rig.service.num_outstanding() == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    call.abort();
    while rig.service.num_outstanding() > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    rig.gate.add_permits(2);
    assert!(encode(&rig, request(&photo(), 84)).await.is_ok());
}

#[tokio::test]
async fn an_unknown_embedding_cannot_be_pulled() {
    let rig = rig(EncoderConfig::default(), 0).await;
    let status = fetch(&rig, vec![5; 32].into()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status)), (tonic::Code::NotFound, "MEDIA_NOT_FOUND".into()));
}
