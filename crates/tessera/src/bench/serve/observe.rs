//! Whether the client itself was in the way: its CPU time, and how late it woke up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinHandle;

use crate::bench::stats::Percentiles;

/// How often the watcher wants to wake up.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);
/// Wake-ups that are remembered; a run longer than this keeps the first ones.
const MAX_SAMPLES: usize = 1 << 20;

/// What the client used and how late it was.
#[derive(Debug, Clone, Serialize)]
pub struct ClientHealth {
    /// CPU seconds per second of the run; 1 is a whole core.
    pub cpu_cores: f64,
    /// Beyond its time, a task that sleeps wakes up this much later.
    pub scheduling_lag_ms: Percentiles,
}

/// Watches from its creation to [`Watch::stop`].
#[derive(Debug)]
pub struct Watch {
    started: Instant,
    cpu_at_start: Option<f64>,
    stopping: Arc<AtomicBool>,
    lags: JoinHandle<Vec<f64>>,
}

impl Watch {
    pub fn start() -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stopping);
        let lags = tokio::spawn(async move {
            let mut lags = Vec::new();
            while !flag.load(Ordering::Relaxed) {
                let due = Instant::now() + WATCH_INTERVAL;
                tokio::time::sleep_until(due.into()).await;
                if lags.len() < MAX_SAMPLES {
                    lags.push(due.elapsed().as_secs_f64() * 1e3);
                }
            }
            lags
        });
        Self { started: Instant::now(), cpu_at_start: cpu_seconds(), stopping, lags }
    }

    pub async fn stop(self) -> ClientHealth {
        let seconds = self.started.elapsed().as_secs_f64();
        let cpu = cpu_seconds().zip(self.cpu_at_start).map(|(end, start)| end - start);
        self.stopping.store(true, Ordering::Relaxed);
        // A watcher that panicked has seen nothing.
        let lags = self.lags.await.unwrap_or_default();
        ClientHealth {
            cpu_cores: cpu.map_or(f64::NAN, |cpu| cpu / seconds),
            scheduling_lag_ms: Percentiles::of(lags),
        }
    }
}

/// CPU time of this process so far, as the kernel accounts it.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let ticks = cpu_ticks(&stat)?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// User and system time in a line of `/proc/PID/stat`: fields 14 and 15, the second being a name in brackets that
/// may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let line = "12 (a ) name) S 1 2 3 4 5 6 7 8 9 10 70 7 0 0 20 0 4 0 1 2 3";
        assert_eq!(cpu_ticks(line), Some(77));
        assert_eq!(cpu_ticks("12"), None);
    }
}
