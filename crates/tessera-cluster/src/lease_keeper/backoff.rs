//! Jittered pauses between tries.

use std::time::Duration;

use crate::seed::mix64;

/// Pauses that double from `min` to `max`, each ± 20 % so that a crowd does not return in step.
///
/// The numbers come from SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators", 2014), seeded by the driver; the same seed gives the same pauses.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
    state: u64,
}

impl Backoff {
    /// Pauses from `min` to `max` (before jitter).
    pub fn new(min: Duration, max: Duration, seed: u64) -> Self {
        Self { min, max: max.max(min), next: min, state: seed }
    }

    /// The next pause.
    pub fn next_pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.max);
        self.jitter(pause)
    }

    /// Begin again at `min`, after a success.
    pub fn reset(&mut self) {
        self.next = self.min;
    }

    /// `duration` ± 20 %.
    pub fn jitter(&mut self, duration: Duration) -> Duration {
        duration.mul_f64(0.8 + 0.4 * self.unit())
    }

    /// A number in [0, 1).
    fn unit(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix64(self.state) >> 11) as f64 / (1u64 << 53) as f64
    }
}
