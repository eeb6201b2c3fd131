//! What ends the program.

use std::path::PathBuf;

/// Result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command failed. Printed with its causes by [`chain`]; the exit code is 2 for what the caller
/// got wrong and 1 for the rest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid settings")]
    Settings(#[source] Box<figment::Error>),
    #[error("settings cannot be written as TOML")]
    WriteSettings(#[source] toml::ser::Error),
    #[error("{flag}: {reason}")]
    Flag { flag: &'static str, reason: String },
    #[error("cannot read {}", path.display())]
    ReadFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write {}", path.display())]
    WriteFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the benchmark failed")]
    Bench(#[from] crate::bench::error::BenchError),
    #[error("cannot write the answer")]
    Output(#[source] std::io::Error),
    #[error("cannot reach {endpoint}")]
    Endpoint {
        endpoint: String,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("{}", describe(.0))]
    Status(Box<tonic::Status>),
    #[error("the runtime cannot start")]
    Runtime(#[source] std::io::Error),
    #[error("signals cannot be handled")]
    Signals(#[source] std::io::Error),
    #[error("logging cannot start")]
    Telemetry(#[from] tessera_telemetry::TelemetryError),
    #[error("the router stopped")]
    Router(#[from] tessera_router::RouterError),
    #[error("the encoder stopped")]
    Encoder(#[from] tessera_encoder::EncoderError),
    #[error("the decoder stopped")]
    Decoder(#[from] tessera_decoder::DecoderError),
    #[error("the device cannot be used")]
    Gpu(#[source] tessera_kernels::CudaError),
    #[error("no GPU of this machine can be used")]
    NoUsableGpu,
    #[error("the checkpoint was not sharded")]
    Shard(#[source] tessera_model::ModelError),
    #[error("the embedded store failed")]
    Store(#[from] tessera_membership::EmbeddedError),
    #[error("cannot find this program's own file, which `up` starts again for each role")]
    OwnProgram(#[source] std::io::Error),
    #[error("{name} does not start; its message is above")]
    Child { name: String },
    #[error("the cluster was not ready within {seconds} s; see the log above")]
    NotReady { seconds: u64 },
}

impl Error {
    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_) | Self::Flag { .. } => 2,
            _ => 1,
        }
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

fn describe(status: &tonic::Status) -> String {
    let detail = tessera_proto::error_detail(status);
    let reason = detail.as_ref().map_or("", |detail| detail.reason.as_str());
    let retry = match &detail {
        Some(detail) if detail.retryable => " (may be retried)",
        _ => "",
    };
    format!("{} {reason}: {}{retry}", status.code(), status.message())
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}
