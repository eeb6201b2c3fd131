//! The one place that judges an endpoint (CLUSTER §4).
//!
//! Direct evidence outweighs the store: an endpoint whose health stream is good stays usable although
//! its key was deleted, and one that is silent is out although its key stands.

use std::time::Duration;

use crate::config::EvidenceConfig;

/// The judgement, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Says that it is ready, recently.
    Ready,
    /// Unknown, late, or a call failed since it last spoke: used only if nothing is ready.
    Suspect,
    /// Works, and takes nothing new.
    Draining,
    /// Not to be used.
    Out,
}

/// What an endpoint says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelfReport {
    Ready,
    NotReady,
    Draining,
}

/// Memory about one endpoint.
#[derive(Debug, Clone)]
pub struct EndpointEvidence {
    config: EvidenceConfig,
    /// The latest word on the health stream.
    heard: Option<(Duration, SelfReport)>,
    /// The health stream is down since.
    broken_at: Option<Duration>,
    call_failed_at: Option<Duration>,
    probe: Option<(Duration, bool)>,
    /// The key is gone since.
    unlisted_at: Option<Duration>,
    /// The store itself is doubted, after a mass delete.
    store_doubted: bool,
}

impl EndpointEvidence {
    /// Nothing known yet, listed in the store.
    pub fn new(config: EvidenceConfig) -> Self {
        Self {
            config,
            heard: None,
            broken_at: None,
            call_failed_at: None,
            probe: None,
            unlisted_at: None,
            store_doubted: false,
        }
    }

    /// A word on the health stream.
    pub fn on_report(&mut self, report: SelfReport, now: Duration) {
        self.heard = Some((now, report));
        self.broken_at = None;
    }

    /// The health stream broke, or could not be opened.
    pub fn on_stream_broken(&mut self, now: Duration) {
        self.broken_at.get_or_insert(now);
    }

    /// A call succeeded.
    pub fn on_call_ok(&mut self) {
        self.call_failed_at = None;
    }

    /// A call failed in a way that speaks against the endpoint: connection, deadline, unavailable.
    pub fn on_call_failed(&mut self, now: Duration) {
        self.call_failed_at = Some(now);
    }

    /// Answer or silence of a probe.
    pub fn on_probe(&mut self, ok: bool, now: Duration) {
        self.probe = Some((now, ok));
    }

    /// The key was written.
    pub fn on_listed(&mut self) {
        self.unlisted_at = None;
        self.store_doubted = false;
    }

    /// The key was deleted; `doubted` when too many were at once.
    pub fn on_unlisted(&mut self, doubted: bool, now: Duration) {
        self.unlisted_at.get_or_insert(now);
        self.store_doubted |= doubted;
    }

    /// Whether the key stands.
    pub fn is_listed(&self) -> bool {
        self.unlisted_at.is_none()
    }

    /// Judges at `now`.
    pub fn verdict(&self, now: Duration) -> Verdict {
        let age = |at: Duration| now.saturating_sub(at);
        let by_health = match self.heard {
            _ if self.broken_at.is_some() => Verdict::Out,
            Some((_, SelfReport::NotReady)) => Verdict::Out,
            Some((at, _)) if age(at) >= self.config.out_after => Verdict::Out,
            Some((_, SelfReport::Draining)) => Verdict::Draining,
            Some((at, SelfReport::Ready)) if age(at) >= self.config.suspect_after => {
                Verdict::Suspect
            }
            Some((_, SelfReport::Ready)) => Verdict::Ready,
            None => Verdict::Suspect,
        };
        by_health.max(self.by_calls(now)).max(self.by_store(now))
    }

    /// A failed call or probe weighs until the endpoint speaks again, or the memory fades.
    fn by_calls(&self, now: Duration) -> Verdict {
        let heard_at = self.heard.map(|(at, _)| at);
        let weighs = |at: Duration| {
            heard_at.is_none_or(|heard| heard < at)
                && now.saturating_sub(at) < self.config.failure_memory
        };
        let bad_probe = self.probe.filter(|(_, ok)| !ok).map(|(at, _)| at);
        match [self.call_failed_at, bad_probe].into_iter().flatten().any(weighs) {
            true => Verdict::Suspect,
            false => Verdict::Ready,
        }
    }

    fn by_store(&self, now: Duration) -> Verdict {
        match self.unlisted_at {
            Some(at)
                if !self.store_doubted && now.saturating_sub(at) >= self.config.delete_grace =>
            {
                Verdict::Out
            }
            _ => Verdict::Ready,
        }
    }

    /// When the verdict may change by itself.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        let heard = self.heard.map(|(at, _)| at);
        let config = &self.config;
        let changes = [
            heard.map(|at| at + config.suspect_after),
            heard.map(|at| at + config.out_after),
            self.call_failed_at.map(|at| at + config.failure_memory),
            self.unlisted_at.map(|at| at + config.delete_grace),
        ];
        changes.into_iter().flatten().filter(|at| *at > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn ready_at(t: u64) -> EndpointEvidence {
        let mut evidence = EndpointEvidence::new(EvidenceConfig::default());
        evidence.on_report(SelfReport::Ready, ms(t));
        evidence
    }

    #[test]
    fn readiness_needs_a_recent_word() {
        let unknown = EndpointEvidence::new(EvidenceConfig::default());
        assert_eq!(unknown.verdict(ms(0)), Verdict::Suspect);
        let evidence = ready_at(0);
        for (t, verdict) in [
            (0, Verdict::Ready),
            (1499, Verdict::Ready),
            (1500, Verdict::Suspect),
            (3999, Verdict::Suspect),
            (4000, Verdict::Out),
        ] {
            assert_eq!(evidence.verdict(ms(t)), verdict, "at {t}");
        }
        assert_eq!(evidence.deadline(ms(0)), Some(ms(1500)));
        assert_eq!(evidence.deadline(ms(1500)), Some(ms(4000)));
    }

    #[test]
    fn a_broken_stream_is_out_at_once_and_a_word_heals_it() {
        let mut evidence = ready_at(0);
        evidence.on_stream_broken(ms(10));
        assert_eq!(evidence.verdict(ms(10)), Verdict::Out);
        evidence.on_report(SelfReport::Ready, ms(20));
        assert_eq!(evidence.verdict(ms(20)), Verdict::Ready);
        evidence.on_report(SelfReport::NotReady, ms(30));
        assert_eq!(evidence.verdict(ms(30)), Verdict::Out);
        evidence.on_report(SelfReport::Draining, ms(40));
        assert_eq!(evidence.verdict(ms(40)), Verdict::Draining);
    }

    #[test]
    fn a_deleted_key_is_only_a_suspicion() {
        let mut evidence = ready_at(0);
        evidence.on_unlisted(false, ms(0));
        for t in (0..30_000).step_by(500) {
            evidence.on_report(SelfReport::Ready, ms(t));
            assert_eq!(evidence.verdict(ms(t)), Verdict::Ready, "at {t}");
        }
        evidence.on_report(SelfReport::Ready, ms(30_000));
        assert_eq!(evidence.verdict(ms(30_000)), Verdict::Out);
        evidence.on_listed();
        assert_eq!(evidence.verdict(ms(30_000)), Verdict::Ready);
        evidence.on_unlisted(true, ms(30_000));
        evidence.on_report(SelfReport::Ready, ms(90_000));
        assert_eq!(evidence.verdict(ms(90_000)), Verdict::Ready, "the store is doubted");
    }

    #[test]
    fn a_failed_call_weighs_until_the_endpoint_speaks() {
        let mut evidence = ready_at(0);
        evidence.on_call_failed(ms(100));
        assert_eq!(evidence.verdict(ms(100)), Verdict::Suspect);
        evidence.on_report(SelfReport::Ready, ms(200));
        assert_eq!(evidence.verdict(ms(200)), Verdict::Ready);
        evidence.on_probe(false, ms(300));
        assert_eq!(evidence.verdict(ms(300)), Verdict::Suspect);
        evidence.on_probe(true, ms(400));
        assert_eq!(evidence.verdict(ms(400)), Verdict::Ready);
    }
}
