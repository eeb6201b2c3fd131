//! What can go wrong in an encoder worker.

use tessera_media::MediaError;
use tessera_proto::ErrorReason;

use crate::cache::CacheFull;

/// Ends the process at start-up or ends its service.
#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    #[error("{field} {reason}")]
    Config { field: &'static str, reason: String },
    #[error("the model cannot be loaded")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot listen on {address}")]
    Listen {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("membership failed")]
    Membership(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("this process was fenced: {reason}")]
    Fenced { reason: String },
    #[error(transparent)]
    Telemetry(#[from] tessera_telemetry::TelemetryError),
    #[error("the gRPC server failed")]
    Serve(#[source] tonic::transport::Error),
    #[error("the vision thread ended")]
    VisionThreadEnded,
    #[error("the vision tower failed to warm up")]
    WarmUp(#[source] EncodeError),
}

/// Why one media item was not encoded. Shared by all requests that joined in the same encode.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EncodeError {
    #[error("{0}")]
    Media(#[source] std::sync::Arc<MediaError>),
    #[error("the media bytes do not have the announced hash")]
    HashMismatch,
    #[error("the item gives a grid of {found}, announced was {announced}")]
    GridMismatch { found: String, announced: String },
    #[error("{pixels} pixels are queued, at most {limit} may wait")]
    QueueFull { pixels: u64, limit: u64 },
    #[error("the item has {patches} patches, at most {limit} are encoded at once")]
    TooLarge { patches: u64, limit: u64 },
    #[error(transparent)]
    CacheFull(#[from] CacheFull),
    #[error("the vision tower failed: {0}")]
    Vision(String),
    #[error("the encoder is shutting down")]
    ShuttingDown,
}

impl EncodeError {
    /// Class of the error for clients.
    pub fn reason(&self) -> ErrorReason {
        match self {
            Self::Media(_) | Self::HashMismatch | Self::GridMismatch { .. } => {
                ErrorReason::InvalidMedia
            }
            Self::QueueFull { .. } | Self::CacheFull(_) => ErrorReason::Overloaded,
            Self::TooLarge { .. } => ErrorReason::RequestTooLarge,
            Self::Vision(_) => ErrorReason::EncoderFailed,
            Self::ShuttingDown => ErrorReason::Draining,
        }
    }
}

impl From<EncodeError> for tonic::Status {
    fn from(error: EncodeError) -> Self {
        error.reason().status(error.to_string()).into()
    }
}
