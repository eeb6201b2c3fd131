//! Creates metrics and writes them out in the Prometheus text format.

use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, TextEncoder,
};

use crate::error::TelemetryError;
use crate::process::ProcessGauges;

/// Units a histogram may end in; a histogram without a unit is not readable on a dashboard.
const UNITS: [&str; 6] = ["_seconds", "_bytes", "_tokens", "_pixels", "_items", "_ratio"];

/// The metrics of one process. Cheap to clone; clones share the metrics.
#[derive(Clone)]
pub struct Registry {
    inner: prometheus::Registry,
    process: Arc<ProcessGauges>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry with the two process gauges and nothing else.
    pub fn new() -> Self {
        let inner = prometheus::Registry::new();
        let process = ProcessGauges::register(&inner)
            .expect("an empty registry accepts two valid, distinct names");
        Self { inner, process: Arc::new(process) }
    }

    /// A count that only grows; the name ends in `_total`.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, TelemetryError> {
        check_counter(name)?;
        let metric = IntCounter::new(name, help).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// A time that adds up, in seconds.
    pub fn seconds(&self, name: &str, help: &str) -> Result<Counter, TelemetryError> {
        check_counter(name)?;
        let metric = Counter::new(name, help).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// Counts split by labels.
    pub fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, TelemetryError> {
        check_counter(name)?;
        let metric =
            IntCounterVec::new(Opts::new(name, help), labels).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// A whole number that goes up and down.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, TelemetryError> {
        check_name(name)?;
        let metric = IntGauge::new(name, help).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// A fraction or another real number that goes up and down.
    pub fn real_gauge(&self, name: &str, help: &str) -> Result<Gauge, TelemetryError> {
        check_name(name)?;
        let metric = Gauge::new(name, help).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// Gauges split by labels.
    pub fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, TelemetryError> {
        check_name(name)?;
        let metric =
            IntGaugeVec::new(Opts::new(name, help), labels).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// A distribution; the name ends in its unit, `buckets` are upper bounds in that unit.
    pub fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, TelemetryError> {
        check_histogram(name)?;
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let metric = Histogram::with_opts(options).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// Distributions split by labels.
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> Result<HistogramVec, TelemetryError> {
        check_histogram(name)?;
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let metric = HistogramVec::new(options, labels).map_err(|e| failed(name, e))?;
        self.register(name, metric)
    }

    /// All metrics in the text exposition format.
    pub fn encode(&self) -> Result<String, TelemetryError> {
        self.process.refresh();
        TextEncoder::new().encode_to_string(&self.inner.gather()).map_err(TelemetryError::Encode)
    }

    fn register<M: Collector + Clone + 'static>(
        &self,
        name: &str,
        metric: M,
    ) -> Result<M, TelemetryError> {
        self.inner.register(Box::new(metric.clone())).map_err(|e| failed(name, e))?;
        Ok(metric)
    }
}

fn failed(name: &str, source: prometheus::Error) -> TelemetryError {
    TelemetryError::Register { name: name.to_owned(), source }
}

fn check_name(name: &str) -> Result<(), TelemetryError> {
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    rule(name, name.starts_with("tessera_"), "must start with tessera_")?;
    rule(name, name.chars().all(lower), "must be lower snake case")
}

fn check_counter(name: &str) -> Result<(), TelemetryError> {
    check_name(name)?;
    rule(name, name.ends_with("_total"), "must end in _total")
}

fn check_histogram(name: &str) -> Result<(), TelemetryError> {
    check_name(name)?;
    let has_unit = UNITS.iter().any(|unit| name.ends_with(unit));
    rule(name, has_unit, "must end in its unit")
}

fn rule(name: &str, holds: bool, rule: &'static str) -> Result<(), TelemetryError> {
    match holds {
        true => Ok(()),
        false => Err(TelemetryError::MetricName { name: name.to_owned(), rule }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buckets;

    #[test]
    fn metrics_appear_in_the_text_with_their_values() {
        let registry = Registry::new();
        let requests = registry
            .counters("tessera_test_requests_total", "Requests.", &["code"])
            .expect("registers");
        requests.with_label_values(&["200"]).inc_by(3);
        let latency = registry
            .histogram("tessera_test_latency_seconds", "Latency.", buckets::REQUEST_SECONDS)
            .expect("registers");
        latency.observe(0.2);
        let text = registry.encode().expect("encodes");
        assert!(text.contains("tessera_test_requests_total{code=\"200\"} 3"));
        assert!(text.contains("tessera_test_latency_seconds_bucket{le=\"0.25\"} 1"));
        assert!(text.contains("process_open_fds"));
    }

    #[test]
    fn bad_and_doubled_names_are_errors() {
        let registry = Registry::new();
        for (name, ok) in [
            ("requests_total", false),
            ("tessera_Requests_total", false),
            ("tessera_requests", false),
            ("tessera_requests_total", true),
            ("tessera_requests_total", false),
        ] {
            assert_eq!(registry.counter(name, "x").is_ok(), ok, "{name}");
        }
        assert!(registry.histogram("tessera_wait", "x", &[1.0]).is_err());
        assert!(registry.gauge("tessera_running", "x").is_ok());
    }

    #[test]
    fn every_bucket_list_ascends() {
        for list in [
            buckets::REQUEST_SECONDS,
            buckets::TOKEN_SECONDS,
            buckets::TOKENS,
            buckets::PIXELS,
            buckets::BYTES,
        ] {
            assert!(list.windows(2).all(|w| w[0] < w[1]), "{list:?}");
        }
    }
}
