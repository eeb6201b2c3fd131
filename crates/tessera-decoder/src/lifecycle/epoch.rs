//! One epoch on this process, from the proposal that names it until nothing of it runs.

use std::sync::Arc;
use std::time::Duration;

use tessera_cluster::formation::Event;
use tessera_cluster::{EndReason, EpochSpec, Fence};
use tessera_collective::AbortHandle;
use tessera_collective::tcp::Root;
use tessera_engine::error::chain;
use tessera_types::{Epoch, TokenId};
use tokio::sync::watch;

use super::{Done, Lifecycle};
use crate::clock;
use crate::communicators::{self, Forming};
use crate::error::DecoderError;
use crate::following::{Following, Order, lock};
use crate::leading::LeaderLink;
use crate::worker::{Begin, Worker};

/// How far the ranks of this process are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has been begun.
    Named,
    /// Communicators are being made, or ranks are joining.
    Joining,
    Running,
    /// The ranks have left.
    Over,
}

/// See the module documentation.
pub(super) struct Run {
    fence: Fence,
    pub abort: AbortHandle,
    pub link: Option<Arc<LeaderLink>>,
    stage: Stage,
    root: Option<Root>,
    orders: Option<watch::Sender<Order>>,
    /// The formation machine waits for `Left`.
    leaving: bool,
    /// Both are needed before the canary may run.
    canary_wanted: bool,
    all_connected: bool,
    /// What the canary gave when the epoch began.
    pub canary: Option<Vec<TokenId>>,
}

impl Run {
    fn new(fence: Fence) -> Self {
        Self {
            abort: AbortHandle::new(fence.epoch),
            fence,
            link: None,
            stage: Stage::Named,
            root: None,
            orders: None,
            leaving: false,
            canary_wanted: false,
            all_connected: false,
            canary: None,
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.fence.epoch
    }

    /// Whether what concerns `epoch` concerns this run; what came late does not.
    pub fn is_in(&self, epoch: Epoch) -> bool {
        self.fence.check_epoch(epoch).is_ok()
    }

    /// Tells a follower's stream.
    pub fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            orders.send_replace(order);
        }
    }
}

impl Lifecycle {
    pub(super) fn make_id(&mut self, epoch: Epoch) {
        let mut run = Run::new(self.fence(epoch));
        let num_slots = self.config.num_slots() as usize;
        let made = communicators::make_id(self.config.tp, num_slots, self.listen_ip, &run.abort);
        match made {
            Ok((id, root)) => {
                run.root = root;
                self.events.push_back(Event::IdMade { epoch, id });
            }
            Err(error) => {
                let detail = chain(&error);
                self.events.push_back(Event::CommunicatorFailed { epoch, detail });
            }
        }
        self.run = Some(run);
    }

    /// Makes communicators and lets the ranks join, beside the loop.
    pub(super) fn init_communicator(&mut self, spec: EpochSpec, id: Vec<u8>, deadline: Duration) {
        let epoch = spec.epoch;
        let mut run = match self.run.take() {
            Some(run) if run.is_in(epoch) => run,
            _ => Run::new(self.fence(epoch)),
        };
        run.stage = Stage::Joining;
        if let Worker::Leader { engine, progress } = &self.worker {
            let link = LeaderLink::new(
                self.config.stream(),
                self.fence(epoch),
                spec.clone(),
                run.abort.clone(),
                Arc::clone(&self.mailbox),
            );
            self.current.set(Some(Arc::clone(&link)));
            self.tasks.spawn(Arc::clone(&link).watch(progress.clone(), engine.clone()));
            run.link = Some(link);
        }
        let forming = Forming {
            id,
            root: run.root.take(),
            first_rank: self.config.first_rank(),
            num_ranks: self.config.ranks_per_process,
            listen_ip: self.listen_ip,
            abort: run.abort.clone(),
            deadline: clock::instant_of(deadline).into_std(),
            spec: spec.clone(),
        };
        let (worker, link, abort) = (self.worker.clone(), run.link.clone(), run.abort.clone());
        self.calls.spawn(async move {
            let formed = tokio::task::spawn_blocking(move || forming.form()).await;
            let result = match formed {
                Ok(Ok(communicators)) => {
                    let num_blocks = spec.num_kv_blocks;
                    worker.begin(Begin { epoch, num_blocks, abort, communicators, link }).await
                }
                Ok(Err(error)) => Err(chain(&error)),
                Err(_) => Err("the thread that joins the group panicked".to_owned()),
            };
            Done::Joined { spec, result }
        });
        self.run = Some(run);
    }

    /// The ranks joined, or not.
    pub(super) fn on_joined(&mut self, spec: EpochSpec, result: Result<(), String>) {
        let epoch = spec.epoch;
        let Some(run) = self.run.as_mut().filter(|run| run.is_in(epoch)) else { return };
        match result {
            Ok(()) if run.stage == Stage::Joining => run.stage = Stage::Running,
            // The engine has already left what it joined.
            Ok(()) => {}
            Err(detail) => {
                run.stage = Stage::Over;
                self.events.push_back(Event::CommunicatorFailed { epoch, detail });
                return self.finish_leaving();
            }
        }
        if run.leaving {
            return self.leave_ranks();
        }
        self.events.push_back(Event::CommunicatorReady { epoch });
        if let Worker::Follower { ranks } = &self.worker {
            let (orders, receiver) = watch::channel(Order::Follow);
            let run = self.run.as_mut().expect("it was found above");
            run.orders = Some(orders);
            let following = Following {
                config: self.config.stream(),
                fence: self.fence(epoch),
                slot: self.config.slot,
                spec,
                ranks: Arc::clone(ranks),
                abort: self.run.as_ref().expect("it was found above").abort.clone(),
                mailbox: Arc::clone(&self.mailbox),
                orders: receiver,
            };
            self.tasks.spawn(following.run());
        }
    }

    /// Leaves the epoch: flag and communicators first, then peers, then the ranks.
    pub(super) fn leave(&mut self, epoch: Epoch, reason: &EndReason) {
        self.current.set(None);
        self.metrics.epochs_ended.with_label_values(&[reason.label()]).inc();
        match reason {
            EndReason::Drained | EndReason::Superseded { .. } => {
                tracing::info!(epoch = epoch.0, kind = reason.label(), %reason, "leaving the epoch");
            }
            _ => {
                tracing::warn!(epoch = epoch.0, kind = reason.label(), %reason, "leaving the epoch")
            }
        }
        let Some(run) = self.run.as_mut().filter(|run| run.is_in(epoch)) else {
            self.events.push_back(Event::Left { epoch });
            return;
        };
        run.leaving = true;
        run.abort.abort(reason.to_string());
        if let Some(link) = &run.link {
            link.end(reason.clone());
        }
        run.order(Order::Leave(reason.clone()));
        match run.stage {
            Stage::Named | Stage::Over => self.finish_leaving(),
            // The abort ends the join; what comes of it is left then.
            Stage::Joining => {}
            Stage::Running => self.leave_ranks(),
        }
    }

    /// Lets the ranks leave; the engine's observer or the call says when they have.
    fn leave_ranks(&mut self) {
        let Some(run) = &mut self.run else { return };
        if run.stage == Stage::Over {
            return self.finish_leaving();
        }
        let reason = run.abort.flag().reason().unwrap_or("the epoch ended").to_owned();
        match &self.worker {
            Worker::Leader { engine, .. } => engine.end_epoch(&reason),
            Worker::Follower { ranks } => {
                let (ranks, epoch) = (Arc::clone(ranks), run.epoch());
                self.calls.spawn(async move {
                    let leave = move || lock(&ranks).end_epoch(&reason);
                    let left = tokio::task::spawn_blocking(leave).await;
                    let result = match left {
                        Ok(result) => result.map_err(|error| chain(&error)),
                        // The runtime ends, and the ranks with their last holder.
                        Err(error) if error.is_cancelled() => Ok(()),
                        Err(_) => Err("a rank panicked".to_owned()),
                    };
                    Done::RanksLeft { epoch, result }
                });
            }
        }
    }

    /// The ranks are out of the epoch, by themselves or because they were asked.
    pub(super) fn on_ranks_left(&mut self, epoch: Epoch, reason: &str, result: Result<(), String>) {
        if let Err(reason) = result {
            self.outcome = Some(Err(DecoderError::Hung { reason }));
            return;
        }
        let Some(run) = self.run.as_mut().filter(|run| run.is_in(epoch)) else { return };
        run.stage = Stage::Over;
        if run.leaving {
            return self.finish_leaving();
        }
        let by = self.me.instance;
        let reason = EndReason::Aborted { by, detail: reason.to_owned() };
        match &run.link {
            // It tells the followers, and posts the end.
            Some(link) => link.end(reason),
            None => {
                let end = tessera_cluster::EpochEnd { epoch, reason };
                self.events.push_back(Event::Ended(end));
            }
        }
    }

    fn finish_leaving(&mut self) {
        if let Some(run) = self.run.take_if(|run| run.leaving) {
            self.events.push_back(Event::Left { epoch: run.epoch() });
        }
    }

    pub(super) fn want_canary(&mut self, epoch: Epoch) {
        if let Some(run) = self.run.as_mut().filter(|run| run.is_in(epoch)) {
            run.canary_wanted = true;
        }
        self.run_first_canary();
    }

    pub(super) fn on_all_connected(&mut self, epoch: Epoch) {
        if let Some(run) = self.run.as_mut().filter(|run| run.is_in(epoch)) {
            run.all_connected = true;
        }
        self.run_first_canary();
    }

    fn run_first_canary(&mut self) {
        let ready = |run: &&mut Run| run.canary_wanted && run.all_connected && !run.leaving;
        let Some(run) = self.run.as_mut().filter(ready) else { return };
        // Once per epoch.
        run.canary_wanted = false;
        let epoch = run.epoch();
        let Worker::Leader { engine, .. } = &self.worker else { return };
        let call =
            crate::canary::first(engine.clone(), self.store.clone(), self.canary_key.clone());
        self.calls.spawn(async move { Done::FirstCanary { epoch, result: call.await } });
    }
}
