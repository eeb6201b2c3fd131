//! The gRPC service `Decoder`: attempts, load and health, fenced by the epoch this process leads.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tessera_cluster::{Fence, Refusal};
use tessera_engine::{EngineHandle, EngineLoad};
use tessera_proto::decoder::v1 as pb;
use tessera_proto::{ConvertError, ErrorReason};
use tessera_types::{Epoch, InstanceId};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::generate::{Attempts, RESPONSES_IN_FLIGHT, serve};

/// A health stream says something at least this often.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);
/// Longest wait for a stream's first message.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// Health messages on their way to one watcher; more than that and it misses none, it waits.
const HEALTH_IN_FLIGHT: usize = 4;

/// What this process is in its group right now. The lifecycle writes it, services read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Cluster, group and the epoch joined (0: none).
    pub fence: Fence,
    pub state: pb::GroupState,
    /// Whether attempts are taken: leader of a serving epoch.
    pub takes_attempts: bool,
}

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub struct DecoderService {
    instance: InstanceId,
    standing: watch::Receiver<Standing>,
    engine: Option<EngineHandle>,
    attempts: Option<Arc<Attempts>>,
    tasks: TaskTracker,
}

impl DecoderService {
    /// `attempts` is `None` on followers, which serve health only.
    pub fn new(
        instance: InstanceId,
        standing: watch::Receiver<Standing>,
        attempts: Option<Arc<Attempts>>,
        tasks: TaskTracker,
    ) -> Self {
        let engine = attempts.as_ref().map(|attempts| attempts.engine.clone());
        Self { instance, standing, engine, attempts, tasks }
    }

    fn load_now(&self) -> EngineLoad {
        self.engine.as_ref().map(EngineHandle::load).unwrap_or_default()
    }

    /// Refuses attempts that are not for the epoch this process leads.
    fn admit(&self, fence: &pb::Fence) -> Result<(Arc<Attempts>, Fence), Status> {
        let standing = self.standing.borrow().clone();
        let epoch = Epoch(fence.epoch);
        standing.fence.check(&fence.cluster, &fence.group, epoch).map_err(refusal_status)?;
        if standing.state == pb::GroupState::Draining {
            return Err(ErrorReason::Draining.status("the group is draining").into());
        }
        match &self.attempts {
            Some(attempts) if standing.takes_attempts => Ok((attempts.clone(), standing.fence)),
            _ => Err(ErrorReason::NotReady
                .status("this process does not lead a serving epoch")
                .into()),
        }
    }
}

/// A stream of another incarnation as a status.
pub fn refusal_status(refusal: Refusal) -> Status {
    let reason = match refusal.is_retryable() {
        true => ErrorReason::StaleEpoch,
        false => ErrorReason::InvalidArgument,
    };
    reason.status(refusal.to_string()).field("fence").into()
}

fn load_message(load: &EngineLoad) -> pb::LoadResponse {
    pb::LoadResponse {
        epoch: load.epoch.unwrap_or_default().0,
        running: load.scheduler.running,
        waiting: load.scheduler.waiting,
        kv_blocks: load.scheduler.num_blocks,
        kv_blocks_free: load.scheduler.num_free_blocks,
    }
}

fn health_message(
    instance: InstanceId,
    standing: &Standing,
    load: &EngineLoad,
) -> pb::HealthResponse {
    pb::HealthResponse {
        epoch: standing.fence.epoch.0,
        state: standing.state.into(),
        load: Some(load_message(load)),
        steps: load.completed_step.0,
        instance: instance.to_string(),
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl pb::decoder_server::Decoder for DecoderService {
    type GenerateStream = Responses<pb::GenerateResponse>;
    type HealthStream = Responses<pb::HealthResponse>;

    async fn generate(
        &self,
        request: Request<Streaming<pb::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(START_TIMEOUT, requests.next()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no start in time"))?;
        let first = first.transpose()?.and_then(|request| request.message);
        let Some(pb::generate_request::Message::Start(start)) = first else {
            return Err(crate::error::refused("start", "the first message must be a start"));
        };
        let fence = start.fence.as_ref().ok_or(ConvertError::Missing { field: "fence" })?;
        let (attempts, fence) = self.admit(fence)?;
        let (responses, stream) = mpsc::channel(RESPONSES_IN_FLIGHT);
        // Ends by itself when either side of the stream ends.
        self.tasks.spawn(serve(attempts, fence, start, requests, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn load(
        &self,
        _: Request<pb::LoadRequest>,
    ) -> Result<Response<pb::LoadResponse>, Status> {
        Ok(Response::new(load_message(&self.load_now())))
    }

    async fn health(
        &self,
        request: Request<pb::HealthRequest>,
    ) -> Result<Response<Self::HealthStream>, Status> {
        let asked = request.into_inner();
        let ours = self.standing.borrow().fence.clone();
        ours.check(&asked.cluster, &asked.group, ours.epoch)
            .or_else(|refusal| match refusal {
                // Between epochs there is no epoch to compare; the names were.
                Refusal::UnknownEpoch { .. } => Ok(()),
                refusal => Err(refusal),
            })
            .map_err(refusal_status)?;
        let (messages, stream) = mpsc::channel(HEALTH_IN_FLIGHT);
        tokio::spawn(report_health(self.clone(), messages));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// State at once, then on every change and at least every [`HEALTH_INTERVAL`], until the watcher leaves or
/// the process ends.
async fn report_health(
    service: DecoderService,
    messages: mpsc::Sender<Result<pb::HealthResponse, Status>>,
) {
    let mut standing = service.standing.clone();
    loop {
        let message = {
            let now = standing.borrow_and_update();
            health_message(service.instance, &now, &service.load_now())
        };
        if messages.send(Ok(message)).await.is_err() {
            return;
        }
        tokio::select! {
            changed = standing.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(HEALTH_INTERVAL) => {}
            () = messages.closed() => return,
        }
    }
}
