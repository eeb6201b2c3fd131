//! The router: takes requests over gRPC and OpenAI-compatible HTTP, describes media, renders the
//! conversation, places it on a decoder group, sends media to encoders when asked, and speaks tokens as
//! text.
//!
//! Invariants
//! - Both faces share one path ([`service`]); a face only changes form.
//! - Every decision about epochs, attempts, endpoints and moves is made by a machine of
//!   `tessera-cluster`; this crate carries events and actions.
//! - No pixel is decoded here: media is hashed, and its header read.
//! - Every queue and every kind of held memory has a bound in [`config`] and a typed refusal.
//! - A client that leaves drops its stream, which ends its task, which ends its sequence.
//!
//! Modules: [`config`], [`error`], [`server`] (start, run, stop), [`service`] (the path of a request),
//! [`admission`] (bounds), [`request`] and [`events`] (what comes in and goes out), [`prepare`] (media,
//! prompt, sampling), [`session`] (a running request), [`upstream`] (encoders and groups), [`uploads`],
//! [`model`], [`http`] and [`grpc`] (the faces), [`listen`], [`metrics`], `clock`.

mod admission;
mod clock;
pub mod config;
pub mod error;
mod events;
mod grpc;
mod http;
mod listen;
mod metrics;
mod model;
mod prepare;
mod request;
pub mod server;
mod service;
mod session;
mod uploads;
mod upstream;

pub use config::RouterConfig;
pub use error::RouterError;
pub use server::{Listeners, Router, run};
