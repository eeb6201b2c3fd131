//! The gRPC face: `tessera.inference.v1.Inference`. Requests become [`crate::request::ChatRequest`]s and
//! events become messages; everything else is the [`Service`]'s.
//!
//! Modules: `request` (messages in), `reply` (messages out), `upload` (media in chunks).

mod reply;
mod request;
mod upload;

use std::pin::Pin;

use futures::{Stream, StreamExt, stream};
use tessera_cluster::Verdict;
use tessera_proto::MAX_MESSAGE_BYTES;
use tessera_proto::inference::v1 as pb;
use tessera_proto::inference::v1::inference_server::Inference;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::error::RequestError;
use crate::events::{Event, Generation};
use crate::metrics::CallGuard;
use crate::request::{TENANT_HEADER, tenant_id};
use crate::service::Service;
use reply::{OnceReply, Replies};

/// Bytes of the log probabilities of one position at most, without the most likely tokens.
const POSITION_BYTES: usize = 8;
/// Bytes of one most likely token at most.
const TOP_BYTES: usize = 13;

/// The service on one router.
#[derive(Debug, Clone)]
pub(crate) struct InferenceService {
    service: Service,
}

impl InferenceService {
    pub(crate) fn new(service: Service) -> Self {
        Self { service }
    }

    fn call(&self, name: &'static str) -> CallGuard {
        self.service.metrics().call("grpc", name, code_name(Code::Cancelled))
    }

    async fn begin(
        &self,
        request: pb::GenerateRequest,
        metadata: &MetadataMap,
    ) -> Result<Generation, RequestError> {
        let arrival = Instant::now();
        self.service.admission().check_room()?;
        let tenant = tenant_id(metadata.get(TENANT_HEADER).map(|name| name.as_bytes()))?;
        let mut held = self.service.admission().held_bytes();
        let limits = &self.service.config().limits;
        let request = request::chat_request(request, tenant, arrival, limits)?;
        held.grow(request.num_bytes())?;
        self.service.generate(request, held).await
    }
}

type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = GenerateStream;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<GenerateStream>, Status> {
        let mut call = self.call("generate");
        let (metadata, _, request) = request.into_parts();
        let replies = Replies { return_token_ids: request.return_token_ids };
        match self.begin(request, &metadata).await {
            Ok(generation) => Ok(Response::new(stream_of(generation, replies, call))),
            Err(error) => Err(refuse(error, &mut call)),
        }
    }

    async fn generate_once(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<pb::GenerateOnceResponse>, Status> {
        let mut call = self.call("generate_once");
        let (metadata, _, request) = request.into_parts();
        let num_choices = request.n.unwrap_or(1);
        let prompt_logprobs = request.sampling.as_ref().and_then(|s| s.prompt_logprobs);
        let replies = Replies { return_token_ids: request.return_token_ids };
        let reply = async {
            let mut generation = self.begin(request, &metadata).await?;
            check_reply_size(generation.prompt.prompt.tokens.len(), prompt_logprobs)?;
            let mut reply = OnceReply::new(&generation.prompt, replies, num_choices);
            while let Some(event) = generation.events.recv().await {
                if let Some(reply) = reply.add(event?) {
                    return Ok(reply);
                }
            }
            Err(RequestError::Cancelled)
        };
        finish(reply.await, &mut call)
    }

    async fn upload_media(
        &self,
        request: Request<Streaming<pb::UploadMediaRequest>>,
    ) -> Result<Response<pb::UploadMediaResponse>, Status> {
        let mut call = self.call("upload_media");
        finish(upload::receive(&self.service, request.into_inner()).await, &mut call)
    }

    async fn tokenize(
        &self,
        request: Request<pb::TokenizeRequest>,
    ) -> Result<Response<pb::TokenizeResponse>, Status> {
        let mut call = self.call("tokenize");
        let reply = async {
            let limits = &self.service.config().limits;
            let request = request::tokenize_request(request.into_inner(), limits)?;
            let mut held = self.service.admission().held_bytes();
            held.grow(request.num_bytes())?;
            let prepared = self.service.tokenize(request, held).await?;
            Ok(pb::TokenizeResponse {
                token_ids: prepared.prompt.tokens.clone(),
                media: prepared.media_info().iter().map(reply::media_info).collect(),
            })
        };
        finish(reply.await, &mut call)
    }

    async fn get_model(
        &self,
        _: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::GetModelResponse>, Status> {
        let mut call = self.call("get_model");
        let model = self.service.model();
        let processor = model.processor();
        let identity = self.service.upstream().identity();
        let reply = pb::GetModelResponse {
            name: model.name().to_owned(),
            max_model_len: self.service.max_model_len(),
            vocab_size: processor.config().vocab_size,
            eos_token_ids: processor.eos_token_ids().to_vec(),
            // Empty until a group has told it.
            fingerprint: identity
                .map(|identity| identity.model.language_fingerprint.to_string())
                .unwrap_or_default(),
        };
        finish(Ok(reply), &mut call)
    }

    async fn get_cluster(
        &self,
        _: Request<pb::GetClusterRequest>,
    ) -> Result<Response<pb::GetClusterResponse>, Status> {
        let mut call = self.call("get_cluster");
        finish(Ok(cluster(&self.service)), &mut call)
    }
}

/// Log probabilities of a long prompt would not fit one message.
fn check_reply_size(prompt_tokens: usize, logprobs: Option<u32>) -> Result<(), RequestError> {
    let Some(top) = logprobs else {
        return Ok(());
    };
    match prompt_tokens * (POSITION_BYTES + TOP_BYTES * top as usize) <= MAX_MESSAGE_BYTES / 2 {
        true => Ok(()),
        false => {
            let detail = "are too many for one message with this prompt; use Generate";
            Err(RequestError::invalid("prompt_logprobs", detail))
        }
    }
}

/// Prompt information, then events as they come. Dropping the stream cancels the request.
fn stream_of(generation: Generation, replies: Replies, call: CallGuard) -> GenerateStream {
    let Generation { prompt, events } = generation;
    let first = Ok(replies.prompt(&prompt));
    let rest = stream::unfold(Some((events, replies, call)), |state| async move {
        let (mut events, replies, mut call) = state?;
        let event = events.recv().await.unwrap_or(Err(RequestError::Cancelled));
        match event {
            Ok(event) => {
                let is_last = matches!(event, Event::Completion(_));
                if is_last {
                    call.set_code(code_name(Code::Ok));
                }
                let state = (!is_last).then_some((events, replies, call));
                Some((Ok(replies.event(event)), state))
            }
            Err(error) => Some((Err(refuse(error, &mut call)), None)),
        }
    });
    stream::iter([first]).chain(rest).boxed()
}

fn cluster(service: &Service) -> pb::GetClusterResponse {
    use pb::get_cluster_response::{Encoder, Group};
    service.upstream().with_view(|view, now| {
        let groups = view.groups(now).map(|group| Group {
            name: group.name.to_string(),
            epoch: group.epoch.0,
            address: group.record.address.clone(),
            state: verdict_name(group.verdict).to_owned(),
            world_size: group.record.world_size,
            running: group.load.running,
            waiting: group.load.waiting,
        });
        let encoders = view.encoders(now).map(|encoder| Encoder {
            instance: encoder.member.instance.to_string(),
            address: encoder.member.address.clone(),
            state: verdict_name(encoder.verdict).to_owned(),
            queued_pixels: encoder.load.queued_pixels,
        });
        let age = view.stale_since().map_or(0, |since| now.saturating_sub(since).as_millis());
        pb::GetClusterResponse {
            groups: groups.collect(),
            encoders: encoders.collect(),
            view_age_ms: age as u64,
        }
    })
}

fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ready => "ready",
        Verdict::Suspect => "suspect",
        Verdict::Draining => "draining",
        Verdict::Out => "out",
    }
}

fn finish<T>(reply: Result<T, RequestError>, call: &mut CallGuard) -> Result<Response<T>, Status> {
    match reply {
        Ok(reply) => {
            call.set_code(code_name(Code::Ok));
            Ok(Response::new(reply))
        }
        Err(error) => Err(refuse(error, call)),
    }
}

fn refuse(error: RequestError, call: &mut CallGuard) -> Status {
    let status = Status::from(error);
    call.set_code(code_name(status.code()));
    tracing::debug!(code = ?status.code(), error = status.message(), "request refused");
    status
}

/// The name of a code in the gRPC specification.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
