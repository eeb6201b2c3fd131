//! How this process leaves: the leader drains the group, a follower asks it to.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tessera_cluster::drain::{Action, Event};
use tessera_cluster::formation::{self, Compare, State, TxnOutcome};
use tessera_cluster::{ActiveRecord, ActiveState, Record};
use tessera_membership::{Op, StoreError};

use super::store::transact;
use super::{Done, Lifecycle};
use crate::clock;
use crate::following::Order;

/// Times that the active record's deletion is tried while others write to it.
const MAX_DELETES: usize = 3;
/// How often a drain lock that another group holds is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(200);

impl Lifecycle {
    /// The process was asked to leave.
    pub(super) fn begin_shutdown(&mut self) {
        self.shutting_down = true;
        if self.leads() {
            return self.begin_drain();
        }
        self.leave_by = Some(clock::now() + self.config.drain().grace);
        if let Some(run) = &self.run {
            tracing::info!(epoch = run.epoch().0, "asking the leader to drain the group");
            run.order(Order::AskToDrain);
        }
        self.retire_when_free();
    }

    /// A follower that shuts down goes when its epoch has ended, or at the end of its grace.
    pub(super) fn retire_when_free(&mut self) {
        if !self.shutting_down || self.leads() {
            return;
        }
        let late = self.leave_by.is_some_and(|at| clock::now() >= at);
        if late || self.formation.state() == State::Outside {
            self.leave_by = None;
            self.events.push_back(formation::Event::Retire);
        }
        if self.formation.state() == State::Retired {
            self.outcome = Some(Ok(()));
        }
    }

    /// The leader drains for the whole group, whichever member was asked to leave.
    pub(super) fn begin_drain(&mut self) {
        let requests = self.num_attempts.load(Ordering::Acquire);
        self.feed_drain(Event::Running { requests });
        // Routers learn of it on the health stream; one that has not yet is refused with a typed error.
        self.feed_drain(Event::Begin { routers: Vec::new() });
    }

    pub(super) fn feed_drain(&mut self, event: Event) {
        for action in self.drain.on(event, clock::now()) {
            self.perform_drain(action);
        }
    }

    /// Tells the drain what it waits for.
    pub(super) fn look_after_drain(&mut self) {
        if !self.drain.has_begun() || self.drain.is_finished() {
            return;
        }
        let requests = self.num_attempts.load(Ordering::Acquire);
        self.feed_drain(Event::Running { requests });
        if self.formation.state() == State::Retired {
            self.feed_drain(Event::Left);
        }
    }

    fn perform_drain(&mut self, action: Action) {
        tracing::info!(?action, "drain");
        match action {
            Action::TakeLock => self.take_lock(),
            Action::Announce => {
                self.draining = true;
                self.announce();
            }
            Action::RefuseNew => self.draining = true,
            Action::MoveRest => self.move_rest.cancel(),
            Action::Leave => self.events.push_back(formation::Event::Retire),
            Action::Finish => {
                // What the group was is over: no router has to find out, and no successor has to ask
                // whether its members are still there.
                self.delete_active();
                self.release_lock();
                self.outcome = Some(Ok(()));
            }
        }
    }

    /// Tells routers through the store that the epoch takes nothing new.
    fn announce(&mut self) {
        let Some((record, mod_revision)) = self.formation.active() else { return };
        if record.instance != self.me.instance {
            return;
        }
        let record = ActiveRecord { state: ActiveState::Draining, ..record.clone() };
        let key = self.keys.active(self.formation.group());
        let compares = vec![Compare { key: key.clone(), mod_revision }];
        let (store, op) = (self.store.clone(), Op::put(key, record.to_bytes()));
        self.last_writes.spawn(async move {
            if transact(&store, compares, op).await != TxnOutcome::Committed {
                tracing::warn!("the drain was not announced in the store");
            }
        });
    }

    /// Deletes the active record if it is still ours, whatever has been written to it since.
    fn delete_active(&mut self) {
        let (store, me) = (self.store.clone(), self.me.instance);
        let key = self.keys.active(self.formation.group());
        self.last_writes.spawn(async move {
            for _ in 0..MAX_DELETES {
                let Ok(Some(entry)) = store.get(&key).await else { return };
                let ours = ActiveRecord::from_bytes(&entry.value);
                if ours.map_or(true, |record| record.instance != me) {
                    return;
                }
                let compare = Compare { key: key.clone(), mod_revision: entry.mod_revision };
                let outcome = transact(&store, vec![compare], Op::delete(key.clone())).await;
                if outcome == TxnOutcome::Committed {
                    return;
                }
            }
        });
    }

    fn take_lock(&mut self) {
        let (store, key) = (self.store.clone(), self.keys.drain_lock());
        let (value, lease_id) = (self.me.instance.to_string(), self.registration.lease_id());
        self.calls.spawn(async move {
            loop {
                match store.create(&key, value.clone(), lease_id).await {
                    Ok(_) => return Done::Drain(Event::Locked),
                    Err(StoreError::CompareFailed { current: Some(current), .. })
                        if current.value == value.as_bytes() =>
                    {
                        return Done::Drain(Event::Locked);
                    }
                    // Another group drains, or the store is away: the machine stops waiting in time.
                    Err(_) => tokio::time::sleep(LOCK_RETRY).await,
                }
            }
        });
    }

    fn release_lock(&mut self) {
        let (store, key) = (self.store.clone(), self.keys.drain_lock());
        let value = self.me.instance.to_string();
        self.last_writes.spawn(async move {
            let ours = tessera_membership::Compare::value_is(key.clone(), value);
            let txn = tessera_membership::Txn::when([ours]).then([Op::delete(key)]);
            if let Err(error) = store.txn(txn).await {
                // The lock hangs on our lease and goes with it.
                tracing::debug!(%error, "the drain lock was not released");
            }
        });
    }
}
