//! The leader's end of an epoch's plan streams: the machine of `tessera-cluster` with the queues to the
//! followers behind it.
//!
//! Plans come on the engine's thread and leave at once, without a detour through the runtime. Each queue
//! is bounded: a follower lags by two steps at most, so a full one is a broken stream and ends the epoch.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tessera_cluster::leader::{Action, Event};
use tessera_cluster::progress::Report;
use tessera_cluster::{EndReason, Fence, Leader, Refusal, StreamConfig};
use tessera_cluster::{EpochSpec, epoch_end::EpochEnd};
use tessera_collective::AbortHandle;
use tessera_engine::{EngineHandle, PlanSink, PlanSinkError, RankProgress};
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::leader_message::Message;
use tessera_types::{Epoch, InstanceId, LateInputs, StepId, StepPlan};
use tokio::sync::mpsc;
use tonic::Status;

use crate::clock;
use crate::fragments;
use crate::mailbox::{Letter, Mailbox};

/// Messages on their way to one follower: two steps of two messages, beats, and room for plans in pieces.
const QUEUE_CAPACITY: usize = 64;
/// How often the leader looks at its own ranks; also the resolution of the machine's timers here.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// What a follower's stream carries.
pub(crate) type Outgoing = Result<pb::LeaderMessage, Status>;

/// Shared by the engine's thread, the plan streams and the lifecycle.
pub(crate) struct LeaderLink {
    fence: Fence,
    abort: AbortHandle,
    mailbox: Arc<Mailbox>,
    /// Held for moments only, never across an await.
    state: Mutex<State>,
}

struct State {
    machine: Leader,
    followers: BTreeMap<InstanceId, mpsc::Sender<Outgoing>>,
    end: Option<EpochEnd>,
}

impl LeaderLink {
    /// Begins to lead `spec`, whose epoch `fence` carries. The epoch's end aborts `abort` and is posted.
    pub fn new(
        config: StreamConfig,
        fence: Fence,
        spec: EpochSpec,
        abort: AbortHandle,
        mailbox: Arc<Mailbox>,
    ) -> Arc<Self> {
        let machine = Leader::new(config, fence.clone(), spec, clock::now());
        let state = State { machine, followers: BTreeMap::new(), end: None };
        let link = Arc::new(Self { fence, abort, mailbox, state: Mutex::new(state) });
        // A leader without followers is connected with all of them.
        if link.state().machine.all_connected() {
            link.mailbox.post(Letter::AllConnected { epoch: link.fence.epoch });
        }
        link
    }

    /// Takes or refuses a follower's stream; what comes out of the receiver is for that follower.
    ///
    /// # Errors
    /// The stream is not this epoch's, or not the follower's first.
    pub fn join(&self, join: &pb::Join) -> Result<(InstanceId, mpsc::Receiver<Outgoing>), Refusal> {
        let fence = join.fence.clone().unwrap_or_default();
        // An instance that is not one is no member either.
        let instance = InstanceId::parse(&join.instance).unwrap_or(InstanceId(uuid::Uuid::nil()));
        let (sender, receiver) = mpsc::channel(QUEUE_CAPACITY);
        let mut state = self.state();
        let event = Event::Join {
            cluster: fence.cluster,
            group: fence.group,
            epoch: Epoch(fence.epoch),
            instance,
            slot: join.slot,
        };
        let actions = state.machine.on(event, clock::now());
        for action in &actions {
            match action {
                Action::Refuse { refusal, .. } => return Err(refusal.clone()),
                Action::Accept { .. } => {
                    state.followers.insert(instance, sender.clone());
                }
                _ => {}
            }
        }
        self.perform(&mut state, actions, &[]);
        Ok((instance, receiver))
    }

    /// Feeds the machine.
    pub fn on(&self, event: Event) {
        let mut state = self.state();
        let actions = state.machine.on(event, clock::now());
        self.perform(&mut state, actions, &[]);
    }

    /// Ends the epoch from our side.
    pub fn end(&self, reason: EndReason) {
        self.on(Event::LocalEnd { reason });
    }

    /// Watches over the epoch until it ends: reports our own ranks, sends beats, judges followers.
    pub async fn watch(self: Arc<Self>, ranks: Vec<RankProgress>, engine: EngineHandle) {
        let base: u64 = ranks.iter().map(RankProgress::layers).sum();
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let layers: u64 = ranks.iter().map(RankProgress::layers).sum();
            let layer_us = ranks.iter().map(RankProgress::layer_us).max().unwrap_or(0);
            let progress = layers.saturating_sub(base);
            let report = Report { progress, layer_time: Duration::from_micros(layer_us.into()) };
            let load = engine.load();
            let mut state = self.state();
            if state.end.is_some() {
                return;
            }
            if load.epoch.is_some_and(|of| self.fence.check_epoch(of).is_ok()) {
                let step = load.completed_step;
                let actions = state.machine.on(Event::Completed { step }, clock::now());
                self.perform(&mut state, actions, &[]);
            }
            let actions = state.machine.on(Event::LocalReport { report }, clock::now());
            self.perform(&mut state, actions, &[]);
        }
    }

    fn send_plan(&self, plan: &StepPlan) -> Result<(), PlanSinkError> {
        let mut state = self.state();
        check_running(&state)?;
        let messages = match state.followers.is_empty() {
            true => Vec::new(),
            false => fragments::split(plan.into()),
        };
        let actions = state.machine.on(Event::Plan { step: plan.step }, clock::now());
        self.perform(&mut state, actions, &messages);
        check_running(&state)
    }

    fn send_late(&self, step: StepId, late: &LateInputs) -> Result<(), PlanSinkError> {
        let mut state = self.state();
        check_running(&state)?;
        if !state.followers.is_empty() {
            let late = message(Message::Late(pb::Late::new(self.fence.epoch, step, late)));
            self.broadcast(&mut state, &late);
        }
        check_running(&state)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The machine is consistent between any two calls, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn perform(&self, state: &mut State, actions: Vec<Action>, plan: &[pb::LeaderMessage]) {
        for action in actions {
            match action {
                Action::Accept { .. } | Action::Refuse { .. } => {}
                Action::AllConnected => {
                    self.mailbox.post(Letter::AllConnected { epoch: self.fence.epoch });
                }
                Action::SendPlan { .. } => {
                    plan.iter().for_each(|message| self.broadcast(state, message));
                }
                Action::SendBeat { step } => {
                    let beat = pb::Beat { epoch: self.fence.epoch.0, step: step.0 };
                    self.broadcast(state, &message(Message::Beat(beat)));
                }
                Action::SendAbort { detail } => {
                    let abort = pb::Abort { epoch: self.fence.epoch.0, reason: detail };
                    let abort = message(Message::Abort(abort));
                    for (_, follower) in std::mem::take(&mut state.followers) {
                        // Who does not take it sees the stream end.
                        let _ = follower.try_send(Ok(abort.clone()));
                    }
                }
                Action::End(end) => {
                    self.abort.abort(end.reason.to_string());
                    state.end = Some(end.clone());
                    self.mailbox.post(Letter::Ended(end));
                }
            }
        }
    }

    /// Sends to every follower; one that does not take it has a broken stream.
    fn broadcast(&self, state: &mut State, message: &pb::LeaderMessage) {
        let failed = state.followers.iter().find_map(|(instance, follower)| {
            let error = follower.try_send(Ok(message.clone())).err()?;
            Some((*instance, error.to_string()))
        });
        if let Some((instance, detail)) = failed {
            let actions = state.machine.on(Event::Closed { instance, detail }, clock::now());
            self.perform(state, actions, &[]);
        }
    }
}

fn message(message: Message) -> pb::LeaderMessage {
    pb::LeaderMessage { message: Some(message) }
}

fn check_running(state: &State) -> Result<(), PlanSinkError> {
    match &state.end {
        None => Ok(()),
        Some(end) => Err(PlanSinkError::Closed { reason: end.reason.to_string() }),
    }
}

impl fmt::Debug for LeaderLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaderLink").field("epoch", &self.fence.epoch).finish_non_exhaustive()
    }
}

/// The engine's end of the plan streams.
#[derive(Debug)]
pub(crate) struct Plans(pub Arc<LeaderLink>);

impl PlanSink for Plans {
    fn plan(&mut self, plan: &Arc<StepPlan>) -> Result<(), PlanSinkError> {
        self.0.send_plan(plan)
    }

    fn late(&mut self, step: StepId, late: &Arc<LateInputs>) -> Result<(), PlanSinkError> {
        self.0.send_late(step, late)
    }
}
