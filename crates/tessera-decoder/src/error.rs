//! What can go wrong in a decoder process, and how it reads on the wire.

use std::net::SocketAddr;
use std::time::Duration;

use tessera_engine::{GrammarError, SequenceError, SubmitError};
use tessera_proto::ErrorReason;
use tessera_scheduler::AddError;
use tonic::Status;

/// Ends the process at start-up or ends its service.
#[derive(Debug, thiserror::Error)]
pub enum DecoderError {
    #[error("{field} {reason}")]
    Config { field: &'static str, reason: String },
    #[error("a setting of the group's protocol is out of range")]
    Protocol(#[from] tessera_cluster::ClusterError),
    #[error("{address} is not an address that other ranks can reach")]
    Unreachable { address: String },
    #[error("the model cannot be loaded")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the engine cannot start")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("the lock of the slot cannot be taken")]
    SlotLock(#[source] std::io::Error),
    #[error("membership failed")]
    Membership(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("this process was fenced: {reason}")]
    Fenced { reason: String },
    #[error("ranks did not leave the epoch: {reason}; the process has to end")]
    Hung { reason: String },
    #[error(transparent)]
    Telemetry(#[from] tessera_telemetry::TelemetryError),
    #[error("the gRPC server failed")]
    Serve(#[source] tonic::transport::Error),
    #[error("a task of the decoder panicked")]
    Panicked,
}

/// A message that breaks the protocol.
pub fn refused(field: &'static str, message: impl Into<String>) -> Status {
    ErrorReason::InvalidArgument.status(message).field(field).into()
}

/// A command that did not reach the engine.
pub fn submit_status(error: SubmitError, retry: Duration) -> Status {
    match error {
        SubmitError::Busy => {
            ErrorReason::Overloaded.status(error.to_string()).retry_after(retry).into()
        }
        SubmitError::Stopped => ErrorReason::GroupLost.status(error.to_string()).into(),
    }
}

/// The end of a sequence that was not a finish.
pub fn sequence_status(error: &SequenceError) -> Status {
    let reason = match error {
        SequenceError::Refused(refusal) => add_reason(refusal),
        SequenceError::UnknownToken { .. } => ErrorReason::InvalidArgument,
        SequenceError::Grammar(error) => return grammar_status(error),
        SequenceError::EmbeddingsTooLarge { .. } => ErrorReason::RequestTooLarge,
        SequenceError::Media { .. } => ErrorReason::EncoderFailed,
        SequenceError::EmbeddingShape { .. } => ErrorReason::ModelMismatch,
        SequenceError::GroupLost { .. } | SequenceError::ShuttingDown => ErrorReason::GroupLost,
    };
    reason.status(tessera_engine::error::chain(error)).into()
}

/// A grammar is at fault for all but a full queue.
fn grammar_status(error: &GrammarError) -> Status {
    match error {
        GrammarError::Busy => ErrorReason::Overloaded.status(error.to_string()).into(),
        _ => refused("grammar", error.to_string()),
    }
}

fn add_reason(error: &AddError) -> ErrorReason {
    match error {
        AddError::QueueFull { .. } | AddError::TenantQueueFull { .. } => ErrorReason::Overloaded,
        AddError::Duplicate { .. } => ErrorReason::Internal,
        AddError::Prompt(_) | AddError::Sampling(_) | AddError::OutputBeyondLimit { .. } => {
            ErrorReason::InvalidArgument
        }
        AddError::ContextExceeded { .. } => ErrorReason::PromptTooLong,
        AddError::NoEpoch => ErrorReason::GroupLost,
        AddError::NeverFits { .. } => ErrorReason::RequestTooLarge,
    }
}
