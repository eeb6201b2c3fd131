//! Sets up tracing for the process: fields, not formatted text, to standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::TryInitError;
use tracing_subscriber::{Layer, Registry, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{LogConfig, LogFormat};
use crate::error::TelemetryError;

/// Installs the process-wide subscriber. Call once, first thing in the binary.
///
/// # Errors
/// The filter does not parse, or a subscriber is installed already.
pub fn init_tracing(config: &LogConfig) -> Result<(), TelemetryError> {
    let filter = parse_filter(&config.filter)?;
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match config.format {
        // Colours are for people at a terminal; a collector or a file gets plain text.
        LogFormat::Text => {
            fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).boxed()
        }
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init()
        .map_err(|_: TryInitError| TelemetryError::AlreadyInitialised)
}

fn parse_filter(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|source| TelemetryError::LogFilter { filter: filter.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_checked_before_it_is_installed() {
        assert!(parse_filter("info,tessera_router=debug").is_ok());
        assert!(matches!(
            parse_filter("tessera_router=loud"),
            Err(TelemetryError::LogFilter { .. })
        ));
    }
}
