//! One question and its answer, by HTTP or gRPC.

mod grpc;
mod http;

use std::time::Instant;

use tokio::time::timeout;

use super::args::{Plan, Target};
use super::workload::Chat;
use crate::bench::error::BenchError;

use self::grpc::GrpcClient;
use self::http::HttpClient;

/// A connection to the server under load. Cheap to clone.
#[derive(Clone)]
pub enum Client {
    Http(HttpClient),
    Grpc(GrpcClient),
}

/// A chat with the answers it has had; the next question is that of turn `answers.len()`.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    pub chat: &'a Chat,
    pub answers: &'a [String],
}

/// What came back, and when.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Arrivals of pieces that held output, in order.
    pub pieces: Vec<Instant>,
    pub text: String,
    pub num_prompt_tokens: Option<u64>,
    pub num_cached_tokens: Option<u64>,
    /// As the server counts them; a server that does not is believed to send one per piece.
    pub num_output_tokens: Option<u64>,
}

/// Why there was no whole answer, in a few words that name the kind of failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: String,
    /// What the server said.
    pub detail: String,
}

impl Failure {
    fn new(kind: impl Into<String>, detail: impl ToString) -> Self {
        Self { kind: kind.into(), detail: detail.to_string() }
    }
}

impl Client {
    /// Connects, and asks for the model's name if it was not given.
    ///
    /// # Errors
    /// A server that cannot be reached or lists no model.
    pub async fn connect(plan: &Plan) -> Result<Self, BenchError> {
        let url = match &plan.target {
            Target::Http(url) | Target::Grpc(url) => url.clone(),
        };
        let connected = match &plan.target {
            Target::Http(url) => HttpClient::connect(url, plan).await.map(Self::Http),
            Target::Grpc(url) => GrpcClient::connect(url, plan).await.map(Self::Grpc),
        };
        connected.map_err(|failure| BenchError::Server {
            url,
            kind: failure.kind,
            detail: failure.detail,
        })
    }

    /// Asks the next question and reads the answer to its end.
    pub async fn ask(
        &self,
        conversation: Conversation<'_>,
        plan: &Plan,
    ) -> Result<Answer, Failure> {
        let answer = async {
            match self {
                Self::Http(client) => client.ask(conversation).await,
                Self::Grpc(client) => client.ask(conversation).await,
            }
        };
        let no_answer = |_| Failure::new("timeout", "no whole answer within --timeout");
        timeout(plan.timeout(), answer).await.map_err(no_answer)?
    }
}
