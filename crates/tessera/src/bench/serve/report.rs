//! The figures of `tessera bench serve`, for people and as JSON.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::args::{Bound, Latency, Loop, Plan};
use super::load::{Outcome, Record};
use super::observe::ClientHealth;
use super::workload::Kind;
use crate::bench::machine::Machine;
use crate::bench::stats::Percentiles;
use crate::bench::table::{Table, number};
use crate::bench::write_json;
use crate::error::Result;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    benchmark: &'static str,
    /// Of the client.
    machine: Machine,
    settings: &'a Plan,
    duration_seconds: f64,
    requests: Requests,
    tokens: Tokens,
    throughput: Throughput,
    /// Of requests that succeeded.
    latency: Latencies,
    latency_by_kind: BTreeMap<&'static str, Latencies>,
    /// First turns, second turns, and so on.
    latency_by_turn: Vec<Latencies>,
    goodput: Option<Goodput>,
    client: ClientHealth,
    /// How late requests left.
    arrival_lag_ms: Percentiles,
}

#[derive(Debug, Serialize)]
struct Requests {
    sent: usize,
    succeeded: usize,
    failed: usize,
    errors: BTreeMap<String, usize>,
    /// What the server said first, for each kind of error.
    examples: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Tokens {
    prompt: u64,
    /// Of these, found in the server's prefix cache.
    cached: u64,
    output: u64,
}

#[derive(Debug, Serialize)]
struct Throughput {
    requests_per_second: f64,
    output_tokens_per_second: f64,
    total_tokens_per_second: f64,
}

/// Percentiles in milliseconds.
#[derive(Debug, Serialize)]
struct Latencies {
    ttft_ms: Percentiles,
    /// Of every gap between pieces.
    itl_ms: Percentiles,
    /// Of every request.
    tpot_ms: Percentiles,
    e2e_ms: Percentiles,
}

#[derive(Debug, Serialize)]
struct Goodput {
    /// Requests within all bounds; one that failed is not.
    good: usize,
    share: f64,
    requests_per_second: f64,
}

impl Latencies {
    fn of(records: &[&Record]) -> Self {
        let of = |value: &dyn Fn(&Record) -> Option<f64>| {
            Percentiles::of(records.iter().filter_map(|record| value(record)))
        };
        Self {
            ttft_ms: of(&|record| Some(record.ttft_ms())),
            itl_ms: Percentiles::of(records.iter().flat_map(|record| record.gaps_ms())),
            tpot_ms: of(&Record::tpot_ms),
            e2e_ms: of(&|record| Some(record.e2e_ms())),
        }
    }
}

fn is_good(record: &Record, slo: &[Bound]) -> bool {
    let meets = |bound: &Bound| {
        let latency = match bound.latency {
            Latency::Ttft => Some(record.ttft_ms()),
            Latency::Itl => record.itl_ms(),
            Latency::Tpot => record.tpot_ms(),
            Latency::E2e => Some(record.e2e_ms()),
        };
        latency.is_none_or(|latency| latency <= bound.ms)
    };
    record.failure.is_none() && slo.iter().all(meets)
}

impl<'a> Report<'a> {
    pub fn new(plan: &'a Plan, outcome: Outcome) -> Self {
        let Outcome { records, health, duration } = outcome;
        let seconds = duration.as_secs_f64();
        let done: Vec<&Record> = records.iter().filter(|record| record.failure.is_none()).collect();
        let sum = |value: fn(&Record) -> u64| done.iter().map(|record| value(record)).sum::<u64>();
        let tokens = Tokens {
            prompt: sum(|record| record.num_prompt_tokens),
            cached: sum(|record| record.num_cached_tokens),
            output: sum(|record| record.num_output_tokens),
        };
        let select = |keep: &dyn Fn(&Record) -> bool| {
            let kept: Vec<&Record> = done.iter().copied().filter(|record| keep(record)).collect();
            Latencies::of(&kept)
        };
        let kinds = Kind::ALL.iter().filter(|kind| records.iter().any(|r| r.kind == **kind));
        let good = records.iter().filter(|record| is_good(record, &plan.slo)).count();
        Self {
            benchmark: "serve",
            machine: Machine::read(),
            settings: plan,
            duration_seconds: seconds,
            requests: count(&records),
            throughput: Throughput {
                requests_per_second: done.len() as f64 / seconds,
                output_tokens_per_second: tokens.output as f64 / seconds,
                total_tokens_per_second: (tokens.prompt + tokens.output) as f64 / seconds,
            },
            tokens,
            latency: Latencies::of(&done),
            latency_by_kind: kinds
                .map(|kind| (kind.name(), select(&|record| record.kind == *kind)))
                .collect(),
            latency_by_turn: (0..plan.turns as usize)
                .map(|turn| select(&|record| record.turn == turn))
                .collect(),
            goodput: (!plan.slo.is_empty()).then(|| Goodput {
                good,
                share: good as f64 / records.len() as f64,
                requests_per_second: good as f64 / seconds,
            }),
            client: health,
            arrival_lag_ms: Percentiles::of(records.iter().map(Record::lag_ms)),
        }
    }

    /// Prints the table.
    pub fn print(&self) {
        print!("{}", self.render());
    }

    fn render(&self) -> String {
        let (requests, tokens) = (&self.requests, &self.tokens);
        let arrivals = match self.settings.arrivals {
            Loop::Open { rate } => format!("open loop, {rate} chats per second"),
            Loop::Closed { concurrency } => format!("closed loop, {concurrency} at a time"),
        };
        let mut text = format!(
            "{arrivals}: {} requests in {:.1} s, {} succeeded, {} failed\n",
            requests.sent, self.duration_seconds, requests.succeeded, requests.failed
        );
        for (kind, count) in &requests.errors {
            let example = requests.examples.get(kind).map_or("", String::as_str);
            text += &format!("  {count} × {kind}: {example}\n");
        }
        text += &format!(
            "{} requests/s, {} output tokens/s; {} prompt tokens, {} of them cached, {} output tokens\n",
            number(self.throughput.requests_per_second),
            number(self.throughput.output_tokens_per_second),
            tokens.prompt,
            tokens.cached,
            tokens.output,
        );
        text += &self.latency_table().render();
        if let Some(goodput) = &self.goodput {
            text += &format!(
                "within the bounds: {} requests, {:.0} %, {} per second\n",
                goodput.good,
                100.0 * goodput.share,
                number(goodput.requests_per_second)
            );
        }
        text += &format!(
            "client: {} CPU cores; requests left late by p50 {} ms, p99 {} ms; wake-ups late by p99 {} ms\n",
            number(self.client.cpu_cores),
            number(self.arrival_lag_ms.p50),
            number(self.arrival_lag_ms.p99),
            number(self.client.scheduling_lag_ms.p99),
        );
        text
    }

    fn latency_table(&self) -> Table {
        let mut table = Table::new(["ms", "count", "mean", "p50", "p90", "p99", "max"]);
        let mut section = |name: &str, latencies: &Latencies| {
            let Latencies { ttft_ms, itl_ms, tpot_ms, e2e_ms } = latencies;
            for (what, values) in
                [("TTFT", ttft_ms), ("ITL", itl_ms), ("TPOT", tpot_ms), ("E2E", e2e_ms)]
            {
                let Percentiles { count, mean, p50, p90, p99, max } = *values;
                let [mean, p50, p90, p99, max] = [mean, p50, p90, p99, max].map(number);
                table.row([format!("{name}{what}"), count.to_string(), mean, p50, p90, p99, max]);
            }
        };
        section("", &self.latency);
        if self.latency_by_kind.len() > 1 {
            for (kind, latencies) in &self.latency_by_kind {
                section(&format!("{kind} "), latencies);
            }
        }
        if self.latency_by_turn.len() > 1 {
            for (turn, latencies) in self.latency_by_turn.iter().enumerate() {
                section(&format!("turn {} ", turn + 1), latencies);
            }
        }
        table
    }

    /// Writes the figures as JSON.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        write_json(self, file)
    }
}

fn count(records: &[Record]) -> Requests {
    let (mut errors, mut examples) = (BTreeMap::new(), BTreeMap::new());
    for failure in records.iter().filter_map(|record| record.failure.as_ref()) {
        *errors.entry(failure.kind.clone()).or_insert(0) += 1;
        examples.entry(failure.kind.clone()).or_insert_with(|| failure.detail.clone());
    }
    let failed = errors.values().sum();
    Requests { sent: records.len(), succeeded: records.len() - failed, failed, errors, examples }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::bench::serve::args::tests::plan;
    use crate::bench::serve::client::Failure;
    use crate::bench::serve::load::tests::record;

    fn outcome(records: Vec<Record>) -> Outcome {
        let health =
            ClientHealth { cpu_cores: 0.1, scheduling_lag_ms: Percentiles::of([0.1, 0.2]) };
        Outcome { records, health, duration: Duration::from_secs(2) }
    }

    #[test]
    fn goodput_counts_what_meets_every_bound() {
        let plan = plan(&["--slo", "ttft=100ms,itl=40ms"]);
        let start = Instant::now();
        let failure = Failure { kind: "http 503".into(), detail: "full".into() };
        let records = vec![
            record(start, &[100, 140], 140, 2),
            record(start, &[101, 140], 140, 2),
            record(start, &[50, 95], 95, 2),
            record(start, &[50], 50, 1),
            Record { failure: Some(failure), ..record(start, &[10], 20, 1) },
        ];
        let report = Report::new(&plan, outcome(records));
        let goodput = report.goodput.as_ref().expect("bounds were given");
        assert_eq!((goodput.good, goodput.share, goodput.requests_per_second), (2, 0.4, 1.0));
        assert_eq!((report.requests.succeeded, report.requests.failed), (4, 1));
        assert_eq!(report.throughput.output_tokens_per_second, 3.5);
        assert_eq!((report.latency.ttft_ms.count, report.latency.itl_ms.count), (4, 3));
        assert!(report.render().contains("1 × http 503: full"), "{}", report.render());
    }

    #[test]
    fn turns_and_kinds_are_told_apart() {
        let plan = plan(&["--turns", "2"]);
        let start = Instant::now();
        let second = Record { turn: 1, kind: Kind::Image, ..record(start, &[10], 20, 1) };
        let report = Report::new(&plan, outcome(vec![record(start, &[100], 140, 1), second]));
        let ttft = |turn: usize| report.latency_by_turn[turn].ttft_ms.p50;
        assert_eq!((ttft(0), ttft(1)), (100.0, 10.0));
        assert_eq!(report.latency_by_kind["image"].e2e_ms.p50, 20.0);
        let text = report.render();
        assert!(text.contains("turn 2 TTFT") && text.contains("image E2E"), "{text}");
    }
}
