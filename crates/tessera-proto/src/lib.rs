//! Tessera's gRPC protocols: generated code, conversions to and from [`tessera_types`], and errors as
//! statuses. Generated types stop here and at the edge of the services.
//!
//! Invariants
//! - A conversion either yields a value that its type calls valid, or a [`ConvertError`] naming the field.
//! - No message is larger than [`MAX_MESSAGE_BYTES`]; bulk data travels in chunks of
//!   [`MAX_CHUNK_BYTES`].
//!
//! Modules: [`common`], [`inference`], [`encoder`], [`decoder`] (generated), `convert` (conversions),
//! [`status`] (typed errors in [`tonic::Status`]).

mod convert;
mod plan;
pub mod status;

pub use convert::{ConvertError, hash_bytes, hash_from_bytes};
pub use status::{ErrorReason, error_detail};

/// Limit for every gRPC message, both ways, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Size of a chunk of bulk data, in bytes.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;

/// Descriptors of all services, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("tessera_descriptor");

/// Messages shared by all services.
pub mod common {
    #[allow(clippy::all, rust_2018_idioms)]
    pub mod v1 {
        tonic::include_proto!("tessera.common.v1");
    }
}

/// The public service.
pub mod inference {
    #[allow(clippy::all, rust_2018_idioms)]
    pub mod v1 {
        tonic::include_proto!("tessera.inference.v1");
    }
}

/// The vision encoder worker.
pub mod encoder {
    #[allow(clippy::all, rust_2018_idioms)]
    pub mod v1 {
        tonic::include_proto!("tessera.encoder.v1");
    }
}

/// The decoder group: router to leader, leader to followers.
pub mod decoder {
    #[allow(clippy::all, rust_2018_idioms)]
    pub mod v1 {
        tonic::include_proto!("tessera.decoder.v1");
    }
}
