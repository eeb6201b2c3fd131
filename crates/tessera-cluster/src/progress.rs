//! Frozen, stuck or merely busy: the rule by which ranks judge each other (CLUSTER §2).
//!
//! A hang is missing progress, not a long step. Every rank bumps a counter per layer, and a thread
//! that does no compute reports it. No report at all: the process is frozen. Reports whose counter
//! stands still although there is work: its ranks are stuck.

use std::time::Duration;

use crate::config::StreamConfig;

/// What a member says about its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Sum over the member's ranks of layers computed in this epoch.
    pub progress: u64,
    /// Largest recent time of one layer.
    pub layer_time: Duration,
}

/// The judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    Fine,
    Frozen,
    Stuck,
}

/// Memory about one member.
#[derive(Debug, Clone)]
pub struct ProgressWatch {
    num_ranks: u32,
    report: Report,
    reported_at: Duration,
    advanced_at: Duration,
    has_work: bool,
}

impl ProgressWatch {
    /// Starts with a report at `now`, idle.
    pub fn new(num_ranks: u32, now: Duration) -> Self {
        Self {
            num_ranks: num_ranks.max(1),
            report: Report::default(),
            reported_at: now,
            advanced_at: now,
            has_work: false,
        }
    }

    /// Takes a report. `false` if its counter ran back, which no correct member does.
    #[must_use]
    pub fn on_report(&mut self, report: Report, now: Duration) -> bool {
        if report.progress < self.report.progress {
            return false;
        }
        if report.progress > self.report.progress {
            self.advanced_at = now;
        }
        self.report = report;
        self.reported_at = now;
        true
    }

    /// Whether the member has steps to compute. Standing still counts from when work arrived.
    pub fn set_has_work(&mut self, has_work: bool, now: Duration) {
        if has_work && !self.has_work {
            self.advanced_at = now;
        }
        self.has_work = has_work;
    }

    /// Moves all memories by a pause of our own, in which nothing could be heard.
    pub fn forgive(&mut self, pause: Duration) {
        self.reported_at += pause;
        self.advanced_at += pause;
    }

    /// Judges at `now`. A standstill counts only as far as reports cover it.
    pub fn condition(&self, config: &StreamConfig, now: Duration) -> Condition {
        if now.saturating_sub(self.reported_at) >= config.silence_timeout {
            return Condition::Frozen;
        }
        let stood_still = self.reported_at.saturating_sub(self.advanced_at);
        match self.has_work && stood_still >= self.stuck_limit(config) {
            true => Condition::Stuck,
            false => Condition::Fine,
        }
    }

    /// When the condition may change if no report comes.
    pub fn deadline(&self, config: &StreamConfig) -> Duration {
        self.reported_at + config.silence_timeout
    }

    /// Whether reports are late, though not yet late enough for a verdict.
    pub fn is_late(&self, config: &StreamConfig, now: Duration) -> bool {
        now.saturating_sub(self.reported_at) >= config.report_interval * 4
    }

    /// Layers per rank, comparable between members of different size.
    pub fn layers_per_rank(&self) -> u64 {
        self.report.progress / u64::from(self.num_ranks)
    }

    fn stuck_limit(&self, config: &StreamConfig) -> Duration {
        config.stuck_timeout.max(self.report.layer_time * config.stuck_layers)
    }
}

/// Finds pauses of the own process: between two calls of a machine that is driven by its deadlines
/// there can be no long gap, except when the process itself did not run.
#[derive(Debug, Clone)]
pub struct PauseDetector {
    last_call: Duration,
}

impl PauseDetector {
    /// Starts at `now`.
    pub fn new(now: Duration) -> Self {
        Self { last_call: now }
    }

    /// Time of the latest call.
    pub fn last_call(&self) -> Duration {
        self.last_call
    }

    /// Notes a call; returns the gap if it was a pause.
    pub fn on_call(&mut self, config: &StreamConfig, now: Duration) -> Option<Duration> {
        let gap = now.saturating_sub(self.last_call);
        self.last_call = self.last_call.max(now);
        (gap >= config.own_pause).then_some(gap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn report(progress: u64, layer_ms: u64) -> Report {
        Report { progress, layer_time: ms(layer_ms) }
    }

    #[test]
    fn silence_is_frozen_and_a_standstill_with_work_is_stuck() {
        let config = StreamConfig::default();
        let mut watch = ProgressWatch::new(2, ms(0));
        assert_eq!(watch.condition(&config, ms(2999)), Condition::Fine);
        assert_eq!(watch.condition(&config, ms(3000)), Condition::Frozen);
        watch.set_has_work(true, ms(1000));
        for t in (1000..4000).step_by(250) {
            assert!(watch.on_report(report(0, 1), ms(t)));
            assert_eq!(watch.condition(&config, ms(t)), Condition::Fine, "at {t}");
        }
        assert!(watch.on_report(report(0, 1), ms(4000)));
        assert_eq!(watch.condition(&config, ms(4000)), Condition::Stuck);
        assert!(watch.on_report(report(1, 1), ms(4100)));
        assert_eq!(watch.condition(&config, ms(4100)), Condition::Fine);
        assert!(!watch.on_report(report(0, 1), ms(4200)), "a counter that runs back");
    }

    #[test]
    fn idle_and_slow_layers_are_not_stuck() {
        let config = StreamConfig::default();
        let mut idle = ProgressWatch::new(1, ms(0));
        let mut slow = ProgressWatch::new(1, ms(0));
        slow.set_has_work(true, ms(0));
        for t in (0..12_000).step_by(250) {
            assert!(idle.on_report(report(7, 1), ms(t)));
            assert!(slow.on_report(report(t / 6000, 1500), ms(t)));
            assert_eq!(idle.condition(&config, ms(t)), Condition::Fine);
            assert_eq!(slow.condition(&config, ms(t)), Condition::Fine, "at {t}");
        }
    }

    #[test]
    fn an_own_pause_is_not_held_against_others() {
        let config = StreamConfig::default();
        let mut detector = PauseDetector::new(ms(0));
        let mut watch = ProgressWatch::new(1, ms(0));
        assert_eq!(detector.on_call(&config, ms(400)), None);
        let pause = detector.on_call(&config, ms(4400)).expect("4 s without a call");
        watch.forgive(pause);
        assert_eq!(watch.condition(&config, ms(4400)), Condition::Fine);
        assert_eq!(watch.condition(&config, ms(7000)), Condition::Frozen);
    }
}
