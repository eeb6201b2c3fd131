//! A follower's end of its plan stream: dials the leader once, hands plans to the ranks, acknowledges.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tessera_cluster::follower::{Action, Event};
use tessera_cluster::progress::Report;
use tessera_cluster::{EndReason, EpochSpec, Fence, Follower, StreamConfig};
use tessera_collective::AbortHandle;
use tessera_engine::FollowerAck;
use tessera_engine::error::chain;
use tessera_proto::MAX_MESSAGE_BYTES;
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::follower_message::Message;
use tessera_proto::decoder::v1::group_client::GroupClient;
use tessera_proto::decoder::v1::leader_message::Message as Received;
use tessera_types::{Epoch, InstanceId, StepId, StepPlan};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

use crate::clock;
use crate::fragments::Fragments;
use crate::mailbox::{Letter, Mailbox};

/// How often the ranks are looked at while nothing arrives.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Messages on their way to the leader; it reads at once, so more means that it does not read.
const QUEUE_CAPACITY: usize = 64;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the last message has to leave before the stream is dropped.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

/// The ranks of this process, as the plan stream and the lifecycle share them.
pub(crate) type Ranks = Arc<Mutex<tessera_engine::Follower>>;

/// Locks the ranks; a panic elsewhere has ended their epoch, which the next call reports.
pub(crate) fn lock(ranks: &Ranks) -> MutexGuard<'_, tessera_engine::Follower> {
    ranks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the lifecycle wants of a running stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    Follow,
    /// Ask the leader to drain the group.
    AskToDrain,
    /// Leave the epoch.
    Leave(EndReason),
}

/// One epoch's stream.
pub(crate) struct Following {
    pub config: StreamConfig,
    pub fence: Fence,
    pub spec: EpochSpec,
    pub slot: u32,
    pub ranks: Ranks,
    pub abort: AbortHandle,
    pub mailbox: Arc<Mailbox>,
    pub orders: watch::Receiver<Order>,
}

struct Stream {
    following: Following,
    machine: Follower,
    me: InstanceId,
    outgoing: mpsc::Sender<pb::FollowerMessage>,
    /// Pieces of a plan that is not complete.
    fragments: Fragments,
    /// Layers computed before this epoch.
    base: u64,
    has_ended: bool,
}

impl Following {
    /// Follows until the epoch ends; its end aborts the epoch here and is posted.
    pub async fn run(self) {
        let (machine, actions) =
            Follower::start(self.config.clone(), self.spec.clone(), self.slot, clock::now());
        let me = self.spec.slots[self.slot as usize].instance;
        let (outgoing, messages) = mpsc::channel(QUEUE_CAPACITY);
        let base = lock(&self.ranks).ack().map_or(0, |ack| ack.progress);
        let fragments = Fragments::default();
        let mut stream =
            Stream { following: self, machine, me, outgoing, fragments, base, has_ended: false };
        for action in actions {
            if let Action::Dial { address, instance, slot } = action {
                stream.introduce(instance, slot);
                // Both halves hold only the receiving ends, so the stream ends with `stream.outgoing`.
                match dial(&address, messages).await {
                    Ok(received) => stream.follow(received).await,
                    Err(detail) => stream.feed(Event::Closed { detail }, None),
                }
                return;
            }
        }
    }
}

async fn dial(
    address: &str,
    messages: mpsc::Receiver<pb::FollowerMessage>,
) -> Result<Streaming<pb::LeaderMessage>, String> {
    let text = |error: tonic::transport::Error| chain(&error);
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .map_err(text)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(2))
        .connect()
        .await
        .map_err(text)?;
    let mut client = GroupClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let call = client.plans(ReceiverStream::new(messages));
    match tokio::time::timeout(CONNECT_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("the leader does not answer".to_owned()),
    }
}

impl Stream {
    fn introduce(&mut self, instance: InstanceId, slot: u32) {
        let fence = &self.following.fence;
        let fence = pb::Fence {
            cluster: fence.cluster.to_string(),
            group: fence.group.to_string(),
            epoch: fence.epoch.0,
        };
        let join = pb::Join { fence: Some(fence), instance: instance.to_string(), slot };
        self.send(Message::Join(join));
    }

    async fn follow(mut self, mut received: Streaming<pb::LeaderMessage>) {
        self.feed(Event::Opened, None);
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut orders = self.following.orders.clone();
        while !self.has_ended {
            tokio::select! {
                message = received.message() => match message {
                    Ok(Some(pb::LeaderMessage { message: Some(message) })) => self.receive(message),
                    Ok(Some(_)) => self.closed("an empty message"),
                    Ok(None) => self.closed("the leader closed it"),
                    Err(status) => self.closed(status.message()),
                },
                Ok(()) = orders.changed() => {
                    let order = orders.borrow_and_update().clone();
                    self.obey(order);
                }
                _ = poll.tick() => self.look_at_ranks(),
            }
        }
        // Dropping the call at once would drop the abort that is on its way.
        drop(self.outgoing);
        let flushed = async { while let Ok(Some(_)) = received.message().await {} };
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, flushed).await;
    }

    fn receive(&mut self, message: Received) {
        match message {
            Received::Plan(plan) => self.receive_plan(&plan),
            Received::Fragment(piece) => match self.fragments.add(piece) {
                Ok(Some(plan)) => self.receive_plan(&plan),
                Ok(None) => {}
                Err(error) => self.closed(&format!("pieces that make no plan: {error}")),
            },
            Received::Late(late) => {
                let result = lock(&self.following.ranks).late(StepId(late.step), late.inputs());
                self.check_ranks(result.map_err(|error| chain(&error)));
            }
            Received::Beat(beat) => {
                let result = lock(&self.following.ranks).beat();
                self.check_ranks(result.map_err(|error| chain(&error)));
                let (epoch, step) = (Epoch(beat.epoch), StepId(beat.step));
                self.feed(Event::Beat { epoch, step }, None);
            }
            Received::Abort(abort) => {
                let (epoch, detail) = (Epoch(abort.epoch), abort.reason);
                self.feed(Event::PeerAbort { epoch, detail }, None);
            }
        }
    }

    fn receive_plan(&mut self, plan: &pb::Plan) {
        match StepPlan::try_from(plan) {
            Ok(plan) => {
                let event = Event::Plan { epoch: plan.epoch, step: plan.step };
                self.feed(event, Some(plan));
            }
            Err(error) => self.closed(&format!("a plan that is none: {error}")),
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Follow => {}
            Order::AskToDrain => self.send(Message::Drain(pb::DrainGroup {})),
            Order::Leave(reason) => self.feed(Event::LocalEnd { reason }, None),
        }
    }

    fn look_at_ranks(&mut self) {
        if let Some(reason) = self.following.abort.flag().reason() {
            return self.check_ranks(Err(reason.to_owned()));
        }
        let ack = lock(&self.following.ranks).ack();
        match ack {
            Ok(ack) => {
                self.feed(Event::LocalReport { report: report(&ack, self.base) }, None);
                self.feed(Event::Completed { step: ack.completed }, None);
            }
            Err(error) => self.check_ranks(Err(chain(&error))),
        }
    }

    fn check_ranks(&mut self, result: Result<(), String>) {
        if let Err(detail) = result {
            let reason = EndReason::Aborted { by: self.me, detail };
            self.feed(Event::LocalEnd { reason }, None);
        }
    }

    fn closed(&mut self, detail: &str) {
        self.feed(Event::Closed { detail: detail.to_owned() }, None);
    }

    fn feed(&mut self, event: Event, plan: Option<StepPlan>) {
        let mut plan = plan;
        for action in self.machine.on(event, clock::now()) {
            match action {
                Action::Dial { .. } => {}
                Action::Execute { .. } => {
                    let Some(plan) = plan.take() else { continue };
                    let result = lock(&self.following.ranks).plan(plan);
                    self.check_ranks(result.map_err(|error| chain(&error)));
                }
                Action::SendAck { received, completed, report } => {
                    let ack = pb::Ack {
                        received: received.0,
                        completed: completed.0,
                        progress: report.progress,
                        layer_us: u32::try_from(report.layer_time.as_micros()).unwrap_or(u32::MAX),
                    };
                    self.send(Message::Ack(ack));
                }
                Action::SendAbort { detail } => {
                    let epoch = self.following.spec.epoch.0;
                    self.send(Message::Abort(pb::Abort { epoch, reason: detail }));
                }
                Action::End(end) => {
                    self.has_ended = true;
                    self.following.abort.abort(end.reason.to_string());
                    self.following.mailbox.post(Letter::Ended(end));
                }
            }
        }
    }

    /// A leader that does not read shows by its silence; what it is not told is lost with the epoch.
    fn send(&mut self, message: Message) {
        let _ = self.outgoing.try_send(pb::FollowerMessage { message: Some(message) });
    }
}

fn report(ack: &FollowerAck, base: u64) -> Report {
    Report {
        progress: ack.progress.saturating_sub(base),
        layer_time: Duration::from_micros(ack.layer_us.into()),
    }
}
