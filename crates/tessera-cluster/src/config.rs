//! Settings of the machines. Defaults are the values of the specification; `validate` refuses
//! combinations under which a busy process would look dead or a dead one alive.

use std::time::Duration;

use crate::error::ClusterError;

fn check(ok: bool, field: &'static str, detail: &str) -> Result<(), ClusterError> {
    match ok {
        true => Ok(()),
        false => Err(ClusterError::InvalidConfig { field, detail: detail.to_owned() }),
    }
}

/// How a group forms its next epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormationConfig {
    /// A member waits its first rank times this before it proposes, so that proposers rarely collide.
    pub stagger_per_rank: Duration,
    /// From joining an epoch until it is active; covers communicator set-up and canary.
    pub forming_timeout: Duration,
    /// How long a transaction may stay unanswered before it counts as unknown.
    pub txn_timeout: Duration,
    /// Pause after the first epoch that did not form; doubles up to `max_backoff`.
    pub min_backoff: Duration,
    pub max_backoff: Duration,
    /// How long an answer or silence of a probe is believed.
    pub probe_validity: Duration,
}

impl Default for FormationConfig {
    fn default() -> Self {
        Self {
            stagger_per_rank: Duration::from_millis(100),
            forming_timeout: Duration::from_secs(60),
            txn_timeout: Duration::from_secs(3),
            min_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(8),
            probe_validity: Duration::from_secs(5),
        }
    }
}

impl FormationConfig {
    /// Checks that time-outs nest.
    pub fn validate(&self) -> Result<(), ClusterError> {
        check(!self.min_backoff.is_zero(), "min_backoff", "must be above zero")?;
        check(
            self.min_backoff <= self.max_backoff,
            "max_backoff",
            "must not be below min_backoff",
        )?;
        check(!self.txn_timeout.is_zero(), "txn_timeout", "must be above zero")?;
        check(
            self.forming_timeout > self.txn_timeout,
            "forming_timeout",
            "must exceed txn_timeout",
        )?;
        check(!self.probe_validity.is_zero(), "probe_validity", "must be above zero")
    }
}

/// The plan stream between leader and followers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamConfig {
    /// The leader sends a plan or an empty beat at least this often.
    pub beat_interval: Duration,
    /// Followers, and threads that do no compute, report at least this often.
    pub report_interval: Duration,
    /// Nothing heard for this long: the other side is frozen.
    pub silence_timeout: Duration,
    /// Reports without progress for at least this long: stuck, unless a layer takes that long.
    pub stuck_timeout: Duration,
    /// A rank is stuck only after this many times its largest recent layer time.
    pub stuck_layers: u32,
    /// A gap between two calls of a machine above this is a pause of our own process, in which
    /// nothing could be heard; it is not counted against others.
    pub own_pause: Duration,
}

impl Default for StreamConfig {
    fn default() -> Self {
        Self {
            beat_interval: Duration::from_millis(400),
            report_interval: Duration::from_millis(250),
            silence_timeout: Duration::from_secs(3),
            stuck_timeout: Duration::from_secs(3),
            stuck_layers: 8,
            own_pause: Duration::from_secs(1),
        }
    }
}

impl StreamConfig {
    /// Checks that several beats and reports fit into the silence that ends an epoch.
    pub fn validate(&self) -> Result<(), ClusterError> {
        check(!self.beat_interval.is_zero(), "beat_interval", "must be above zero")?;
        check(!self.report_interval.is_zero(), "report_interval", "must be above zero")?;
        let slowest = self.beat_interval.max(self.report_interval);
        check(
            self.silence_timeout >= slowest * 4,
            "silence_timeout",
            "must be at least four beat and report intervals",
        )?;
        check(
            self.stuck_timeout >= self.report_interval * 4,
            "stuck_timeout",
            "must be at least four report intervals",
        )?;
        check(self.stuck_layers >= 2, "stuck_layers", "must be at least 2")?;
        check(
            self.own_pause >= slowest * 2 && self.own_pause < self.silence_timeout,
            "own_pause",
            "must lie between two intervals and silence_timeout",
        )
    }
}

/// Bounds on what one request may cost beyond its undisturbed run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionConfig {
    /// Times a choice may move to another epoch after it was admitted; 0 turns a loss into a typed
    /// retryable error.
    pub max_moves: u32,
    /// Refusals (a stale epoch, a full queue, a drain) before admission that a choice may collect.
    pub max_refusals: u32,
    /// Times a media item may be encoded for this request, over failures and lost embeddings.
    pub max_encodes_per_item: u32,
    /// How long a choice that has run waits for a place, and how often it asks.
    pub max_place_wait: Duration,
    pub place_interval: Duration,
    /// Hint given with a retryable failure when nothing better is known.
    pub retry_after: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            max_moves: 0,
            max_refusals: 8,
            max_encodes_per_item: 3,
            max_place_wait: Duration::from_secs(60),
            place_interval: Duration::from_millis(250),
            retry_after: Duration::from_secs(1),
        }
    }
}

/// Judging one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvidenceConfig {
    /// No health message for this long: suspect.
    pub suspect_after: Duration,
    /// No health message for this long: out of routing. Frozen must be out in under 5 s.
    pub out_after: Duration,
    /// A failed call keeps an endpoint suspect for this long unless it reports health since.
    pub failure_memory: Duration,
    /// An endpoint whose key was deleted stays usable for this long while its health stream is good.
    pub delete_grace: Duration,
}

impl Default for EvidenceConfig {
    fn default() -> Self {
        Self {
            suspect_after: Duration::from_millis(1500),
            out_after: Duration::from_secs(4),
            failure_memory: Duration::from_secs(2),
            delete_grace: Duration::from_secs(30),
        }
    }
}

impl EvidenceConfig {
    /// Checks that suspicion precedes exclusion.
    pub fn validate(&self) -> Result<(), ClusterError> {
        check(!self.suspect_after.is_zero(), "suspect_after", "must be above zero")?;
        check(self.suspect_after < self.out_after, "out_after", "must exceed suspect_after")
    }
}

/// A router's view of the cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct ViewConfig {
    pub evidence: EvidenceConfig,
    /// Share of endpoints that may vanish within `mass_window` before the store is doubted.
    pub mass_delete_share: f64,
    pub mass_window: Duration,
    /// How often an endpoint that is not ready is probed.
    pub probe_interval: Duration,
}

impl Default for ViewConfig {
    fn default() -> Self {
        Self {
            evidence: EvidenceConfig::default(),
            mass_delete_share: 0.5,
            mass_window: Duration::from_secs(5),
            probe_interval: Duration::from_secs(1),
        }
    }
}

impl ViewConfig {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), ClusterError> {
        self.evidence.validate()?;
        let share = self.mass_delete_share;
        check(share > 0.0 && share <= 1.0, "mass_delete_share", "must be in (0, 1]")?;
        check(!self.probe_interval.is_zero(), "probe_interval", "must be above zero")
    }
}

/// How a process leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrainConfig {
    /// Time from the signal until the process must be gone.
    pub grace: Duration,
    /// Longest wait for routers to acknowledge `draining`.
    pub ack_timeout: Duration,
    /// What still runs this long before the end of the grace is moved.
    pub move_margin: Duration,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(330),
            ack_timeout: Duration::from_secs(5),
            move_margin: Duration::from_secs(10),
        }
    }
}

impl DrainConfig {
    /// Checks that the margins fit; short graces shrink them instead (see [`crate::drain`]).
    pub fn validate(&self) -> Result<(), ClusterError> {
        check(!self.grace.is_zero(), "grace", "must be above zero")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        FormationConfig::default().validate().unwrap();
        StreamConfig::default().validate().unwrap();
        ViewConfig::default().validate().unwrap();
        DrainConfig::default().validate().unwrap();
    }

    #[test]
    fn a_silence_that_busy_processes_cannot_keep_is_refused() {
        let config =
            StreamConfig { silence_timeout: Duration::from_millis(900), ..StreamConfig::default() };
        assert!(matches!(
            config.validate(),
            Err(ClusterError::InvalidConfig { field: "silence_timeout", .. })
        ));
    }
}
