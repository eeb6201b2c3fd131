//! One connection per endpoint, made when first used and again when it broke.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint, Error};

use crate::config::UpstreamConfig;

/// Bytes of one stream that may be on their way unread. A client that reads slowly stops its own stream
/// after this much.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// Bytes over all streams of a connection: so many that clients who do not read cannot, together, stop
/// those who do.
const CONNECTION_WINDOW_BYTES: u32 = 1 << 30;

/// Channels by `host:port`.
#[derive(Debug)]
pub(super) struct Channels {
    config: UpstreamConfig,
    by_address: Mutex<HashMap<String, Channel>>,
}

impl Channels {
    pub(super) fn new(config: &UpstreamConfig) -> Self {
        Self { config: config.clone(), by_address: Mutex::default() }
    }

    /// The channel to `address`. It connects by itself; a dead endpoint shows as a failed call.
    pub(super) fn get(&self, address: &str) -> Result<Channel, Error> {
        let mut channels = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = self.connect(address)?;
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// Forgets channels to other addresses; calls in progress keep theirs until they end.
    pub(super) fn retain(&self, keep: impl Fn(&str) -> bool) {
        let mut channels = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|address, _| keep(address));
    }

    fn connect(&self, address: &str) -> Result<Channel, Error> {
        let config = &self.config;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(Duration::from_millis(config.connect_timeout_ms))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_millis(config.keepalive_interval_ms))
            .keep_alive_timeout(Duration::from_millis(config.keepalive_timeout_ms))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        Ok(endpoint.connect_lazy())
    }
}
