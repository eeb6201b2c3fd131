//! One process of a decoder group: it joins epochs with the other processes of its group, and either leads
//! (serves attempts, sends plans) or follows (computes what the plan stream says).
//!
//! Invariants
//! - Weights are loaded once and survive every epoch.
//! - Every stream is fenced by cluster, group and epoch; the comparison is `tessera_cluster`'s.
//! - An epoch ends flag first, then communicator; what was in flight is discarded, running attempts end
//!   with a typed retryable error.
//! - Embeddings are pulled into room that the engine reserved, and used whole or not at all.
//!
//! Modules: [`config`], [`error`], [`metrics`], [`service`] (gRPC `Decoder`), [`generate`] (one attempt),
//! [`fetch`] (embeddings from encoders).

pub mod config;
pub mod error;
pub mod fetch;
pub mod generate;
pub mod metrics;
pub mod service;

pub use config::DecoderConfig;
pub use error::DecoderError;
