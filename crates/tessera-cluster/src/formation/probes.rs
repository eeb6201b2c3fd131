//! Direct evidence about members that the store cannot judge: suspects who are still listed, and
//! members of the active epoch who are no longer listed.

use std::collections::BTreeMap;
use std::time::Duration;

use tessera_types::InstanceId;

/// Pause between probes of a suspect that does not answer, at first and at most.
const MIN_INTERVAL: Duration = Duration::from_millis(250);
const MAX_INTERVAL: Duration = Duration::from_secs(8);
/// Pause before the second of two good probes: long enough that a process which froze for an instant
/// does not pass on one wake-up.
const CONFIRM_INTERVAL: Duration = Duration::from_millis(500);
/// A probe without an answer counts as failed after this.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Failures in a row after which a member that left the store counts as unreachable.
const FAILURES_UNTIL_GONE: u32 = 2;

#[derive(Debug)]
struct Target {
    /// Good answers still needed before a suspect may be chosen again.
    needed: u32,
    frozen: bool,
    failures: u32,
    answered_at: Option<Duration>,
    interval: Duration,
    next_at: Duration,
    asked_at: Option<Duration>,
}

impl Target {
    fn new(now: Duration) -> Self {
        Self {
            needed: 0,
            frozen: false,
            failures: 0,
            answered_at: None,
            interval: MIN_INTERVAL,
            next_at: now,
            asked_at: None,
        }
    }

    fn on_result(&mut self, reachable: bool, now: Duration) {
        self.asked_at = None;
        self.answered_at = Some(now);
        if reachable {
            self.failures = 0;
            self.needed = self.needed.saturating_sub(1);
            self.interval = MIN_INTERVAL;
            self.next_at = now + CONFIRM_INTERVAL;
        } else {
            self.failures += 1;
            self.needed = if self.frozen { 2 } else { self.needed };
            self.next_at = now + self.interval;
            self.interval = (self.interval * 2).min(MAX_INTERVAL);
        }
    }
}

/// Probes under way and what they taught.
#[derive(Debug, Default)]
pub(super) struct Probes {
    suspects: BTreeMap<InstanceId, Target>,
    unlisted: BTreeMap<InstanceId, Target>,
}

impl Probes {
    /// Holds `instance` back: a frozen one until two good probes, another until one.
    pub fn suspect(&mut self, instance: InstanceId, frozen: bool, now: Duration) {
        let target = self.suspects.entry(instance).or_insert_with(|| Target::new(now));
        target.frozen |= frozen;
        target.needed = target.needed.max(if frozen { 2 } else { 1 });
    }

    /// Whether the instance must not be chosen yet.
    pub fn is_suspect(&self, instance: InstanceId) -> bool {
        self.suspects.get(&instance).is_some_and(|target| target.needed > 0)
    }

    /// Whether the instance was found frozen and has not come back.
    pub fn is_frozen(&self, instance: InstanceId) -> bool {
        self.suspects.get(&instance).is_some_and(|target| target.frozen && target.needed > 0)
    }

    /// Whether a member that is not in the store is unreachable, by probes that are fresh. Asks for
    /// probes until it knows.
    pub fn is_gone(&mut self, instance: InstanceId, validity: Duration, now: Duration) -> bool {
        let target = self.unlisted.entry(instance).or_insert_with(|| Target::new(now));
        let fresh = target.answered_at.is_some_and(|at| now.saturating_sub(at) <= validity);
        // A stale verdict is renewed at once, not after the back-off of the failures before.
        if !fresh && target.answered_at.is_some() && target.asked_at.is_none() {
            target.next_at = target.next_at.min(now);
        }
        fresh && target.failures >= FAILURES_UNTIL_GONE
    }

    /// Forgets what concerns only the time between epochs.
    pub fn clear(&mut self) {
        self.suspects.clear();
        self.unlisted.clear();
    }

    /// Drops targets that `keep_suspect` and `keep_unlisted` no longer want.
    pub fn retain(
        &mut self,
        keep_suspect: impl Fn(InstanceId) -> bool,
        keep_unlisted: impl Fn(InstanceId) -> bool,
    ) {
        self.suspects.retain(|&instance, target| target.needed > 0 && keep_suspect(instance));
        self.unlisted.retain(|&instance, _| keep_unlisted(instance));
    }

    /// Takes an answer.
    pub fn on_result(&mut self, instance: InstanceId, reachable: bool, now: Duration) {
        for targets in [&mut self.suspects, &mut self.unlisted] {
            if let Some(target) = targets.get_mut(&instance) {
                target.on_result(reachable, now);
            }
        }
    }

    /// Instances to ask now.
    pub fn due(&mut self, now: Duration) -> Vec<InstanceId> {
        let mut due = Vec::new();
        for (&instance, target) in self.suspects.iter_mut().chain(&mut self.unlisted) {
            if target.asked_at.is_some_and(|at| now.saturating_sub(at) >= PROBE_TIMEOUT) {
                target.on_result(false, now);
            }
            if target.asked_at.is_none() && now >= target.next_at {
                target.asked_at = Some(now);
                due.push(instance);
            }
        }
        due.dedup();
        due
    }

    /// When `due` may have something next.
    pub fn deadline(&self) -> Option<Duration> {
        let targets = self.suspects.values().chain(self.unlisted.values());
        targets.map(|t| t.asked_at.map_or(t.next_at, |at| at + PROBE_TIMEOUT)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Drives probes of one instance from `now` to `end`, answering by `reachable`.
    fn drive(probes: &mut Probes, from: u64, to: u64, reachable: bool) -> Vec<u64> {
        let mut asked = Vec::new();
        for t in from..to {
            for instance in probes.due(ms(t)) {
                asked.push(t);
                probes.on_result(instance, reachable, ms(t));
            }
        }
        asked
    }

    #[test]
    fn a_frozen_member_returns_after_two_good_probes_with_back_off() {
        let frozen = InstanceId::random();
        let mut probes = Probes::default();
        probes.suspect(frozen, true, ms(0));
        let asked = drive(&mut probes, 0, 8000, false);
        assert_eq!(asked, [0, 250, 750, 1750, 3750, 7750]);
        assert!(probes.is_frozen(frozen));
        let asked = drive(&mut probes, 8000, 16_000, true);
        assert_eq!(asked, [15_750]);
        assert!(probes.is_suspect(frozen), "one good probe is not enough");
        drive(&mut probes, 16_000, 16_300, true);
        assert!(!probes.is_suspect(frozen));
    }

    #[test]
    fn one_good_probe_between_bad_ones_does_not_free_the_frozen() {
        let frozen = InstanceId::random();
        let mut probes = Probes::default();
        probes.suspect(frozen, true, ms(0));
        drive(&mut probes, 0, 1, true);
        drive(&mut probes, 1, 600, false);
        drive(&mut probes, 600, 900, true);
        assert!(probes.is_frozen(frozen));
    }

    #[test]
    fn a_member_is_gone_after_two_failures_that_are_fresh() {
        let gone = InstanceId::random();
        let mut probes = Probes::default();
        assert!(!probes.is_gone(gone, ms(5000), ms(0)));
        drive(&mut probes, 0, 200, false);
        assert!(!probes.is_gone(gone, ms(5000), ms(200)), "one failure proves nothing");
        drive(&mut probes, 200, 300, false);
        assert!(probes.is_gone(gone, ms(5000), ms(300)));
        assert!(!probes.is_gone(gone, ms(5000), ms(60_000)), "old evidence");
        drive(&mut probes, 60_000, 60_001, true);
        assert!(!probes.is_gone(gone, ms(5000), ms(60_001)), "it answered");
    }

    #[test]
    fn silence_counts_as_a_bad_answer() {
        let silent = InstanceId::random();
        let mut probes = Probes::default();
        probes.is_gone(silent, ms(5000), ms(0));
        for t in 0..5000 {
            probes.due(ms(t));
        }
        assert!(probes.is_gone(silent, ms(5000), ms(5000)));
    }
}
