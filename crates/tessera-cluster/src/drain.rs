//! How a process leaves (CLUSTER §5): lock, announce, refuse, finish, move the rest, leave.
//!
//! Invariants
//! - The steps come in this order, each at most once, and the last within the grace whatever answers.
//! - Nothing new is refused before routers had their chance to hear of the drain.

use std::collections::BTreeSet;
use std::time::Duration;

use tessera_types::InstanceId;

use crate::config::DrainConfig;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The process was asked to leave. `routers` are those alive now.
    Begin {
        routers: Vec<InstanceId>,
    },
    /// The drain lock is ours.
    Locked,
    /// The store cannot be asked; the lock is waited for all the same, for half the grace.
    LockUnavailable,
    /// A router acknowledged that it places nothing new here.
    RouterAcked {
        instance: InstanceId,
    },
    RouterGone {
        instance: InstanceId,
    },
    /// Requests that are running or waiting here now.
    Running {
        requests: usize,
    },
    /// Everything that had to leave (followers, the epoch) has left.
    Left,
    Tick,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take the model's drain lock; keep trying until `Announce`.
    TakeLock,
    /// Write `draining` to the store and the health stream.
    Announce,
    /// Refuse new requests with a typed retryable error.
    RefuseNew,
    /// End what still runs, so that routers move it.
    MoveRest,
    /// Tell followers that the group is done, and leave the epoch. Answer `Left`.
    Leave,
    /// Give the lock back, revoke the lease, exit.
    Finish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Idle,
    Locking,
    Announced,
    Finishing,
    Leaving,
    Finished,
}

/// The machine. A group's leader runs it for the group; other roles run it for themselves.
#[derive(Debug)]
pub struct Drain {
    config: DrainConfig,
    needs_lock: bool,
    stage: Stage,
    began_at: Duration,
    announced_at: Duration,
    unacked: BTreeSet<InstanceId>,
    running: usize,
    moved: bool,
}

impl Drain {
    /// `needs_lock` for decoder groups: one of a model drains at a time.
    pub fn new(config: DrainConfig, needs_lock: bool) -> Self {
        Self {
            config,
            needs_lock,
            stage: Stage::Idle,
            began_at: Duration::ZERO,
            announced_at: Duration::ZERO,
            unacked: BTreeSet::new(),
            running: 0,
            moved: false,
        }
    }

    /// Whether the drain has begun.
    pub fn has_begun(&self) -> bool {
        self.stage > Stage::Idle
    }

    /// Whether `Finish` was emitted.
    pub fn is_finished(&self) -> bool {
        self.stage == Stage::Finished
    }

    /// When `Tick` is wanted at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        match self.stage {
            Stage::Idle | Stage::Finished => None,
            Stage::Locking => Some(self.lock_deadline()),
            Stage::Announced => Some(self.ack_deadline()),
            Stage::Finishing if !self.moved => Some(self.move_deadline()),
            Stage::Finishing | Stage::Leaving => Some(self.began_at + self.config.grace),
        }
    }

    /// Advances the machine.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Begin { routers } => self.begin(routers, now, &mut actions),
            Event::Locked if self.stage == Stage::Locking => self.announce(now, &mut actions),
            Event::RouterAcked { instance } | Event::RouterGone { instance } => {
                self.unacked.remove(&instance);
            }
            Event::Running { requests } => self.running = requests,
            Event::Left if self.stage == Stage::Leaving => self.finish(&mut actions),
            Event::Locked | Event::LockUnavailable | Event::Left | Event::Tick => {}
        }
        self.advance(now, &mut actions);
        actions
    }

    fn begin(&mut self, routers: Vec<InstanceId>, now: Duration, actions: &mut Vec<Action>) {
        if self.stage != Stage::Idle {
            return;
        }
        self.began_at = now;
        self.unacked = routers.into_iter().collect();
        self.stage = Stage::Locking;
        match self.needs_lock {
            true => actions.push(Action::TakeLock),
            false => self.announce(now, actions),
        }
    }

    fn announce(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.stage = Stage::Announced;
        self.announced_at = now;
        actions.push(Action::Announce);
    }

    fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.stage == Stage::Locking && now >= self.lock_deadline() {
            self.announce(now, actions);
        }
        if self.stage == Stage::Announced && (self.unacked.is_empty() || now >= self.ack_deadline())
        {
            self.stage = Stage::Finishing;
            actions.push(Action::RefuseNew);
        }
        if self.stage == Stage::Finishing {
            if self.running > 0 && !self.moved && now >= self.move_deadline() {
                self.moved = true;
                actions.push(Action::MoveRest);
            }
            if self.running == 0 || now >= self.began_at + self.config.grace {
                self.stage = Stage::Leaving;
                actions.push(Action::Leave);
            }
        }
        // `Left` may never come from a process that hangs; the end of the grace does.
        if self.stage == Stage::Leaving && now >= self.began_at + self.config.grace {
            self.finish(actions);
        }
    }

    fn finish(&mut self, actions: &mut Vec<Action>) {
        self.stage = Stage::Finished;
        actions.push(Action::Finish);
    }

    /// At most half the grace is spent waiting for another group's drain.
    fn lock_deadline(&self) -> Duration {
        self.began_at + self.config.grace / 2
    }

    fn ack_deadline(&self) -> Duration {
        let wait = self.config.ack_timeout.min(self.config.grace / 4);
        (self.announced_at + wait).min(self.move_deadline())
    }

    fn move_deadline(&self) -> Duration {
        let margin = self.config.move_margin.min(self.config.grace / 4);
        self.began_at + self.config.grace - margin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn drain(grace: u64) -> Drain {
        Drain::new(DrainConfig { grace: s(grace), ..DrainConfig::default() }, true)
    }

    /// Ticks at every deadline from `now` on; returns when each action came.
    fn run(drain: &mut Drain, mut now: Duration) -> Vec<(u64, Action)> {
        let mut log = Vec::new();
        while let Some(deadline) = drain.deadline() {
            now = now.max(deadline);
            let actions = drain.on(Event::Tick, now);
            assert!(!actions.is_empty(), "a deadline without consequence at {now:?}");
            log.extend(actions.into_iter().map(|action| (now.as_secs(), action)));
        }
        log
    }

    #[test]
    fn an_idle_group_leaves_as_soon_as_routers_know() {
        let mut drain = drain(330);
        let router = InstanceId::random();
        assert_eq!(drain.on(Event::Begin { routers: vec![router] }, s(0)), [Action::TakeLock]);
        assert_eq!(drain.on(Event::Locked, s(1)), [Action::Announce]);
        assert_eq!(
            drain.on(Event::RouterAcked { instance: router }, s(2)),
            [Action::RefuseNew, Action::Leave]
        );
        assert_eq!(drain.on(Event::Left, s(3)), [Action::Finish]);
        assert!(drain.is_finished());
        assert_eq!(drain.deadline(), None);
    }

    #[test]
    fn with_nobody_answering_every_step_still_comes_in_time() {
        let mut drain = drain(100);
        drain.on(Event::Running { requests: 3 }, s(0));
        let first = drain.on(Event::Begin { routers: vec![InstanceId::random()] }, s(0));
        assert_eq!(first, [Action::TakeLock]);
        assert_eq!(
            run(&mut drain, s(0)),
            [
                (50, Action::Announce),
                (55, Action::RefuseNew),
                (90, Action::MoveRest),
                (100, Action::Leave),
                (100, Action::Finish),
            ]
        );
    }

    #[test]
    fn short_graces_shrink_the_margins() {
        let mut drain = drain(8);
        drain.on(Event::Running { requests: 1 }, s(0));
        drain.on(Event::Begin { routers: vec![InstanceId::random()] }, s(0));
        let log = run(&mut drain, s(0));
        let order: Vec<Action> = log.iter().map(|(_, action)| *action).collect();
        use Action::{Announce, Finish, Leave, MoveRest, RefuseNew};
        assert_eq!(order, [Announce, RefuseNew, MoveRest, Leave, Finish]);
        assert!(log.last().unwrap().0 <= 8);
    }

    #[test]
    fn running_requests_are_waited_for() {
        let mut drain = Drain::new(DrainConfig::default(), false);
        drain.on(Event::Running { requests: 1 }, s(0));
        let actions = drain.on(Event::Begin { routers: vec![] }, s(0));
        assert_eq!(actions, [Action::Announce, Action::RefuseNew]);
        assert!(drain.on(Event::Tick, s(100)).is_empty());
        assert_eq!(drain.on(Event::Running { requests: 0 }, s(101)), [Action::Leave]);
        assert!(drain.on(Event::Begin { routers: vec![] }, s(102)).is_empty(), "begins once");
    }
}
