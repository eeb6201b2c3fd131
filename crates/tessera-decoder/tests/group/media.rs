//! Embeddings: asked for, pulled from an encoder, checked, used whole or not at all.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use tessera_cluster::ActiveRecord;
use tessera_proto::common::v1 as common;
use tessera_proto::decoder::v1 as decoder;
use tessera_proto::decoder::v1::generate_response::Message;
use tessera_proto::encoder::v1 as pb;
use tessera_proto::encoder::v1::encoder_server::{Encoder, EncoderServer};
use tessera_proto::{ErrorReason, error_detail};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::group::{Attempt, Client, Group, start_of};

/// The fixture's placeholder for a visual token, and its hidden size.
const IMAGE_PAD: u32 = 2060;
const HIDDEN_SIZE: u32 = 256;
/// Visual tokens of the item: a grid of 4 × 4 patches, merged.
const NUM_ROWS: u32 = 4;
const KEY: [u8; 32] = [9; 32];

/// What the encoder does when it is asked for an embedding.
#[derive(Debug, Clone, Copy)]
enum Answer {
    /// Rows made of this number.
    Rows(f32),
    NotFound,
    WrongDigest,
    TooShort,
    WrongShape,
    /// Says nothing.
    Silence,
}

/// Gives prepared answers, the last one again and again.
#[derive(Debug, Clone)]
struct FakeEncoder {
    answers: Arc<Mutex<VecDeque<Answer>>>,
}

type Chunks = Pin<Box<dyn Stream<Item = Result<pb::FetchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Encoder for FakeEncoder {
    type FetchStream = Chunks;

    async fn describe(
        &self,
        _: Request<Streaming<pb::EncodeRequest>>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        Err(Status::unimplemented("decoders do not ask this"))
    }

    async fn encode(
        &self,
        _: Request<Streaming<pb::EncodeRequest>>,
    ) -> Result<Response<pb::EncodeResponse>, Status> {
        Err(Status::unimplemented("decoders do not ask this"))
    }

    async fn load(
        &self,
        _: Request<pb::LoadRequest>,
    ) -> Result<Response<pb::LoadResponse>, Status> {
        Err(Status::unimplemented("decoders do not ask this"))
    }

    async fn fetch(&self, _: Request<pb::FetchRequest>) -> Result<Response<Chunks>, Status> {
        let answer = {
            let mut answers = self.answers.lock().expect("no test panics with it");
            if answers.len() > 1 { answers.pop_front() } else { answers.front().copied() }
        };
        let answer = answer.expect("at least one");
        match answer {
            Answer::NotFound => return Err(Status::not_found("evicted")),
            Answer::Silence => std::future::pending().await,
            _ => {}
        }
        let fill = if let Answer::Rows(fill) = answer { fill } else { 0.5 };
        let num_values = (NUM_ROWS * HIDDEN_SIZE) as usize;
        let value = |i: usize| fill * ((i % 17) as f32 - 8.0);
        let bytes: Vec<u8> = (0..num_values).flat_map(|i| value(i).to_le_bytes()).collect();
        let digest = match answer {
            Answer::WrongDigest => [0; 32],
            _ => *blake3::hash(&bytes).as_bytes(),
        };
        let info = pb::EmbeddingInfo {
            key: KEY.to_vec().into(),
            num_rows: if matches!(answer, Answer::WrongShape) { NUM_ROWS + 1 } else { NUM_ROWS },
            num_cols: HIDDEN_SIZE,
            dtype: pb::DType::F32.into(),
            digest: digest.to_vec().into(),
        };
        let sent = if matches!(answer, Answer::TooShort) { bytes.len() - 4 } else { bytes.len() };
        // Chunks that cut values in the middle.
        let data = bytes[..sent]
            .chunks(1001)
            .map(|chunk| pb::fetch_response::Part::Data(chunk.to_vec().into()));
        let parts: Vec<_> =
            std::iter::once(pb::fetch_response::Part::Info(info)).chain(data).collect();
        let responses = parts.into_iter().map(|part| Ok(pb::FetchResponse { part: Some(part) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(responses))))
    }
}

/// Serves the answers; returns the encoder's address.
fn encoder(client: &Client, answers: impl IntoIterator<Item = Answer>) -> String {
    let service = FakeEncoder { answers: Arc::new(Mutex::new(answers.into_iter().collect())) };
    client.runtime().block_on(async {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = tokio::net::TcpListener::bind(any).await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(EncoderServer::new(service));
        tokio::spawn(server.serve_with_incoming(incoming));
        address.to_string()
    })
}

/// An attempt at a prompt with one image.
fn start(active: &ActiveRecord) -> decoder::Start {
    use decoder::position_span::Span;
    let tokens = [5, 6, IMAGE_PAD, IMAGE_PAD, IMAGE_PAD, IMAGE_PAD, 7, 8, 9];
    let mut start = start_of(active, &tokens, 12);
    let grid = decoder::PositionGrid { t: 1, h: 2, w: 2, step: 0.0 };
    let spans = [Span::TextLen(2), Span::Grid(grid), Span::TextLen(3)];
    let prompt = start.prompt.as_mut().expect("set");
    prompt.positions =
        spans.into_iter().map(|span| decoder::PositionSpan { span: Some(span) }).collect();
    prompt.media = vec![decoder::MediaSpan {
        item: 3,
        kind: common::MediaKind::Image.into(),
        offset: 2,
        num_tokens: NUM_ROWS,
        grid: Some(common::GridThw { t: 1, h: 4, w: 4 }),
        seconds_per_grid: 0.0,
        embedding_key: KEY.to_vec().into(),
    }];
    start
}

fn media_at(endpoint: &str) -> decoder::generate_request::Message {
    decoder::generate_request::Message::MediaAt(decoder::MediaAt {
        item: 3,
        endpoint: endpoint.to_owned(),
        embedding_key: KEY.to_vec().into(),
    })
}

/// Answers every question for the item with `endpoint`; returns the tokens and how often it was asked.
fn run(attempt: &mut Attempt<'_>, endpoint: &str) -> Result<(Vec<u32>, usize), Status> {
    let (mut tokens, mut asked) = (Vec::new(), 0);
    loop {
        match attempt.next()? {
            Message::MediaNeeded(needed) => {
                assert_eq!(needed.items, [3]);
                asked += 1;
                attempt.send(media_at(endpoint));
            }
            Message::Tokens(records) => tokens.extend(records.records.iter().map(|r| r.token_id)),
            Message::Finished(_) => return Ok((tokens, asked)),
            Message::Accepted(_) | Message::PromptLogprobs(_) => {}
        }
    }
}

fn tokens_with(fill: f32) -> Vec<u32> {
    let group = Group::start(2, 1);
    let client = group.client();
    let endpoint = encoder(&client, [Answer::Rows(fill)]);
    let mut attempt = client.generate(start(&client.active()));
    let (tokens, asked) = run(&mut attempt, &endpoint).expect("it finishes");
    assert_eq!((tokens.len(), asked), (12, 1));
    tokens
}

#[test]
fn tokens_depend_on_the_embedding_that_was_pulled() {
    let bright = tokens_with(0.5);
    assert_eq!(tokens_with(0.5), bright);
    assert_ne!(tokens_with(-0.25), bright, "the rows were not used");
}

#[test]
fn a_pull_that_fails_is_asked_for_again_and_spoils_nothing() {
    let expected = tokens_with(0.5);
    let broken = [
        Answer::NotFound,
        Answer::WrongDigest,
        Answer::TooShort,
        Answer::WrongShape,
        Answer::Silence,
    ];
    let group = Group::start_with(2, 1, |config| {
        config.fetch_timeout_ms = 300;
        config.max_fetches = 6;
    });
    let client = group.client();
    let endpoint = encoder(&client, broken.into_iter().chain([Answer::Rows(0.5)]));
    let mut attempt = client.generate(start(&client.active()));
    let (tokens, asked) = run(&mut attempt, &endpoint).expect("it finishes");
    assert_eq!((tokens, asked), (expected, 6));
}

#[test]
fn an_item_that_cannot_be_had_fails_its_own_request_only() {
    let group = Group::start(1, 1);
    let client = group.client();
    let endpoint = encoder(&client, [Answer::NotFound]);
    let mut attempt = client.generate(start(&client.active()));
    let status = run(&mut attempt, &endpoint).expect_err("three pulls failed");
    let detail = error_detail(&status).expect("a typed error");
    assert_eq!(
        (detail.reason.as_str(), detail.retryable),
        (ErrorReason::EncoderFailed.name(), true)
    );
    let mut attempt = client.generate(start(&client.active()));
    loop {
        if let Message::MediaNeeded(_) = attempt.next().expect("it is asked for") {
            break;
        }
    }
    let failed = decoder::MediaFailed { item: 3, reason: "not an image".into() };
    attempt.send(decoder::generate_request::Message::MediaFailed(failed));
    let status = attempt.end().expect_err("the router gave up");
    assert!(status.message().contains("not an image"), "{status}");
    assert_eq!(client.complete(&[1, 2, 3], 4).len(), 4, "the group goes on");
    client.wait_until_idle();
}

#[test]
fn a_location_of_something_else_is_refused() {
    let group = Group::start(1, 1);
    let client = group.client();
    let wrong = [
        decoder::MediaAt { item: 4, endpoint: "x:1".into(), embedding_key: KEY.to_vec().into() },
        decoder::MediaAt { item: 3, endpoint: "x:1".into(), embedding_key: vec![1; 32].into() },
    ];
    for at in wrong {
        let mut attempt = client.generate(start(&client.active()));
        attempt.send(decoder::generate_request::Message::MediaAt(at));
        let status = attempt.end().expect_err("refused");
        let detail = error_detail(&status).expect("a typed error");
        assert_eq!(detail.reason, ErrorReason::InvalidArgument.name(), "{status}");
    }
    client.wait_until_idle();
}
