//! The endpoints of one store: which is asked, for how long, and what its answer means.
//!
//! Invariants
//! - No call hangs: each is bounded in time, over all endpoints tried.
//! - A read is tried on the next endpoint when one does not answer. A write is, only when it provably
//!   never left; otherwise its outcome is unknown and the caller decides.
//! - After a time-out the connection is thrown away, so that a half-open one (a frozen peer, a lost
//!   network path) costs one time-out and not one per call.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::config::StoreConfig;
use crate::error::StoreError;

/// When a call may be made again on another endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// It changes nothing, or may be repeated without harm.
    Always,
    /// Only if it never left this process.
    IfUnsent,
}

/// All endpoints. etcd-client could balance over them itself, but would not say which one answered
/// and cannot leave one that is silent.
pub(crate) struct Endpoints {
    config: StoreConfig,
    urls: Vec<String>,
    clients: Vec<Mutex<Client>>,
    current: AtomicUsize,
}

impl Endpoints {
    pub async fn new(config: StoreConfig) -> Result<Self, StoreError> {
        let urls: Vec<String> = config.endpoints.iter().map(|e| e.http_url()).collect();
        let mut clients = Vec::with_capacity(urls.len());
        for url in &urls {
            clients.push(Mutex::new(new_client(url, &config).await?));
        }
        Ok(Self { config, urls, clients, current: AtomicUsize::new(0) })
    }

    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// The client of the endpoint that is in use, for streams.
    pub fn current_client(&self) -> (usize, Client) {
        let index = self.current.load(Ordering::Relaxed);
        (index, self.client(index))
    }

    /// Turns to the next endpoint and drops the connection of this one, which is silent.
    pub async fn leave(&self, index: usize) {
        self.turn_from(index);
        if let Ok(fresh) = new_client(&self.urls[index], &self.config).await {
            *lock(&self.clients[index]) = fresh;
        }
    }

    /// Turns to the next endpoint, unless somebody else already did. The connection is kept: it is
    /// known to be closed or fine.
    fn turn_from(&self, index: usize) {
        let next = (index + 1) % self.clients.len();
        // A failed exchange means that another call has turned away already.
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn client(&self, index: usize) -> Client {
        lock(&self.clients[index]).clone()
    }

    /// Tries the endpoints in turn, beginning with the one in use. Each gets an equal share of the
    /// time that is left.
    pub async fn call<T, F, Fut>(
        &self,
        limit: Duration,
        name: &'static str,
        retry: Retry,
        send: F,
    ) -> Result<T, StoreError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + limit;
        let num_endpoints = self.clients.len();
        let first = self.current.load(Ordering::Relaxed);
        let mut turn = 0;
        loop {
            let index = (first + turn) % num_endpoints;
            turn += 1;
            let is_last = turn == num_endpoints;
            let turns_left = (num_endpoints - turn + 1) as u32;
            let share = deadline.saturating_duration_since(Instant::now()) / turns_left;
            let (error, was_unsent) = match timeout(share, send(self.client(index))).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => {
                    let was_unsent = is_unsent(&error);
                    let error = classify(name, error);
                    if !error.is_unknown() {
                        return Err(error);
                    }
                    self.turn_from(index);
                    (error, was_unsent)
                }
                Err(_) => {
                    self.leave(index).await;
                    (StoreError::TimedOut { call: name, after: limit }, false)
                }
            };
            if is_last || !(retry == Retry::Always || was_unsent) {
                return Err(error);
            }
        }
    }
}

async fn new_client(url: &str, config: &StoreConfig) -> Result<Client, StoreError> {
    let options = ConnectOptions::new()
        .with_connect_timeout(config.connect_timeout)
        .with_keep_alive(config.keepalive_interval, config.keepalive_timeout)
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    Client::connect([url], Some(options)).await.map_err(|source| StoreError::InvalidEndpoint {
        endpoint: url.to_owned(),
        source: source.into(),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A client is replaced whole, so that a poisoned lock still guards a good one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection could not be made, so that the call never left.
fn is_unsent(error: &etcd_client::Error) -> bool {
    let etcd_client::Error::GRpcStatus(status) = error else {
        return false;
    };
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// In etcd's message, and in what etcd-client says (without a code) of a keepalive whose lease the
/// server does not know.
const LEASE_NOT_FOUND: &str = "lease not found";

pub(crate) fn classify(call: &'static str, error: etcd_client::Error) -> StoreError {
    let status = match error {
        etcd_client::Error::GRpcStatus(status) => status,
        etcd_client::Error::LeaseKeepAliveError(text) if text == LEASE_NOT_FOUND => {
            return StoreError::LeaseNotFound { lease_id: 0 };
        }
        other => {
            return StoreError::Unavailable { call, source: other.into() };
        }
    };
    match status.code() {
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::Aborted
        | Code::Unknown
        | Code::Internal
        | Code::DataLoss => StoreError::Unavailable { call, source: status.into() },
        Code::NotFound if status.message().contains(LEASE_NOT_FOUND) => {
            StoreError::LeaseNotFound { lease_id: 0 }
        }
        Code::OutOfRange if status.message().contains("compacted") => {
            StoreError::Compacted { call }
        }
        code => StoreError::Refused {
            call,
            code: format!("{code:?}"),
            message: status.message().to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_silence() {
        let classify = |code, message: &str| {
            let status = tonic::Status::new(code, message);
            super::classify("put", etcd_client::Error::GRpcStatus(status))
        };
        assert!(classify(Code::Unavailable, "etcdserver: no leader").is_unknown());
        assert!(classify(Code::DeadlineExceeded, "").is_unknown());
        assert!(matches!(
            classify(Code::NotFound, "etcdserver: requested lease not found"),
            StoreError::LeaseNotFound { .. }
        ));
        let compacted = "etcdserver: mvcc: required revision has been compacted";
        assert!(matches!(classify(Code::OutOfRange, compacted), StoreError::Compacted { .. }));
        let full = "etcdserver: mvcc: database space exceeded";
        let StoreError::Refused { code, message, .. } = classify(Code::ResourceExhausted, full)
        else {
            panic!("a full store refuses");
        };
        assert_eq!((code.as_str(), message.as_str()), ("ResourceExhausted", full));
    }
}
