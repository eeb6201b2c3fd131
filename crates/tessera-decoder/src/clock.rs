//! The clock of the machines in `tessera-cluster`: it never goes back and counts suspended time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since the machine started.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    // The kernel keeps both parts within their ranges for this clock.
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// When a machine's deadline is due on the runtime's clock.
pub(crate) fn instant_of(deadline: Duration) -> tokio::time::Instant {
    tokio::time::Instant::now() + deadline.saturating_sub(now())
}
