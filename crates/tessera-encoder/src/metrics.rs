//! Metrics of an encoder worker.

use tessera_telemetry::{
    Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TelemetryError, buckets,
};

/// Registered once at start-up; clones share the values.
#[derive(Debug, Clone)]
pub struct EncoderMetrics {
    /// Encode calls by outcome: `encoded`, `cache_hit`, `joined`, `refused`, `failed`.
    pub requests: IntCounterVec,
    /// Patches through the vision tower.
    pub patches: IntCounter,
    pub batches: IntCounter,
    pub queued_pixels: IntGauge,
    pub cache_bytes: IntGauge,
    pub fetched_bytes: IntCounter,
    pub prepare_seconds: Histogram,
    pub forward_seconds: Histogram,
}

impl EncoderMetrics {
    /// # Errors
    /// A name is taken already.
    pub fn register(registry: &Registry) -> Result<Self, TelemetryError> {
        Ok(Self {
            requests: registry.counters(
                "tessera_encoder_requests_total",
                "Encode calls by outcome",
                &["outcome"],
            )?,
            patches: registry.counter(
                "tessera_encoder_patches_total",
                "Patches that went through the vision tower",
            )?,
            batches: registry
                .counter("tessera_encoder_batches_total", "Forward passes of the vision tower")?,
            queued_pixels: registry
                .gauge("tessera_encoder_queued_pixels", "Pixels received and not yet encoded")?,
            cache_bytes: registry
                .gauge("tessera_encoder_cache_bytes", "Bytes of embeddings in the cache")?,
            fetched_bytes: registry
                .counter("tessera_encoder_fetched_bytes_total", "Bytes pulled by decoders")?,
            prepare_seconds: registry.histogram(
                "tessera_encoder_prepare_seconds",
                "Decoding, resizing and patch layout of one item",
                buckets::REQUEST_SECONDS,
            )?,
            forward_seconds: registry.histogram(
                "tessera_encoder_forward_seconds",
                "One forward pass of the vision tower",
                buckets::REQUEST_SECONDS,
            )?,
        })
    }
}
