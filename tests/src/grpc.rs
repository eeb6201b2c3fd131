//! A blocking gRPC client. All clients share one small runtime, which keeps their connections going
//! while a test thinks.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use tessera_proto::common::v1::{ErrorDetail, FinishReason, PositionLogprobs};
use tessera_proto::decoder::v1::decoder_client::DecoderClient;
use tessera_proto::decoder::v1::{HealthRequest, HealthResponse};
use tessera_proto::error_detail;
use tessera_proto::inference::v1::get_cluster_response::Group;
use tessera_proto::inference::v1::inference_client::InferenceClient;
use tessera_proto::inference::v1::{
    Completion, GenerateOnceResponse, GenerateRequest, GenerateResponse, GetClusterRequest,
    GetClusterResponse, GetModelRequest, GetModelResponse, PromptInfo, TokenizeRequest,
    TokenizeResponse, ToolCall, ToolCallDelta, UploadMediaRequest, UploadMediaResponse,
    generate_response::Event,
};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::wait;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of one message of an upload.
const UPLOAD_CHUNK_BYTES: usize = 1 << 20;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().expect("a runtime")
    })
}

/// Runs `future`, which must end within the bound.
fn block_on<T>(what: &str, future: impl Future<Output = T>) -> T {
    let bounded = async { tokio::time::timeout(wait::BOUND, future).await };
    runtime().block_on(bounded).unwrap_or_else(|_| panic!("{what}: no end after {:?}", wait::BOUND))
}

/// Client of one router.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects at the first call.
    pub fn new(address: SocketAddr) -> Self {
        let _inside = runtime().enter();
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URL");
        Self { channel: endpoint.connect_timeout(CONNECT_TIMEOUT).connect_lazy() }
    }

    fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone())
    }

    /// # Errors
    /// The server's status, as with all calls here.
    pub fn generate_once(
        &self,
        request: GenerateRequest,
    ) -> Result<GenerateOnceResponse, Box<Status>> {
        let call = async { self.inference().generate_once(request).await };
        Ok(block_on("GenerateOnce", call)?.into_inner())
    }

    /// Starts a streamed answer.
    ///
    /// # Errors
    /// The server's status.
    pub fn generate(&self, request: GenerateRequest) -> Result<Events, Box<Status>> {
        let call = async { self.inference().generate(request).await };
        Ok(Events { stream: block_on("Generate", call)?.into_inner() })
    }

    /// A streamed answer, whole.
    ///
    /// # Errors
    /// The server's status, at the start or on the way.
    ///
    /// # Panics
    /// When the events come in an order that the service does not promise.
    pub fn answer(&self, request: GenerateRequest) -> Result<Answer, Box<Status>> {
        let mut answer = Answer::default();
        for event in self.generate(request)? {
            answer.add(event?);
        }
        assert!(answer.completion.is_some(), "the stream ended without its completion: {answer:?}");
        Ok(answer)
    }

    /// Uploads a file in chunks.
    ///
    /// # Errors
    /// The server's status.
    pub fn upload(&self, file: &[u8]) -> Result<UploadMediaResponse, Box<Status>> {
        let chunks: Vec<_> = file
            .chunks(UPLOAD_CHUNK_BYTES)
            .map(|chunk| UploadMediaRequest { chunk: chunk.to_vec().into() })
            .collect();
        let call = async { self.inference().upload_media(tokio_stream::iter(chunks)).await };
        Ok(block_on("UploadMedia", call)?.into_inner())
    }

    /// # Errors
    /// The server's status.
    pub fn tokenize(&self, request: TokenizeRequest) -> Result<TokenizeResponse, Box<Status>> {
        let call = async { self.inference().tokenize(request).await };
        Ok(block_on("Tokenize", call)?.into_inner())
    }

    /// # Errors
    /// The server's status.
    pub fn model(&self) -> Result<GetModelResponse, Box<Status>> {
        let call = async { self.inference().get_model(GetModelRequest {}).await };
        Ok(block_on("GetModel", call)?.into_inner())
    }

    /// # Errors
    /// The server's status.
    pub fn cluster(&self) -> Result<GetClusterResponse, Box<Status>> {
        let call = async { self.inference().get_cluster(GetClusterRequest {}).await };
        Ok(block_on("GetCluster", call)?.into_inner())
    }

    /// The only group.
    ///
    /// # Panics
    /// When the router does not answer or knows of no or several groups.
    pub fn group(&self) -> Group {
        let mut groups = self.cluster().expect("the router answers").groups;
        assert_eq!(groups.len(), 1, "{groups:?}");
        groups.remove(0)
    }

    /// Whether the health service says that a request would succeed; an unreachable server is not.
    pub fn is_serving(&self, service: &str) -> bool {
        let request = HealthCheckRequest { service: service.to_owned() };
        let call = async { HealthClient::new(self.channel.clone()).check(request).await };
        block_on("Health.Check", call)
            .is_ok_and(|reply| reply.get_ref().status() == ServingStatus::Serving)
    }

    /// Names of services that reflection lists.
    pub fn services(&self) -> Vec<String> {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let call = async {
            let mut client = ServerReflectionClient::new(self.channel.clone());
            let requests = tokio_stream::once(request);
            client.server_reflection_info(requests).await?.into_inner().message().await
        };
        let reply = block_on("reflection", call).expect("the server reflects").expect("a reply");
        match reply.message_response {
            Some(MessageResponse::ListServicesResponse(list)) => {
                list.service.into_iter().map(|service| service.name).collect()
            }
            other => panic!("not a list of services: {other:?}"),
        }
    }
}

/// The first health report of a group's leader in the cluster `default`.
///
/// # Panics
/// When it cannot be had.
pub fn leader_health(group: &Group) -> HealthResponse {
    let request = HealthRequest { cluster: "default".to_owned(), group: group.name.clone() };
    let address = &group.address;
    let call = async {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URL");
        let mut client = DecoderClient::new(endpoint.connect().await.expect("the leader listens"));
        client.health(request).await?.into_inner().message().await
    };
    block_on("Decoder.Health", call).expect("the leader reports").expect("a report")
}

/// Waits for a group that computes for a client, and returns it. The canary of an idle group takes a few
/// steps now and then, and counts as running meanwhile; a client's sequence takes step after step.
pub fn wait_busy_group(client: &Client) -> Group {
    const MORE_THAN_A_CANARY: u64 = 50;
    let groups = client.cluster().expect("the router answers").groups;
    let steps = |group: &Group| leader_health(group).steps;
    let before: Vec<u64> = groups.iter().map(steps).collect();
    wait::for_value("a group computes", || {
        let mut pairs = groups.iter().zip(&before);
        let (busy, _) =
            pairs.find(|(group, before)| steps(group) > **before + MORE_THAN_A_CANARY)?;
        Some(busy.clone())
    })
}

/// A streamed answer on its way. Dropping it cancels the request.
#[derive(Debug)]
pub struct Events {
    stream: Streaming<GenerateResponse>,
}

impl Iterator for Events {
    type Item = Result<Event, Box<Status>>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = block_on("the next event", self.stream.message()).transpose()?;
        Some(next.map(|response| response.event.expect("no event is empty")).map_err(Box::new))
    }
}

/// A whole streamed answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    pub prompt: Option<PromptInfo>,
    /// Of every prompt token but the first.
    pub prompt_logprobs: Vec<PositionLogprobs>,
    pub choices: BTreeMap<u32, AnswerChoice>,
    pub completion: Option<Completion>,
}

/// One choice of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AnswerChoice {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<PositionLogprobs>,
    pub tool_calls: Vec<ToolCall>,
    pub reason: FinishReason,
    pub matched_stop: String,
}

impl AnswerChoice {
    fn add_call(&mut self, delta: ToolCallDelta) {
        if delta.index as usize == self.tool_calls.len() {
            assert!(
                !delta.id.is_empty() && !delta.name.is_empty(),
                "a call without name: {delta:?}"
            );
            self.tool_calls.push(ToolCall {
                id: delta.id,
                name: delta.name,
                ..ToolCall::default()
            });
        }
        self.tool_calls[delta.index as usize].arguments.push_str(&delta.arguments);
    }
}

impl Answer {
    /// Adds one event.
    ///
    /// # Panics
    /// When it comes out of order.
    pub fn add(&mut self, event: Event) {
        assert!(self.completion.is_none(), "an event after the completion: {event:?}");
        if let Event::Prompt(prompt) = event {
            assert!(
                self.prompt.is_none() && self.choices.is_empty(),
                "prompt information came late"
            );
            self.prompt = Some(prompt);
            return;
        }
        assert!(self.prompt.is_some(), "an event before the prompt information: {event:?}");
        match event {
            Event::Prompt(_) => unreachable!("handled above"),
            Event::Delta(delta) => {
                let choice = self.choices.entry(delta.choice).or_default();
                assert_eq!(choice.reason, FinishReason::Unspecified, "a delta after the finish");
                choice.text.push_str(&delta.text);
                choice.token_ids.extend(delta.token_ids);
                choice.logprobs.extend(delta.logprobs);
                delta.tool_calls.into_iter().for_each(|call| choice.add_call(call));
            }
            Event::PromptLogprobs(piece) => {
                assert!(self.choices.is_empty(), "prompt log probabilities came late");
                assert_eq!(piece.first_token as usize, 1 + self.prompt_logprobs.len());
                self.prompt_logprobs.extend(piece.tokens);
            }
            Event::Finish(finish) => {
                let choice = self.choices.entry(finish.choice).or_default();
                assert_eq!(choice.reason, FinishReason::Unspecified, "a second finish");
                choice.reason = finish.reason();
                choice.matched_stop = finish.matched_stop;
            }
            Event::Completion(completion) => {
                let finished = |choice: &AnswerChoice| choice.reason != FinishReason::Unspecified;
                assert!(self.choices.values().all(finished), "the completion came early");
                self.completion = Some(completion);
            }
        }
    }

    /// The only choice.
    ///
    /// # Panics
    /// When there is none or there are several.
    pub fn choice(&self) -> &AnswerChoice {
        assert_eq!(self.choices.len(), 1, "{self:?}");
        &self.choices[&0]
    }

    pub fn prompt(&self) -> &PromptInfo {
        self.prompt.as_ref().expect("prompt information came")
    }

    pub fn completion(&self) -> &Completion {
        self.completion.as_ref().expect("the completion came")
    }
}

/// The typed detail that every error of a router carries.
///
/// # Panics
/// When the status has none.
pub fn detail(status: &Status) -> ErrorDetail {
    error_detail(status).unwrap_or_else(|| panic!("no typed detail: {status:?}"))
}
