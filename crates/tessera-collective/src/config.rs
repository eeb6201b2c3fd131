//! Settings of a communicator.

use std::time::Duration;

/// Longest that a rank may spin before it parks, in microseconds (ENGINE §8).
pub const MAX_SPIN_US: u32 = 20;

/// How a communicator waits. `Default` suits ranks that have a core each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectiveConfig {
    /// Spin this many microseconds before parking, at most [`MAX_SPIN_US`]. Set it to 0 when the
    /// machine's compute threads outnumber its cores.
    pub spin_us: u32,
    /// Longest that one collective may take, in milliseconds. `None` waits until a peer leaves or the
    /// epoch is aborted, which is right where something else watches the progress of ranks.
    pub timeout_ms: Option<u64>,
}

impl Default for CollectiveConfig {
    fn default() -> Self {
        Self { spin_us: MAX_SPIN_US, timeout_ms: None }
    }
}

/// A setting outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("spin_us must be at most {MAX_SPIN_US}, got {got}")]
    SpinTooLong { got: u32 },
    #[error("timeout_ms must be at least 1")]
    ZeroTimeout,
}

impl CollectiveConfig {
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.spin_us > MAX_SPIN_US {
            return Err(ConfigError::SpinTooLong { got: self.spin_us });
        }
        if self.timeout_ms == Some(0) {
            return Err(ConfigError::ZeroTimeout);
        }
        Ok(())
    }

    pub(crate) fn spin(&self) -> Duration {
        Duration::from_micros(u64::from(self.spin_us.min(MAX_SPIN_US)))
    }

    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout_ms.map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_outside_their_range_are_refused() {
        assert_eq!(CollectiveConfig::default().validate(), Ok(()));
        let spin = CollectiveConfig { spin_us: 21, timeout_ms: None };
        assert_eq!(spin.validate(), Err(ConfigError::SpinTooLong { got: 21 }));
        let timeout = CollectiveConfig { spin_us: 0, timeout_ms: Some(0) };
        assert_eq!(timeout.validate(), Err(ConfigError::ZeroTimeout));
    }
}
