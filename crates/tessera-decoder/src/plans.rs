//! The gRPC service `Group`: plan streams of followers, each opened once per epoch.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tessera_cluster::Refusal;
use tessera_cluster::leader::Event;
use tessera_cluster::progress::Report;
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::follower_message::Message;
use tessera_types::{Epoch, InstanceId, StepId};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::leading::{LeaderLink, Outgoing};
use crate::mailbox::{Letter, Mailbox};
use crate::service::refusal_status;

/// Longest wait for a follower to introduce itself.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The link of the epoch that this process leads, if it leads one.
#[derive(Debug, Clone, Default)]
pub(crate) struct CurrentLink {
    link: Arc<Mutex<Option<Arc<LeaderLink>>>>,
}

impl CurrentLink {
    pub fn get(&self) -> Option<Arc<LeaderLink>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, link: Option<Arc<LeaderLink>>) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = link;
    }
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub(crate) struct GroupService {
    pub current: CurrentLink,
    pub mailbox: Arc<Mailbox>,
    pub tasks: TaskTracker,
}

#[tonic::async_trait]
impl pb::group_server::Group for GroupService {
    type PlansStream = Pin<Box<dyn Stream<Item = Outgoing> + Send>>;

    async fn plans(
        &self,
        request: Request<Streaming<pb::FollowerMessage>>,
    ) -> Result<Response<Self::PlansStream>, Status> {
        let mut messages = request.into_inner();
        let first = tokio::time::timeout(JOIN_TIMEOUT, messages.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no introduction in time"))??;
        let Some(Message::Join(join)) = first.and_then(|first| first.message) else {
            return Err(crate::error::refused("join", "the first message must be a join"));
        };
        let link = self.current.get().ok_or_else(|| refusal_status(Refusal::Ended))?;
        let (instance, outgoing) = link.join(&join).map_err(refusal_status)?;
        let mailbox = Arc::clone(&self.mailbox);
        self.tasks.spawn(listen(link, instance, messages, mailbox));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// Carries a follower's messages to the machine until its stream ends.
async fn listen(
    link: Arc<LeaderLink>,
    instance: InstanceId,
    mut messages: Streaming<pb::FollowerMessage>,
    mailbox: Arc<Mailbox>,
) {
    let detail = loop {
        match messages.message().await {
            Ok(Some(pb::FollowerMessage { message: Some(message) })) => match message {
                Message::Ack(ack) => link.on(ack_event(instance, &ack)),
                Message::Abort(abort) => link.on(Event::PeerAbort {
                    instance,
                    epoch: Epoch(abort.epoch),
                    detail: abort.reason,
                }),
                Message::Drain(_) => mailbox.post(Letter::DrainAsked),
                Message::Join(_) => break "a second introduction".to_owned(),
            },
            Ok(Some(_)) => break "an empty message".to_owned(),
            Ok(None) => break "the follower closed it".to_owned(),
            Err(status) => break status.message().to_owned(),
        }
    };
    link.on(Event::Closed { instance, detail });
}

fn ack_event(instance: InstanceId, ack: &pb::Ack) -> Event {
    Event::Ack {
        instance,
        received: StepId(ack.received),
        completed: StepId(ack.completed),
        report: Report {
            progress: ack.progress,
            layer_time: Duration::from_micros(ack.layer_us.into()),
        },
    }
}
