//! The same path over gRPC, uploads, health and reflection.

use prost::bytes::Bytes;
use tessera_proto::common::v1 as common;
use tessera_proto::error_detail;
use tessera_proto::inference::v1 as pb;
use tessera_proto::inference::v1::generate_response::Event;
use tessera_proto::inference::v1::inference_client::InferenceClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::cluster::{Cluster, EPOCH, MAX_MODEL_LEN, MODEL, image, tokens};

async fn channel(cluster: &Cluster) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.grpc)).expect("an address");
    endpoint.connect().await.expect("connects")
}

async fn client(cluster: &Cluster) -> InferenceClient<Channel> {
    InferenceClient::new(channel(cluster).await)
}

fn text(text: &str) -> pb::ContentPart {
    pb::ContentPart { part: Some(pb::content_part::Part::Text(text.to_owned())) }
}

fn request(parts: Vec<pb::ContentPart>) -> pb::GenerateRequest {
    let message = pb::Message { role: "user".to_owned(), parts, ..Default::default() };
    pb::GenerateRequest {
        request_id: "r-1".to_owned(),
        messages: vec![message],
        return_token_ids: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_stream_tells_prompt_deltas_finish_and_completion() {
    let mut cluster = Cluster::start().await;
    let mut client = client(&cluster).await;
    let asking = tokio::spawn(async move { client.generate(request(vec![text("hello")])).await });
    let mut attempt = cluster.attempt().await;
    assert_eq!(attempt.start.request_id, "r-1");
    attempt.accept().await;
    let mut events = asking.await.expect("joins").expect("is accepted").into_inner();
    let mut next = async || events.message().await.map(|m| m.and_then(|m| m.event));
    let Ok(Some(Event::Prompt(prompt))) = next().await else { panic!("the prompt comes first") };
    assert_eq!((prompt.request_id.as_str(), prompt.model.as_str()), ("r-1", MODEL));
    assert_eq!(prompt.token_ids.len(), prompt.num_prompt_tokens as usize);
    attempt.say_text("hi").await;
    let Ok(Some(Event::Delta(delta))) = next().await else { panic!("a delta") };
    assert_eq!((delta.text.as_str(), delta.token_ids), ("hi", tokens("hi")));
    attempt.finish(common::FinishReason::Length).await;
    let Ok(Some(Event::Finish(finish))) = next().await else { panic!("a finish") };
    assert_eq!(finish.reason(), common::FinishReason::Length);
    let Ok(Some(Event::Completion(done))) = next().await else { panic!("a completion") };
    let usage = done.usage.expect("usage");
    assert_eq!((usage.num_prompt_tokens, usage.num_cached_tokens), (prompt.num_prompt_tokens, 2));
    let timings = done.timings.expect("timings");
    assert!(timings.total_ms >= timings.first_token_ms && timings.first_token_ms > 0.0);
    assert!(matches!(next().await, Ok(None)), "nothing follows");
}

#[tokio::test]
async fn once_gathers_everything() {
    let mut cluster = Cluster::start().await;
    let mut client = client(&cluster).await;
    let sampling = common::SamplingOptions { logprobs: Some(5), ..Default::default() };
    let body = pb::GenerateRequest {
        sampling: Some(sampling),
        n: Some(2),
        stop: vec!["END".to_owned()],
        ..request(vec![text("hello")])
    };
    let asking = tokio::spawn(async move { client.generate_once(body).await });
    for _ in 0..2 {
        let mut attempt = cluster.attempt().await;
        attempt.accept().await;
        let answer = ["zero END", "one"][attempt.start.choice as usize];
        attempt.say_text(answer).await;
        match attempt.start.choice {
            0 => attempt.cancelled().await,
            _ => attempt.finish(common::FinishReason::EndOfSequence).await,
        }
    }
    let reply = asking.await.expect("joins").expect("succeeds").into_inner();
    assert_eq!(reply.choices[0].text, "zero ");
    assert_eq!(reply.choices[0].reason(), common::FinishReason::StopString);
    assert_eq!(reply.choices[0].matched_stop, "END");
    assert_eq!(reply.choices[1].text, "one");
    assert_eq!(reply.choices[1].token_ids, tokens("one"));
    assert_eq!(reply.choices[1].logprobs.len(), tokens("one").len());
    assert_eq!(reply.choices[1].logprobs[0].top.len(), 5);
    assert!(reply.completion.is_some() && reply.prompt.is_some());
}

#[tokio::test]
async fn dropping_the_stream_cancels() {
    let mut cluster = Cluster::start().await;
    let mut client = client(&cluster).await;
    let asking = tokio::spawn(async move { client.generate(request(vec![text("hello")])).await });
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    drop(asking.await.expect("joins").expect("is accepted"));
    attempt.cancelled().await;
}

#[tokio::test]
async fn errors_carry_reason_field_and_hint() {
    let cluster = Cluster::start_empty(|_| {}).await;
    let mut client = client(&cluster).await;
    let status = client.generate_once(pb::GenerateRequest::default()).await.expect_err("is empty");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(error_detail(&status).expect("a detail").field, "messages");
    let status = client.generate(request(vec![text("x")])).await.expect_err("nothing serves");
    assert_eq!(status.code(), Code::Unavailable);
    let detail = error_detail(&status).expect("a detail");
    assert_eq!((detail.reason.as_str(), detail.retryable), ("NOT_READY", true));
    assert!(detail.retry_after_ms > 0);
}

#[tokio::test]
async fn an_upload_is_used_by_its_hash() {
    let mut cluster = Cluster::start().await;
    let mut client = client(&cluster).await;
    let bytes = Bytes::from(image("photo.jpg"));
    let chunks: Vec<_> = bytes.chunks(10_000).map(Bytes::copy_from_slice).collect();
    let chunks = chunks.into_iter().map(|chunk| pb::UploadMediaRequest { chunk });
    let upload = client.upload_media(futures::stream::iter(chunks)).await.expect("is kept");
    let upload = upload.into_inner();
    assert_eq!((upload.width, upload.height, upload.num_bytes), (600, 400, bytes.len() as u64));

    let part = |media_id: Bytes| {
        let source = Some(pb::media_source::Source::MediaId(media_id));
        let image = pb::Image { source: Some(pb::MediaSource { source }), ..Default::default() };
        pb::ContentPart { part: Some(pb::content_part::Part::Image(image)) }
    };
    let body = request(vec![part(upload.media_id.clone()), text("what is it?")]);
    let mut asker = client.clone();
    let asking = tokio::spawn(async move { asker.generate_once(body).await });
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.need_media(&[0]).await;
    attempt.media_at().await;
    attempt.finish(common::FinishReason::Length).await;
    let reply = asking.await.expect("joins").expect("succeeds").into_inner();
    let media = &reply.completion.expect("a completion").media[0];
    assert_eq!(media.media_id, upload.media_id);
    assert_eq!((media.source_width, media.source_height), (600, 400));
    assert_eq!(cluster.encoder.lock().expect("not poisoned").received[0].1, bytes);

    let unknown = request(vec![part(Bytes::from(vec![9; 32]))]);
    let status = client.generate_once(unknown).await.expect_err("is unknown");
    assert_eq!(status.code(), Code::NotFound);
    let chunk = Bytes::from_static(b"not an image");
    let broken = futures::stream::iter([pb::UploadMediaRequest { chunk }]);
    let status = client.upload_media(broken).await.expect_err("is no image");
    assert_eq!(error_detail(&status).expect("a detail").reason, "INVALID_MEDIA");
}

#[tokio::test]
async fn model_cluster_and_tokens_are_told() {
    let cluster = Cluster::start().await;
    let mut client = client(&cluster).await;
    let model = client.get_model(pb::GetModelRequest {}).await.expect("answers").into_inner();
    assert_eq!((model.name.as_str(), model.max_model_len), (MODEL, MAX_MODEL_LEN));
    assert_eq!((model.vocab_size, model.eos_token_ids), (2176, vec![2050, 2048]));
    assert_eq!(model.fingerprint, "01".repeat(32));
    let view = client.get_cluster(pb::GetClusterRequest {}).await.expect("answers").into_inner();
    let group = &view.groups[0];
    assert_eq!((group.name.as_str(), group.epoch, group.state.as_str()), ("g0", EPOCH, "ready"));
    assert_eq!(view.encoders[0].state, "ready");
    assert_eq!(view.view_age_ms, 0);
    let messages = request(vec![text("hello")]).messages;
    let body = pb::TokenizeRequest { messages, ..Default::default() };
    let reply = client.tokenize(body).await.expect("answers").into_inner();
    assert!(!reply.token_ids.is_empty());
}

#[tokio::test]
async fn health_and_reflection_are_served() {
    let cluster = Cluster::start_empty(|_| {}).await;
    let mut health = HealthClient::new(channel(&cluster).await);
    let service = "tessera.inference.v1.Inference".to_owned();
    let request = HealthCheckRequest { service: service.clone() };
    let mut watch = health.watch(request).await.expect("answers").into_inner();
    let mut status = async || watch.message().await.expect("no error").expect("a status").status();
    let mut seen = status().await;
    assert_ne!(seen, ServingStatus::Serving);
    cluster.register(MODEL).await;
    while seen != ServingStatus::Serving {
        seen = status().await;
    }
    let mut reflection = ServerReflectionClient::new(channel(&cluster).await);
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let replies = reflection.server_reflection_info(futures::stream::iter([list])).await;
    let reply = replies.expect("answers").into_inner().message().await.expect("no error");
    let Some(MessageResponse::ListServicesResponse(list)) = reply.and_then(|r| r.message_response)
    else {
        panic!("a list")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&service), "{names:?}");
    assert!(!names.iter().any(|name| name.contains("decoder")), "{names:?}");
}
