//! Settings of the router. Every limit here is a bound of a queue or of memory; the answer when it is
//! reached is 429 / `RESOURCE_EXHAUSTED` with a hint unless the field says otherwise.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tessera_telemetry::AdminConfig;

use crate::error::RouterError;

/// All settings of one router process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    pub http: HttpConfig,
    pub grpc: GrpcConfig,
    pub admin: AdminConfig,
    pub limits: LimitsConfig,
    pub uploads: UploadConfig,
    pub upstream: UpstreamConfig,
    /// Name of the cluster; its records live under `/tessera/{cluster}/`. Set by the binary.
    #[serde(skip)]
    pub cluster: String,
    /// `etcd://host:port[,host:port…]`. Set by the binary.
    #[serde(skip)]
    pub membership: String,
    /// Model directory: tokenizer, chat template, processor and generation configs. No weights are read.
    /// Set by the binary.
    #[serde(skip)]
    pub model: PathBuf,
    /// Name that clients use for the model. Set by the binary.
    #[serde(skip)]
    pub model_name: String,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            http: HttpConfig::default(),
            grpc: GrpcConfig::default(),
            admin: AdminConfig::default(),
            limits: LimitsConfig::default(),
            uploads: UploadConfig::default(),
            upstream: UpstreamConfig::default(),
            cluster: "default".to_owned(),
            membership: "etcd://127.0.0.1:2379".to_owned(),
            model: PathBuf::new(),
            model_name: "model".to_owned(),
        }
    }
}

/// The OpenAI-compatible server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    pub listen: SocketAddr,
    /// Open connections at most; further ones wait in the kernel's accept queue.
    pub max_connections: usize,
    /// Largest body in bytes; a larger one is refused with 413.
    pub max_body_bytes: usize,
    /// Time for a request's header, which is also the longest idle time of a connection, in ms.
    pub header_timeout_ms: u64,
    /// Time for a request's body, in ms.
    pub body_timeout_ms: u64,
    /// A comment is sent on a silent event stream this often, so that proxies keep it open, in ms.
    pub keepalive_ms: u64,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            max_connections: 4096,
            max_body_bytes: 64 << 20,
            header_timeout_ms: 60_000,
            body_timeout_ms: 60_000,
            keepalive_ms: 15_000,
        }
    }
}

/// The public gRPC server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrpcConfig {
    pub listen: SocketAddr,
    /// Open connections at most; further ones wait in the kernel's accept queue.
    pub max_connections: usize,
    /// Concurrent calls on one connection.
    pub max_streams_per_connection: u32,
    /// A silent connection is pinged this often, and closed when no answer comes in the same time, in ms.
    pub keepalive_ms: u64,
}

impl Default for GrpcConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            max_connections: 4096,
            max_streams_per_connection: 1024,
            keepalive_ms: 20_000,
        }
    }
}

/// What requests may ask for and how many are served at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Requests served at once.
    pub max_running_requests: usize,
    /// Requests that wait for one of those places, in order of arrival.
    pub max_waiting_requests: usize,
    /// Longest wait for a place in ms, then 429.
    pub max_wait_ms: u64,
    /// Hint to refused clients, in ms.
    pub retry_after_ms: u64,
    /// Bytes of request bodies and media held at once, over all requests.
    pub max_held_bytes: u64,
    /// Choices (`n`) of one request.
    pub max_choices: u32,
    /// Messages of one request.
    pub max_messages: usize,
    /// Images and videos of one request.
    pub max_media_items: usize,
    /// Compressed bytes of one image or frame.
    pub max_media_bytes: u64,
    /// Pixels of one image or frame before it is resized.
    pub max_media_pixels: u64,
    /// Frames of one video.
    pub max_video_frames: u32,
    /// Longest time from arrival to the end of a request in ms; clients may ask for less.
    pub request_timeout_ms: u64,
    /// A client that reads nothing for this long loses its request, in ms.
    pub client_stall_ms: u64,
    /// Events buffered between a request and its client; when full the request pauses.
    pub max_buffered_events: usize,
    /// Requests of at least this many bytes are parsed, hashed and tokenised on the blocking pool.
    pub blocking_bytes: usize,
    /// At shutdown, how long running requests may still finish, in ms.
    pub drain_ms: u64,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_running_requests: 1024,
            max_waiting_requests: 1024,
            max_wait_ms: 30_000,
            retry_after_ms: 1_000,
            max_held_bytes: 2 << 30,
            max_choices: 16,
            max_messages: 4096,
            max_media_items: 256,
            max_media_bytes: 64 << 20,
            max_media_pixels: 64 << 20,
            max_video_frames: 768,
            request_timeout_ms: 3_600_000,
            client_stall_ms: 60_000,
            max_buffered_events: 64,
            blocking_bytes: 8 << 10,
            drain_ms: 5_000,
        }
    }
}

/// Uploaded media, kept for later requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UploadConfig {
    /// Bytes kept at most.
    pub max_bytes: u64,
    /// Time an item is kept after its upload or last use, in ms.
    pub ttl_ms: u64,
    /// Time for one upload, in ms.
    pub timeout_ms: u64,
}

impl Default for UploadConfig {
    fn default() -> Self {
        Self { max_bytes: 1 << 30, ttl_ms: 600_000, timeout_ms: 120_000 }
    }
}

/// Connections to encoders and decoder groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpstreamConfig {
    /// Time to connect, in ms.
    pub connect_timeout_ms: u64,
    /// A connection is pinged this often, in ms.
    pub keepalive_interval_ms: u64,
    /// Time to answer a ping before the connection counts as dead, in ms.
    pub keepalive_timeout_ms: u64,
    /// Time for one media item to be encoded, queueing included, in ms.
    pub encode_timeout_ms: u64,
    /// Time that a media item waits for another encoder after one failed it, or for the first to appear, in
    /// ms; 0: none. A restarted encoder is found within it.
    pub encoder_wait_ms: u64,
    /// Whether the router is ready only with an encoder; false for text-only clusters.
    pub require_encoder: bool,
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 1_000,
            keepalive_interval_ms: 2_000,
            keepalive_timeout_ms: 2_000,
            encode_timeout_ms: 600_000,
            encoder_wait_ms: 5_000,
            require_encoder: true,
        }
    }
}

impl RouterConfig {
    /// Checks what would otherwise fail later or never answer.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn validate(&self) -> Result<(), RouterError> {
        let Self { http, grpc, limits, uploads, upstream, .. } = self;
        check(!self.model_name.is_empty(), "model_name", "must not be empty")?;
        check(http.max_connections > 0, "http.max_connections", AT_LEAST_1)?;
        check(http.max_body_bytes >= 1024, "http.max_body_bytes", "must be at least 1024")?;
        check(http.header_timeout_ms > 0, "http.header_timeout_ms", AT_LEAST_1)?;
        check(http.body_timeout_ms > 0, "http.body_timeout_ms", AT_LEAST_1)?;
        check(http.keepalive_ms > 0, "http.keepalive_ms", AT_LEAST_1)?;
        check(grpc.max_connections > 0, "grpc.max_connections", AT_LEAST_1)?;
        check(grpc.max_streams_per_connection > 0, "grpc.max_streams_per_connection", AT_LEAST_1)?;
        check(grpc.keepalive_ms > 0, "grpc.keepalive_ms", AT_LEAST_1)?;
        limits.validate()?;
        check(
            limits.max_held_bytes >= http.max_body_bytes as u64,
            "limits.max_held_bytes",
            "must hold at least one body of http.max_body_bytes",
        )?;
        check(uploads.ttl_ms > 0, "uploads.ttl_ms", AT_LEAST_1)?;
        check(uploads.timeout_ms > 0, "uploads.timeout_ms", AT_LEAST_1)?;
        check(upstream.connect_timeout_ms > 0, "upstream.connect_timeout_ms", AT_LEAST_1)?;
        check(upstream.keepalive_interval_ms > 0, "upstream.keepalive_interval_ms", AT_LEAST_1)?;
        check(upstream.keepalive_timeout_ms > 0, "upstream.keepalive_timeout_ms", AT_LEAST_1)?;
        check(upstream.encode_timeout_ms > 0, "upstream.encode_timeout_ms", AT_LEAST_1)
    }
}

impl LimitsConfig {
    fn validate(&self) -> Result<(), RouterError> {
        check(self.max_running_requests > 0, "limits.max_running_requests", AT_LEAST_1)?;
        check(
            self.max_running_requests <= tokio::sync::Semaphore::MAX_PERMITS,
            "limits.max_running_requests",
            "is beyond what can be counted",
        )?;
        check(self.max_choices > 0, "limits.max_choices", AT_LEAST_1)?;
        check(self.max_messages > 0, "limits.max_messages", AT_LEAST_1)?;
        check(self.max_media_bytes > 0, "limits.max_media_bytes", AT_LEAST_1)?;
        check(self.max_media_pixels > 0, "limits.max_media_pixels", AT_LEAST_1)?;
        check(self.max_video_frames > 0, "limits.max_video_frames", AT_LEAST_1)?;
        check(self.request_timeout_ms > 0, "limits.request_timeout_ms", AT_LEAST_1)?;
        check(
            u32::try_from(self.request_timeout_ms).is_ok(),
            "limits.request_timeout_ms",
            "must be below 2^32",
        )?;
        check(self.client_stall_ms > 0, "limits.client_stall_ms", AT_LEAST_1)?;
        check(self.max_buffered_events > 0, "limits.max_buffered_events", AT_LEAST_1)
    }
}

const AT_LEAST_1: &str = "must be at least 1";

fn check(holds: bool, field: &'static str, detail: &str) -> Result<(), RouterError> {
    match holds {
        true => Ok(()),
        false => Err(RouterError::Config { field, detail: detail.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_bad_fields_are_named() {
        assert!(RouterConfig::default().validate().is_ok());
        type Edit = fn(&mut RouterConfig);
        let cases: [(&str, Edit); 6] = [
            ("model_name", |c| c.model_name.clear()),
            ("http.max_connections", |c| c.http.max_connections = 0),
            ("limits.max_held_bytes", |c| c.limits.max_held_bytes = 10),
            ("limits.max_choices", |c| c.limits.max_choices = 0),
            ("limits.request_timeout_ms", |c| c.limits.request_timeout_ms = 1 << 40),
            ("upstream.connect_timeout_ms", |c| c.upstream.connect_timeout_ms = 0),
        ];
        for (name, edit) in cases {
            let mut config = RouterConfig::default();
            edit(&mut config);
            match config.validate() {
                Err(RouterError::Config { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn unknown_settings_are_refused() {
        let parsed: Result<RouterConfig, _> = serde_json::from_str(r#"{"htttp": {}}"#);
        assert!(parsed.is_err());
        let parsed: RouterConfig =
            serde_json::from_str(r#"{"limits": {"max_choices": 3}}"#).expect("parses");
        assert_eq!(parsed.limits.max_choices, 3);
    }
}
