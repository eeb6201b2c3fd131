//! Ranks in several processes: a full mesh of TCP sockets. For machines without a GPU.
mod id;
mod wire;
pub use id::{CommunicatorId, ParseIdError};
