//! Bounded waiting. A bound is generous: it decides when to give up, never whether something was fast
//! enough.

use std::time::{Duration, Instant};

/// Long enough for anything that is going to happen on a busy machine of two cores.
pub const BOUND: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// Returns once `condition` holds.
///
/// # Panics
/// When it does not hold within [`BOUND`].
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for_value(what, || condition().then_some(()));
}

/// Returns the first value that `probe` gives.
///
/// # Panics
/// When there is none within [`BOUND`].
pub fn for_value<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(started.elapsed() < BOUND, "gave up after {BOUND:?}: {what}");
        std::thread::sleep(PAUSE);
    }
}
