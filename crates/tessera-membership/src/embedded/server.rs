//! The gRPC face of the embedded store: KV and Lease. Decides nothing; see [`super::mvcc`].

use std::pin::Pin;
use std::sync::Arc;

use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbDeleteRequest, PbDeleteResponse, PbKvService,
    PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse,
    PbLeaseLeasesRequest, PbLeaseLeasesResponse, PbLeaseRevokeRequest, PbLeaseRevokeResponse,
    PbLeaseService, PbLeaseStatus, PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse,
    PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse, PbRangeStreamResponse,
    PbTxnRequest, PbTxnResponse, PbWatchRequest, PbWatchResponse, PbWatchService,
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::refusal::Refusal;
use super::shared::SharedStore;
use super::watch::WatchSession;

/// Answers that may wait in one stream for a slow client. Then the stream's task waits; a watch picks
/// up from the history afterwards, so that nothing piles up.
const STREAM_QUEUE: usize = 16;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// All services of one store.
#[derive(Debug, Clone)]
pub(super) struct StoreService {
    store: SharedStore,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// One permit per open watch.
    watchers: Arc<Semaphore>,
}

impl StoreService {
    pub(super) fn new(store: SharedStore, stop: CancellationToken, tasks: TaskTracker) -> Self {
        let max_watchers = store.with(|store, _| store.config().max_watchers);
        Self { store, stop, tasks, watchers: Arc::new(Semaphore::new(max_watchers)) }
    }

    /// Runs a stream's task until it ends, the client leaves or the server stops.
    fn spawn_stream<T, F>(
        &self,
        task: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F,
    ) -> Answers<T>
    where
        T: Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE);
        let left = sender.clone();
        let task = task(sender);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = left.closed() => {}
                () = stop.cancelled() => {}
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }
}

#[tonic::async_trait]
impl PbKvService for StoreService {
    type RangeStreamStream = Answers<PbRangeStreamResponse>;

    async fn range(
        &self,
        request: Request<PbRangeRequest>,
    ) -> Result<Response<PbRangeResponse>, Status> {
        let request = request.into_inner();
        let response = self.store.with(|store, _| store.range(&request))?;
        Ok(Response::new(response))
    }

    async fn range_stream(
        &self,
        _: Request<PbRangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Refusal::Unsupported("RangeStream").into())
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        let request = request.into_inner();
        let response = self.store.with(|store, _| store.put(request))?;
        Ok(Response::new(response))
    }

    async fn delete_range(
        &self,
        request: Request<PbDeleteRequest>,
    ) -> Result<Response<PbDeleteResponse>, Status> {
        let request = request.into_inner();
        let response = self.store.with(|store, _| store.delete_range(request))?;
        Ok(Response::new(response))
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        let request = request.into_inner();
        let response = self.store.with(|store, _| store.txn(request))?;
        Ok(Response::new(response))
    }

    async fn compact(
        &self,
        request: Request<PbCompactionRequest>,
    ) -> Result<Response<PbCompactionResponse>, Status> {
        let request = request.into_inner();
        let header = self.store.with(|store, _| {
            store.compact(&request)?;
            Ok::<_, Refusal>(store.header())
        })?;
        Ok(Response::new(PbCompactionResponse { header: Some(header) }))
    }
}

#[tonic::async_trait]
impl PbLeaseService for StoreService {
    type LeaseKeepAliveStream = Answers<PbLeaseKeepAliveResponse>;

    async fn lease_grant(
        &self,
        request: Request<PbLeaseGrantRequest>,
    ) -> Result<Response<PbLeaseGrantResponse>, Status> {
        let PbLeaseGrantRequest { ttl, id } = request.into_inner();
        let response = self.store.with(|store, now| {
            let (id, ttl) = store.lease_grant(id, ttl, now)?;
            Ok::<_, Refusal>(PbLeaseGrantResponse {
                header: Some(store.header()),
                id,
                ttl,
                error: String::new(),
            })
        })?;
        Ok(Response::new(response))
    }

    async fn lease_revoke(
        &self,
        request: Request<PbLeaseRevokeRequest>,
    ) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        let id = request.into_inner().id;
        let header = self.store.with(|store, _| {
            store.lease_revoke(id)?;
            Ok::<_, Refusal>(store.header())
        })?;
        Ok(Response::new(PbLeaseRevokeResponse { header: Some(header) }))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let mut requests = request.into_inner();
        let store = self.store.clone();
        let answers = self.spawn_stream(|sender| async move {
            while let Ok(Some(PbLeaseKeepAliveRequest { id })) = requests.message().await {
                // A lease that does not exist is answered with a TTL of 0, not with an error.
                let response = store.with(|store, now| PbLeaseKeepAliveResponse {
                    ttl: store.lease_keep_alive(id, now).unwrap_or(0),
                    header: Some(store.header()),
                    id,
                });
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(answers))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        let PbLeaseTimeToLiveRequest { id, keys: want_keys } = request.into_inner();
        let response = self.store.with(|store, now| {
            let (ttl, granted_ttl, keys) = match store.leases().describe(id, now) {
                Some((ttl, granted, keys)) if want_keys => (ttl, granted, keys),
                Some((ttl, granted, _)) => (ttl, granted, Vec::new()),
                None => (-1, 0, Vec::new()),
            };
            PbLeaseTimeToLiveResponse { header: Some(store.header()), id, ttl, granted_ttl, keys }
        });
        Ok(Response::new(response))
    }

    async fn lease_leases(
        &self,
        _: Request<PbLeaseLeasesRequest>,
    ) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        let response = self.store.with(|store, _| PbLeaseLeasesResponse {
            header: Some(store.header()),
            leases: store.leases().ids().map(|id| PbLeaseStatus { id }).collect(),
        });
        Ok(Response::new(response))
    }
}

#[tonic::async_trait]
impl PbWatchService for StoreService {
    type WatchStream = Answers<PbWatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<PbWatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let requests = request.into_inner();
        let (store, permits) = (self.store.clone(), self.watchers.clone());
        let answers = self.spawn_stream(|sender| {
            let session = WatchSession::new(store, permits, sender);
            session.run(requests)
        });
        Ok(Response::new(answers))
    }
}
