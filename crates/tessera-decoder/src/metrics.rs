//! Metrics of a decoder process.

use tessera_engine::{EngineLoad, SequenceError, Timings};
use tessera_telemetry::{
    Counter, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TelemetryError, buckets,
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
    /// Tokens that a step may hold.
    pub step_token_budget: IntGauge,
    pub preemptions: IntCounter,
    /// Prompt tokens looked up in the prefix cache, and those found.
    pub prefix_cache_queried_tokens: IntCounter,
    pub prefix_cache_hit_tokens: IntCounter,
    pub grammars_compiled: IntCounter,
    pub grammar_compile_seconds: Counter,
    pub grammar_masks: IntCounter,
    pub grammar_mask_seconds: Counter,
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
            step_token_budget: gauge("tessera_decoder_step_token_budget", "Tokens of one step")?,
            preemptions: registry.counter(
                "tessera_decoder_preemptions_total",
                "Sequences that gave their KV blocks to others and were computed again",
            )?,
            prefix_cache_queried_tokens: registry.counter(
                "tessera_decoder_prefix_cache_queried_tokens_total",
                "Prompt tokens looked up in the prefix cache",
            )?,
            prefix_cache_hit_tokens: registry.counter(
                "tessera_decoder_prefix_cache_hit_tokens_total",
                "Prompt tokens found in the prefix cache",
            )?,
            grammars_compiled: registry.counter(
                "tessera_decoder_grammars_compiled_total",
                "Grammars compiled, refused ones included",
            )?,
            grammar_compile_seconds: registry.seconds(
                "tessera_decoder_grammar_compile_seconds_total",
                "Time spent compiling grammars, on a thread beside the engine",
            )?,
            grammar_masks: registry
                .counter("tessera_decoder_grammar_masks_total", "Token masks computed")?,
            grammar_mask_seconds: registry.seconds(
                "tessera_decoder_grammar_mask_seconds_total",
                "Time spent computing token masks, beside the device's work",
            )?,
        })
    }

    /// Takes over what the engine has counted.
    pub fn observe(&self, load: &EngineLoad) {
        self.running.set(load.scheduler.running.into());
        self.waiting.set(load.scheduler.waiting.into());
        self.kv_blocks.set(load.scheduler.num_blocks.into());
        self.kv_blocks_free.set(load.scheduler.num_free_blocks.into());
        self.step_token_budget.set(load.token_budget.into());
        let counted = [
            (&self.preemptions, load.counters.num_preemptions),
            (&self.prefix_cache_queried_tokens, load.counters.num_queried_tokens),
            (&self.prefix_cache_hit_tokens, load.counters.num_hit_tokens),
            (&self.grammars_compiled, load.grammars.num_compiled),
            (&self.grammar_masks, load.grammars.num_masks),
        ];
        for (counter, total) in counted {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
        let timed = [
            (&self.grammar_compile_seconds, load.grammars.compile_time),
            (&self.grammar_mask_seconds, load.grammars.mask_time),
        ];
        for (counter, total) in timed {
            counter.inc_by((total.as_secs_f64() - counter.get()).max(0.0));
        }
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
            | SequenceError::Grammar(_)
            | SequenceError::EmbeddingsTooLarge { .. } => "refused",
            SequenceError::Media { .. } | SequenceError::EmbeddingShape { .. } => "media_failed",
            SequenceError::GroupLost { .. } | SequenceError::ShuttingDown => "group_lost",
        };
        self.sequences.with_label_values(&[outcome]).inc();
    }
}
