//! Metrics of a decoder process.

use tessera_engine::{SequenceError, Timings};
use tessera_telemetry::{
    Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TelemetryError, buckets,
};
use tessera_types::FinishReason;

/// Registered once at start-up; clones share the values.
#[derive(Debug, Clone)]
pub struct DecoderMetrics {
    /// Sequences that ended, by outcome.
    pub sequences: IntCounterVec,
    pub output_tokens: IntCounter,
    pub fetched_bytes: IntCounter,
    pub failed_fetches: IntCounter,
    pub queue_seconds: Histogram,
    pub prefill_seconds: Histogram,
    /// Epochs ended, by kind of reason.
    pub epochs_ended: IntCounterVec,
    /// Epoch this process has joined; 0 between epochs.
    pub epoch: IntGauge,
    pub running: IntGauge,
    pub waiting: IntGauge,
    pub kv_blocks: IntGauge,
    pub kv_blocks_free: IntGauge,
}

impl DecoderMetrics {
    /// # Errors
    /// A name is taken already.
    pub fn register(registry: &Registry) -> Result<Self, TelemetryError> {
        let gauge = |name, help| registry.gauge(name, help);
        Ok(Self {
            sequences: registry.counters(
                "tessera_decoder_sequences_total",
                "Sequences that ended, by outcome",
                &["outcome"],
            )?,
            output_tokens: registry
                .counter("tessera_decoder_output_tokens_total", "Tokens sent to routers")?,
            fetched_bytes: registry.counter(
                "tessera_decoder_fetched_bytes_total",
                "Bytes of embeddings pulled from encoders",
            )?,
            failed_fetches: registry.counter(
                "tessera_decoder_failed_fetches_total",
                "Pulls of embeddings that failed",
            )?,
            queue_seconds: registry.histogram(
                "tessera_decoder_queue_seconds",
                "From submission to a slot",
                buckets::REQUEST_SECONDS,
            )?,
            prefill_seconds: registry.histogram(
                "tessera_decoder_prefill_seconds",
                "From submission to the first token",
                buckets::REQUEST_SECONDS,
            )?,
            epochs_ended: registry.counters(
                "tessera_decoder_epochs_ended_total",
                "Epochs that ended on this process, by kind of reason",
                &["reason"],
            )?,
            epoch: gauge("tessera_decoder_epoch", "Epoch joined; 0 between epochs")?,
            running: gauge("tessera_decoder_running_sequences", "Sequences with a slot")?,
            waiting: gauge("tessera_decoder_waiting_sequences", "Sequences without a slot")?,
            kv_blocks: gauge("tessera_decoder_kv_blocks", "KV blocks of the group")?,
            kv_blocks_free: gauge("tessera_decoder_free_kv_blocks", "KV blocks not in use")?,
        })
    }

    /// A sequence ended with a finish reason.
    pub fn finished(&self, reason: FinishReason, timings: &Timings) {
        let outcome = match reason {
            FinishReason::EndOfSequence => "end_of_sequence",
            FinishReason::StopToken => "stop_token",
            FinishReason::StopString => "stop_string",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::Cancelled => "cancelled",
            FinishReason::DeadlineExceeded => "deadline_exceeded",
        };
        self.sequences.with_label_values(&[outcome]).inc();
        self.queue_seconds.observe(timings.queue.as_secs_f64());
        self.prefill_seconds.observe(timings.prefill.as_secs_f64());
    }

    /// A sequence ended without one.
    pub fn failed(&self, error: &SequenceError) {
        let outcome = match error {
            SequenceError::Refused(_)
            | SequenceError::UnknownToken { .. }
            | SequenceError::EmbeddingsTooLarge { .. } => "refused",
            SequenceError::Media { .. } | SequenceError::EmbeddingShape { .. } => "media_failed",
            SequenceError::GroupLost { .. } | SequenceError::ShuttingDown => "group_lost",
        };
        self.sequences.with_label_values(&[outcome]).inc();
    }
}
