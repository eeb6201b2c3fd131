//! A cluster of one router, one scripted decoder group, one scripted encoder and an embedded store, all
//! over loopback. Tests hold the decoder's side of every stream.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::Stream;
use futures::stream::BoxStream;
use prost::bytes::Bytes;
use serde_json::{Value, json};
use tessera_cluster::{
    ActiveRecord, ActiveState, ClusterName, DecoderCapacity, EncoderMember, GroupName, Keys,
    MemberInfo, MemberRole, ModelIdentity, Record, SlotAssignment,
};
use tessera_membership::{EmbeddedConfig, EmbeddedStore, MembershipUrl, Store, StoreConfig};
use tessera_processor::Tokenizer;
use tessera_proto::common::v1 as common;
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::decoder_server::{Decoder, DecoderServer};
use tessera_proto::encoder::v1 as epb;
use tessera_proto::encoder::v1::encoder_server::{Encoder, EncoderServer};
use tessera_router::{Listeners, Router, RouterConfig, RouterError};
use tessera_types::{Epoch, Hash256, InstanceId, ModelFingerprint, NumericsId, Rank};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::client;

pub const MODEL: &str = "tiny";
/// The group's epoch.
pub const EPOCH: u64 = 7;
/// Context of the fake group.
pub const MAX_MODEL_LEN: u32 = 1024;
/// Messages that a decoder may have under way to a router that does not read.
pub const DECODER_QUEUE: usize = 4;

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)
}

/// A committed image.
pub fn image(name: &str) -> Vec<u8> {
    std::fs::read(fixture("media").join(name)).expect("a committed file")
}

/// Token ids of plain text.
pub fn tokens(text: &str) -> Vec<u32> {
    let file = fixture("tiny/tokenizer.json");
    let tokenizer = Tokenizer::load(&file).expect("a committed tokenizer");
    let mut ids = Vec::new();
    tokenizer.encode_plain(text, &mut ids).expect("encodes");
    ids
}

pub fn model_identity(name: &str) -> ModelIdentity {
    let hash = |byte| Hash256([byte; 32]);
    ModelIdentity {
        name: name.to_owned(),
        language_fingerprint: ModelFingerprint(hash(1)),
        vision_fingerprint: ModelFingerprint(hash(2)),
        language_numerics: NumericsId(hash(3)),
        vision_numerics: NumericsId(hash(4)),
    }
}

/// A chat body with one user message.
pub fn ask(text: &str) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": text}]})
}

/// `body` with the fields of `extra`.
pub fn with(mut body: Value, extra: Value) -> Value {
    let fields = extra.as_object().expect("an object").clone();
    body.as_object_mut().expect("an object").extend(fields);
    body
}

/// One `Generate` stream, seen from the decoder.
pub struct Attempt {
    pub start: pb::Start,
    requests: Streaming<pb::GenerateRequest>,
    replies: mpsc::Sender<Result<pb::GenerateResponse, Status>>,
    num_output: u32,
}

impl Attempt {
    async fn reply(&self, message: pb::generate_response::Message) {
        let sent = self.replies.send(Ok(pb::GenerateResponse { message: Some(message) })).await;
        sent.expect("the router reads");
    }

    pub async fn accept(&mut self) {
        self.reply(pb::generate_response::Message::Accepted(pb::Accepted {
            attempt: self.start.attempt,
            epoch: EPOCH,
            num_cached_tokens: 2,
            numerics_id: String::new(),
        }))
        .await;
    }

    fn tokens_message(&mut self, ids: &[u32], logprobs: bool) -> pb::generate_response::Message {
        let record = |&token_id: &u32| {
            let output_index = self.num_output;
            self.num_output += 1;
            let logprobs = logprobs.then(|| common::PositionLogprobs {
                logprob: -0.25,
                top: (0..5)
                    .map(|i| common::TokenLogprob { token_id: i, logprob: -0.25 - i as f32 })
                    .collect(),
            });
            pb::TokenRecord { output_index, token_id, logprobs }
        };
        let records = ids.iter().map(record).collect();
        pb::generate_response::Message::Tokens(pb::Tokens { attempt: self.start.attempt, records })
    }

    /// Draws tokens, in one message.
    pub async fn say(&mut self, ids: &[u32]) {
        let logprobs = self.start.sampling.as_ref().is_some_and(|s| s.logprobs.is_some());
        let message = self.tokens_message(ids, logprobs);
        self.reply(message).await;
    }

    /// Draws tokens, or says that the router has dropped the stream.
    pub async fn try_say(&mut self, ids: &[u32]) -> bool {
        let message = Some(self.tokens_message(ids, true));
        self.replies.send(Ok(pb::GenerateResponse { message })).await.is_ok()
    }

    pub async fn say_text(&mut self, text: &str) {
        self.say(&tokens(text)).await;
    }

    /// Repeats a record that was sent already, under an attempt number of choice.
    pub async fn say_stale(&mut self, attempt: u32, output_index: u32, token_id: u32) {
        let record = pb::TokenRecord { output_index, token_id, logprobs: None };
        let tokens = pb::Tokens { attempt, records: vec![record] };
        self.reply(pb::generate_response::Message::Tokens(tokens)).await;
    }

    pub async fn finish(self, reason: common::FinishReason) {
        self.reply(pb::generate_response::Message::Finished(pb::Finished {
            attempt: self.start.attempt,
            reason: reason.into(),
            num_output_tokens: self.num_output,
            num_cached_tokens: 2,
            queue_ms: 0.0,
            prefill_ms: 0.0,
        }))
        .await;
    }

    pub async fn fail(self, status: impl Into<Status>) {
        self.replies.send(Err(status.into())).await.expect("the router reads");
    }

    /// Log probability `-i` for prompt token `i`, for these.
    pub async fn say_prompt_logprobs(&mut self, range: std::ops::Range<u32>) {
        let position =
            |i: u32| common::PositionLogprobs { logprob: -(i as f32), ..Default::default() };
        self.reply(pb::generate_response::Message::PromptLogprobs(pb::PromptLogprobs {
            attempt: self.start.attempt,
            first_token: range.start,
            tokens: range.map(position).collect(),
        }))
        .await;
    }

    pub async fn need_media(&mut self, items: &[u32]) {
        self.reply(pb::generate_response::Message::MediaNeeded(pb::MediaNeeded {
            attempt: self.start.attempt,
            items: items.to_vec(),
        }))
        .await;
    }

    pub async fn media_at(&mut self) -> pb::MediaAt {
        match self.requests.message().await.expect("no error").expect("a message").message {
            Some(pb::generate_request::Message::MediaAt(media_at)) => media_at,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the router has dropped the stream.
    pub async fn cancelled(self) {
        self.replies.closed().await;
    }

    /// Whether there is room for a message within `wait`.
    pub async fn has_room(&mut self, wait: Duration) -> bool {
        tokio::time::timeout(wait, self.replies.reserve()).await.is_ok()
    }
}

struct FakeDecoder {
    attempts: mpsc::Sender<Attempt>,
    state: watch::Receiver<pb::GroupState>,
}

type Replies<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl Decoder for FakeDecoder {
    type GenerateStream = ReceiverStream<Result<pb::GenerateResponse, Status>>;
    type HealthStream = Replies<pb::HealthResponse>;

    async fn generate(
        &self,
        request: Request<Streaming<pb::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(pb::generate_request::Message::Start(start)) = first else {
            return Err(Status::invalid_argument("start comes first"));
        };
        let (replies, receiver) = mpsc::channel(DECODER_QUEUE);
        let attempt = Attempt { start, requests, replies, num_output: 0 };
        self.attempts.send(attempt).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn load(
        &self,
        _: Request<pb::LoadRequest>,
    ) -> Result<Response<pb::LoadResponse>, Status> {
        Ok(Response::new(pb::LoadResponse::default()))
    }

    async fn health(
        &self,
        _: Request<pb::HealthRequest>,
    ) -> Result<Response<Self::HealthStream>, Status> {
        Ok(Response::new(Box::pin(reports(self.state.clone()))))
    }
}

/// The state at once, on every change, and often.
fn reports(
    state: watch::Receiver<pb::GroupState>,
) -> impl Stream<Item = Result<pb::HealthResponse, Status>> {
    futures::stream::unfold((state, true), |(mut state, at_once)| async move {
        if !at_once {
            // Neither a change nor its absence needs an answer.
            let _ = tokio::time::timeout(Duration::from_millis(100), state.changed()).await;
        }
        let group_state = *state.borrow_and_update();
        let load = pb::LoadResponse { kv_blocks: 64, kv_blocks_free: 64, ..Default::default() };
        let report = pb::HealthResponse {
            epoch: EPOCH,
            state: group_state.into(),
            load: Some(load),
            ..Default::default()
        };
        Some((Ok(report), (state, false)))
    })
}

/// What the encoder was sent, and how it is to answer.
#[derive(Default)]
pub struct EncoderScript {
    pub received: Vec<(epb::EncodeHeader, Vec<u8>)>,
    /// Answers for the next calls; then success.
    pub failures: Vec<Status>,
    pub cache_hit: bool,
}

struct FakeEncoder {
    script: Arc<Mutex<EncoderScript>>,
}

#[tonic::async_trait]
impl Encoder for FakeEncoder {
    type FetchStream = Replies<epb::FetchResponse>;

    async fn describe(
        &self,
        _: Request<Streaming<epb::EncodeRequest>>,
    ) -> Result<Response<epb::DescribeResponse>, Status> {
        Err(Status::unimplemented("not used by routers"))
    }

    async fn encode(
        &self,
        request: Request<Streaming<epb::EncodeRequest>>,
    ) -> Result<Response<epb::EncodeResponse>, Status> {
        let mut messages = request.into_inner();
        let (mut header, mut bytes) = (None, Vec::new());
        while let Some(message) = messages.message().await? {
            match message.part.expect("a part") {
                epb::encode_request::Part::Header(first) => header = Some(first),
                epb::encode_request::Part::Chunk(chunk) => bytes.extend_from_slice(&chunk.data),
            }
        }
        let header = header.expect("a header");
        let mut script = self.script.lock().expect("not poisoned");
        script.received.push((header.clone(), bytes));
        if !script.failures.is_empty() {
            return Err(script.failures.remove(0));
        }
        if header.cached_only && !script.cache_hit {
            return Err(Status::not_found("not in the cache"));
        }
        let embedding = epb::EmbeddingInfo { key: header.embedding_key, ..Default::default() };
        Ok(Response::new(epb::EncodeResponse {
            embedding: Some(embedding),
            cache_hit: script.cache_hit,
            ..Default::default()
        }))
    }

    async fn fetch(
        &self,
        _: Request<epb::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        Err(Status::unimplemented("not used by routers"))
    }

    async fn load(
        &self,
        _: Request<epb::LoadRequest>,
    ) -> Result<Response<epb::LoadResponse>, Status> {
        Ok(Response::new(epb::LoadResponse::default()))
    }
}

/// Everything running.
pub struct Cluster {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    pub encoder: Arc<Mutex<EncoderScript>>,
    pub encoder_address: String,
    pub group_state: watch::Sender<pb::GroupState>,
    pub keys: Keys,
    pub leader: InstanceId,
    pub decoder_address: String,
    /// `None` once it was taken down.
    pub store: Option<EmbeddedStore>,
    store_client: Store,
    attempts: mpsc::Receiver<Attempt>,
    shutdown: Option<oneshot::Sender<()>>,
    router: JoinHandle<Result<(), RouterError>>,
    servers: Vec<JoinHandle<()>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.router.abort();
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

impl Cluster {
    /// A router that is ready.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(edit: impl FnOnce(&mut RouterConfig)) -> Self {
        let cluster = Self::start_empty(edit).await;
        cluster.register(MODEL).await;
        cluster.wait_ready().await;
        cluster
    }

    /// A router whose cluster has no members yet.
    pub async fn start_empty(edit: impl FnOnce(&mut RouterConfig)) -> Self {
        let loopback: SocketAddr = "127.0.0.1:0".parse().expect("an address");
        let store =
            EmbeddedStore::bind(loopback, EmbeddedConfig::default()).await.expect("a store");
        let MembershipUrl::Etcd(endpoints) = store.url() else { panic!("a store has an address") };
        let store_client = Store::connect(StoreConfig::new(endpoints)).await.expect("a client");

        let (attempt_sender, attempts) = mpsc::channel(64);
        let (group_state, state) = watch::channel(pb::GroupState::Serving);
        let decoder = FakeDecoder { attempts: attempt_sender, state };
        let script = Arc::new(Mutex::new(EncoderScript::default()));
        let encoder = FakeEncoder { script: Arc::clone(&script) };
        let server = || tonic::transport::Server::builder().max_concurrent_streams(4096);
        let (decoder_address, decoder) =
            serve(server().add_service(DecoderServer::new(decoder))).await;
        let (encoder_address, encoder) =
            serve(server().add_service(EncoderServer::new(encoder))).await;

        let mut config = RouterConfig {
            membership: format!("etcd://{}", store.local_addr()),
            model: fixture("tiny"),
            model_name: MODEL.to_owned(),
            ..RouterConfig::default()
        };
        (config.http.listen, config.grpc.listen) = (loopback, loopback);
        // Encoders of tests do not come back.
        config.upstream.encoder_wait_ms = 100;
        edit(&mut config);
        let listeners = Listeners::bind(&config).await.expect("free ports");
        let address = |listener: &TcpListener| listener.local_addr().expect("is bound");
        let (http, grpc) = (address(&listeners.http), address(&listeners.grpc));
        let admin = address(&listeners.admin);
        let router = Router::new(config, listeners).await.expect("starts");
        let (shutdown, stopped) = oneshot::channel::<()>();
        let router = tokio::spawn(router.serve(async {
            let _ = stopped.await;
        }));
        Self {
            http,
            grpc,
            admin,
            encoder: script,
            encoder_address,
            group_state,
            keys: Keys::new(ClusterName::new("default").expect("a name")),
            leader: InstanceId::random(),
            decoder_address,
            store: Some(store),
            store_client,
            attempts,
            shutdown: Some(shutdown),
            router,
            servers: vec![decoder, encoder],
        }
    }

    /// Writes the records of group and encoder.
    pub async fn register(&self, model: &str) {
        let member = MemberInfo {
            instance: InstanceId::random(),
            address: self.encoder_address.clone(),
            build: String::new(),
            model: Some(model_identity(model)),
            role: MemberRole::Encoder(EncoderMember {
                device: "cpu".to_owned(),
                max_queued_pixels: 1 << 30,
                max_item_pixels: 1 << 24,
                cache_bytes: 1 << 20,
            }),
        };
        self.put(self.keys.member(member.instance), member.to_bytes()).await;
        let group = GroupName::new("g0").expect("a name");
        self.put(self.keys.active(&group), self.active(model).to_bytes()).await;
    }

    pub fn active(&self, model: &str) -> ActiveRecord {
        let slot = SlotAssignment {
            slot: 0,
            first_rank: Rank(0),
            num_ranks: 1,
            instance: self.leader,
            address: self.decoder_address.clone(),
            member_revision: 1,
        };
        ActiveRecord {
            epoch: Epoch(EPOCH),
            state: ActiveState::Serving,
            instance: self.leader,
            address: self.decoder_address.clone(),
            spec_digest: Hash256::default(),
            slots: vec![slot],
            model: model_identity(model),
            world_size: 1,
            capacity: DecoderCapacity {
                num_kv_blocks: 128,
                block_size: 16,
                max_sequences: 64,
                max_model_len: MAX_MODEL_LEN,
            },
        }
    }

    pub async fn put(&self, key: String, value: Vec<u8>) {
        self.store_client.put(&key, value, None).await.expect("the store takes it");
    }

    pub async fn wait_ready(&self) {
        while client::get(self.http, "/health").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The next stream that the router opens.
    pub async fn attempt(&mut self) -> Attempt {
        self.attempts.recv().await.expect("the decoder runs")
    }

    /// Stops the router as a signal would, and waits for its end.
    pub async fn shut_down(&mut self) -> Result<(), RouterError> {
        self.shutdown.take().expect("is asked once").send(()).expect("the router runs");
        (&mut self.router).await.expect("no panic")
    }

    /// All metrics of the router.
    pub async fn metrics(&self) -> String {
        String::from_utf8(client::get(self.admin, "/metrics").await.body).expect("is text")
    }

    /// The embedding keys that were asked for, as bytes.
    pub fn encoded_keys(&self) -> Vec<Bytes> {
        let script = self.encoder.lock().expect("not poisoned");
        script.received.iter().map(|(header, _)| header.embedding_key.clone()).collect()
    }
}

async fn serve(router: tonic::transport::server::Router) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("is bound").to_string();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tokio::spawn(async move {
        router.serve_with_incoming(incoming).await.expect("serves");
    });
    (address, server)
}
