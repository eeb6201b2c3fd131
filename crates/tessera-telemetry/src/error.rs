//! What can go wrong while telemetry is set up.

use std::io;
use std::net::SocketAddr;

/// A failure of set-up; after that, telemetry never stops a service.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("log filter {filter:?} is not valid")]
    LogFilter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("a log subscriber is installed already")]
    AlreadyInitialised,
    #[error("metric name {name:?} {rule}")]
    MetricName { name: String, rule: &'static str },
    #[error("metric {name:?} cannot be registered")]
    Register {
        name: String,
        #[source]
        source: prometheus::Error,
    },
    #[error("metrics cannot be encoded")]
    Encode(#[source] prometheus::Error),
    #[error("the admin server cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the admin server failed")]
    Serve(#[source] io::Error),
}
