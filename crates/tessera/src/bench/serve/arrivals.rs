//! When chats begin.

use std::time::Duration;

use crate::bench::random::Random;

/// Arrival times of a Poisson process, counted from the start.
#[derive(Debug)]
pub struct Poisson {
    random: Random,
    rate: f64,
    seconds: f64,
}

impl Poisson {
    /// `rate` arrivals per second on average.
    pub fn new(rate: f64, seed: u64) -> Self {
        Self { random: Random::new(seed), rate, seconds: 0.0 }
    }
}

impl Iterator for Poisson {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.seconds += self.random.exponential() / self.rate;
        Some(Duration::from_secs_f64(self.seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_arrivals_have_their_rate_and_spread() {
        let times: Vec<f64> =
            Poisson::new(50.0, 7).take(20_000).map(|time| time.as_secs_f64()).collect();
        let mean = times[19_999] / 20_000.0;
        assert!((mean - 0.02).abs() < 0.0005, "mean gap {mean}");
        // Gaps of a Poisson process vary as much as they last, unlike those of a metronome.
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        let variance = gaps.map(|gap| (gap - mean).powi(2)).sum::<f64>() / 19_999.0;
        assert!((variance.sqrt() - 0.02).abs() < 0.001, "spread {}", variance.sqrt());
    }

    #[test]
    fn the_seed_decides() {
        let first = |seed| Poisson::new(1.0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }
}
