//! A store for clusters of one machine, speaking the part of the etcd v3 wire that Tessera uses: KV
//! (Range, Put, DeleteRange, Txn, Compact), Lease (Grant, Revoke, KeepAlive, TimeToLive, Leases) and
//! Watch (create, cancel, progress). It lives in memory: whoever runs it must outlive its members.
//!
//! Left out, and refused as unimplemented: transactions inside transactions, RangeStream, and the
//! Cluster, Maintenance and Auth services. Periodic progress notifications are not sent; they are
//! answered when asked for.
//!
//! Modules: [`mvcc`] (the state machine) over [`history`], [`lease`], [`range`], `read`, `compare` and
//! [`refusal`]; [`shared`] (the machine with clock and lock); `server` and `watch` (the gRPC face).

mod compare;
pub mod history;
pub mod lease;
pub mod mvcc;
pub mod range;
mod read;
pub mod refusal;
mod server;
pub mod shared;
mod watch;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::time::Duration;

use etcd_client::proto::{PbKvServer, PbLeaseServer, PbWatchServer};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;

use crate::config::EmbeddedConfig;
use crate::error::EmbeddedError;
use crate::url::{MembershipUrl, StoreEndpoint};
use server::StoreService;
use shared::SharedStore;

/// Longest message that is taken: the largest request and what etcd allows around it.
const MAX_MESSAGE_BYTES: usize = (3 << 19) + (512 << 10);
/// Longest wait for connections to close on shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// A running embedded store. Dropping it stops the server without waiting.
#[derive(Debug)]
pub struct EmbeddedStore {
    local_addr: SocketAddr,
    store: SharedStore,
    stop: CancellationToken,
    tasks: TaskTracker,
    server: JoinHandle<()>,
}

impl EmbeddedStore {
    /// Serves an empty store. Port 0 takes a free one; see [`EmbeddedStore::local_addr`].
    pub async fn bind(addr: SocketAddr, config: EmbeddedConfig) -> Result<Self, EmbeddedError> {
        let listener = TcpListener::bind(addr)
            .await
            .map_err(|source| EmbeddedError::Listen { addr, source })?;
        Self::serve(listener, SharedStore::new(config))
    }

    /// Serves an existing store, which may have been served before. All its leases begin anew, as
    /// etcd's do after a restart.
    pub fn serve(listener: TcpListener, store: SharedStore) -> Result<Self, EmbeddedError> {
        let local_addr = listener.local_addr().map_err(EmbeddedError::LocalAddr)?;
        store.resume();
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let service = StoreService::new(store.clone(), stop.clone(), tasks.clone());
        let keep_time = {
            let (store, stop) = (store.clone(), stop.clone());
            async move { stop.run_until_cancelled(store.keep_time()).await }
        };
        tasks.spawn(keep_time);
        let kv = PbKvServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let router = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .add_service(kv)
            .add_service(PbLeaseServer::new(service.clone()))
            .add_service(PbWatchServer::new(service));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let stopped = stop.clone().cancelled_owned();
        let server = tokio::spawn(async move {
            let serving = router.serve_with_incoming_shutdown(incoming, stopped);
            if let Err(error) = serving.await {
                tracing::error!(%error, "the embedded store's server failed");
            }
        });
        Ok(Self { local_addr, store, stop, tasks, server })
    }

    /// Where the store is served.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where members reach the store.
    pub fn url(&self) -> MembershipUrl {
        MembershipUrl::Etcd(vec![StoreEndpoint::from(self.local_addr)])
    }

    /// The store behind the server.
    pub fn store(&self) -> &SharedStore {
        &self.store
    }

    /// Stops the server: all streams end, the port is free. The store itself remains for
    /// [`EmbeddedStore::serve`].
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        self.tasks.close();
        let finished = async {
            self.tasks.wait().await;
            (&mut self.server).await
        };
        match tokio::time::timeout(SHUTDOWN_TIMEOUT, finished).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the embedded store's server panicked"),
            Err(_) => tracing::warn!("embedded store: some connections did not close in time"),
        }
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
