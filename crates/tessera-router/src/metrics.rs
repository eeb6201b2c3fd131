//! Everything the router counts, registered once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tessera_telemetry::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry, TelemetryError, buckets,
};

/// Names start with `tessera_router_`.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// By face (`http`, `grpc`), call and code (HTTP status or gRPC code).
    requests: IntCounterVec,
    /// Time to the end of the whole reply, by face and call.
    request_seconds: HistogramVec,
    pub running: IntGauge,
    pub waiting: IntGauge,
    pub held_bytes: IntGauge,
    pub upload_bytes: IntGauge,
    /// Arrival until placed.
    pub prepare_seconds: Histogram,
    /// Arrival until the first token of a request.
    pub first_token_seconds: Histogram,
    /// Between two deltas of one choice.
    pub inter_token_seconds: Histogram,
    /// Arrival until the end of a generation.
    pub generation_seconds: Histogram,
    pub prompt_tokens: Histogram,
    pub output_tokens: Histogram,
    pub prompt_tokens_total: IntCounter,
    pub cached_tokens_total: IntCounter,
    pub output_tokens_total: IntCounter,
    pub media_pixels: Histogram,
    /// From the router's call to the encoder's reply, for one media item.
    pub encode_seconds: Histogram,
    /// By outcome: `encoded`, `cached`, `failed`.
    encodes: IntCounterVec,
    /// By outcome: `finished`, `closed` by this side, `lost`, `refused`, `overloaded`, `rejected`.
    attempts: IntCounterVec,
    /// Groups and encoders that may be used now.
    pub groups_usable: IntGauge,
    pub encoders_usable: IntGauge,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// A name is taken, which means that two routers share a registry.
    pub fn register(registry: &Registry) -> Result<Self, TelemetryError> {
        let seconds =
            |name: &str, help: &str| registry.histogram(name, help, buckets::REQUEST_SECONDS);
        Ok(Self {
            requests: registry.counters(
                "tessera_router_requests_total",
                "Calls by face, call and code.",
                &["face", "call", "code"],
            )?,
            request_seconds: registry.histograms(
                "tessera_router_request_seconds",
                "Time from the header to the end of the reply.",
                buckets::REQUEST_SECONDS,
                &["face", "call"],
            )?,
            running: registry
                .gauge("tessera_router_running_requests", "Generations in progress.")?,
            waiting: registry
                .gauge("tessera_router_waiting_requests", "Generations waiting for a place.")?,
            held_bytes: registry
                .gauge("tessera_router_held_bytes", "Bytes of bodies and media held.")?,
            upload_bytes: registry
                .gauge("tessera_router_upload_bytes", "Bytes of uploaded media held.")?,
            prepare_seconds: seconds(
                "tessera_router_prepare_seconds",
                "Arrival until placed: parsing, media headers, template, tokens.",
            )?,
            first_token_seconds: seconds(
                "tessera_router_first_token_seconds",
                "Arrival until the first token.",
            )?,
            inter_token_seconds: registry.histogram(
                "tessera_router_inter_token_seconds",
                "Between two deltas of one choice.",
                buckets::TOKEN_SECONDS,
            )?,
            generation_seconds: seconds(
                "tessera_router_generation_seconds",
                "Arrival until the end of a generation.",
            )?,
            prompt_tokens: registry.histogram(
                "tessera_router_prompt_tokens",
                "Prompt tokens per request.",
                buckets::TOKENS,
            )?,
            output_tokens: registry.histogram(
                "tessera_router_output_tokens",
                "Output tokens per request, over all choices.",
                buckets::TOKENS,
            )?,
            prompt_tokens_total: registry
                .counter("tessera_router_prompt_tokens_total", "Prompt tokens.")?,
            cached_tokens_total: registry.counter(
                "tessera_router_cached_tokens_total",
                "Prompt tokens found in a prefix cache.",
            )?,
            output_tokens_total: registry
                .counter("tessera_router_output_tokens_total", "Output tokens.")?,
            media_pixels: registry.histogram(
                "tessera_router_media_pixels",
                "Pixels of a media item after resizing, over all frames.",
                buckets::PIXELS,
            )?,
            encode_seconds: seconds(
                "tessera_router_encode_seconds",
                "From the call to an encoder to its reply, per media item.",
            )?,
            encodes: registry.counters(
                "tessera_router_encodes_total",
                "Calls to encoders by outcome.",
                &["outcome"],
            )?,
            attempts: registry.counters(
                "tessera_router_attempts_total",
                "Attempts at decoder groups by outcome.",
                &["outcome"],
            )?,
            groups_usable: registry
                .gauge("tessera_router_usable_groups", "Decoder groups that may be used.")?,
            encoders_usable: registry
                .gauge("tessera_router_usable_encoders", "Encoders that may be used.")?,
        })
    }

    /// A call began. Unless told otherwise it ends with `cancelled`, the code of a client that left.
    pub fn call(
        self: &Arc<Self>,
        face: &'static str,
        call: &'static str,
        cancelled: &'static str,
    ) -> CallGuard {
        CallGuard {
            metrics: Arc::clone(self),
            face,
            call,
            code: cancelled.to_owned(),
            begun: Instant::now(),
        }
    }

    /// A call to an encoder ended.
    pub fn on_encode(&self, outcome: &str, took: Duration) {
        self.encodes.with_label_values(&[outcome]).inc();
        self.encode_seconds.observe(took.as_secs_f64());
    }

    /// An attempt at a group ended.
    pub fn on_attempt(&self, outcome: &str) {
        self.attempts.with_label_values(&[outcome]).inc();
    }
}

/// A call in progress; counted when dropped.
#[derive(Debug)]
pub struct CallGuard {
    metrics: Arc<Metrics>,
    face: &'static str,
    call: &'static str,
    code: String,
    begun: Instant,
}

impl CallGuard {
    /// The code with which the call ends.
    pub fn set_code(&mut self, code: &str) {
        code.clone_into(&mut self.code);
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        let metrics = &self.metrics;
        metrics.requests.with_label_values(&[self.face, self.call, &self.code]).inc();
        let took = self.begun.elapsed().as_secs_f64();
        metrics.request_seconds.with_label_values(&[self.face, self.call]).observe(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_are_valid_and_registered_once() {
        let registry = Registry::new();
        let metrics = Arc::new(Metrics::register(&registry).expect("registers"));
        drop(metrics.call("http", "chat", "499"));
        metrics.call("http", "chat", "499").set_code("200");
        assert!(Metrics::register(&registry).is_err());
        let text = registry.encode().expect("encodes");
        for code in ["200", "499"] {
            let line = format!(
                "tessera_router_requests_total{{call=\"chat\",code=\"{code}\",face=\"http\"}} 1"
            );
            assert!(text.contains(&line), "{text}");
        }
    }
}
