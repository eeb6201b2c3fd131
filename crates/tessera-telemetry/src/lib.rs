//! What every service tells the outside: structured logs, metrics, and an admin server with
//! `/metrics`, `/livez` and `/readyz`.
//!
//! Invariants
//! - A metric is registered once, by its owner's `metrics.rs`, and its name is checked then: prefix
//!   `tessera_`, lower case, unit last. A bad or doubled name is a start-up error, never a panic later.
//! - Readiness is asked, not stored: the admin server calls the service's own judgement on every probe.
//! - Nothing here reads the environment; the binary passes the filter and the addresses in.
//!
//! Modules: [`config`] (log and admin settings), [`error`], [`log`] (tracing set-up), [`registry`]
//! (metric creation and text encoding), [`buckets`] (histogram bounds), [`admin`] (the admin server).

pub mod admin;
pub mod buckets;
pub mod config;
pub mod error;
pub mod log;
mod process;
pub mod registry;

pub use admin::{AdminServer, Readiness, ReadyState};
pub use config::{AdminConfig, LogConfig, LogFormat};
pub use error::TelemetryError;
pub use log::init_tracing;
pub use prometheus::{
    Counter, Gauge, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
pub use registry::Registry;
