//! Who is told how far loading the weights is.

use std::time::{Duration, Instant};

use tessera_model::LoadProgress;

/// Told a few times a second, on the thread that waits for the ranks.
pub type LoadObserver = Box<dyn FnMut(LoadProgress) + Send>;

/// Between two lines of the log.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Logs the progress once a second. Weights that load faster leave no line.
pub(crate) fn logged() -> LoadObserver {
    let mut last = Instant::now();
    Box::new(move |LoadProgress { loaded_bytes, total_bytes }| {
        if last.elapsed() >= LOG_INTERVAL {
            last = Instant::now();
            tracing::info!(loaded_bytes, total_bytes, "loading weights");
        }
    })
}
