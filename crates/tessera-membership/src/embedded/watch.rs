//! Watches of one connection's stream.
//!
//! Invariants
//! - Nothing is queued per watch: each remembers the next revision it needs and reads it from the
//!   store's history when the client has room. One that falls behind the history is cancelled with
//!   the compacted revision, as etcd does.
//! - All events of a revision are in one response, revisions ascend, and a progress answer is sent
//!   only after all events up to its revision.

use std::collections::BTreeMap;
use std::sync::Arc;

use etcd_client::proto::{PbEvent, PbWatchRequest, PbWatchRequestUnion, PbWatchResponse};
use etcd_client::{EventType, WatchFilterType};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Status, Streaming};

use super::mvcc::MvccStore;
use super::range::KeyRange;
use super::refusal::Refusal;
use super::shared::SharedStore;

/// A response is closed at the first revision that takes it past this many bytes.
const RESPONSE_BYTES: usize = 1 << 20;
/// Watch id of answers that concern the stream as a whole, as in etcd.
const WHOLE_STREAM: i64 = -1;

struct Watcher {
    range: KeyRange,
    next_revision: i64,
    with_prev: bool,
    skip_puts: bool,
    skip_deletes: bool,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    fn wants(&self, kind: EventType) -> bool {
        match kind {
            EventType::Put => !self.skip_puts,
            EventType::Delete => !self.skip_deletes,
        }
    }
}

/// The stream is over; the client has left or has been told why.
struct StreamEnd;

pub(super) struct WatchSession {
    store: SharedStore,
    permits: Arc<Semaphore>,
    answers: mpsc::Sender<Result<PbWatchResponse, Status>>,
    watchers: BTreeMap<i64, Watcher>,
    last_id: i64,
}

impl WatchSession {
    pub(super) fn new(
        store: SharedStore,
        permits: Arc<Semaphore>,
        answers: mpsc::Sender<Result<PbWatchResponse, Status>>,
    ) -> Self {
        Self { store, permits, answers, watchers: BTreeMap::new(), last_id: -1 }
    }

    /// Serves the stream to its end.
    pub(super) async fn run(mut self, mut requests: Streaming<PbWatchRequest>) {
        let mut revisions = self.store.revisions();
        loop {
            let result = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.on_request(request).await,
                    Ok(None) | Err(_) => return,
                },
                changed = revisions.changed() => match changed {
                    Ok(()) => self.send_events().await,
                    Err(_) => return,
                },
            };
            if result.is_err() {
                return;
            }
        }
    }

    async fn on_request(&mut self, request: PbWatchRequest) -> Result<(), StreamEnd> {
        match request.request_union {
            Some(PbWatchRequestUnion::CreateRequest(create)) => {
                let range = KeyRange::new(&create.key, &create.range_end);
                let skips = |filter: WatchFilterType| create.filters.contains(&(filter as i32));
                let Ok(permit) = self.permits.clone().try_acquire_owned() else {
                    return self.fail(Refusal::TooMany("watchers")).await;
                };
                let id = match create.watch_id {
                    0 => self.fresh_id(),
                    id if self.watchers.contains_key(&id) => {
                        return self.refuse_duplicate_id().await;
                    }
                    id => id,
                };
                let header = self.store.with(|store, _| store.header());
                let watcher = Watcher {
                    range,
                    next_revision: match create.start_revision {
                        start if start > 0 => start,
                        _ => header.revision + 1,
                    },
                    with_prev: create.prev_kv,
                    skip_puts: skips(WatchFilterType::NoPut),
                    skip_deletes: skips(WatchFilterType::NoDelete),
                    _permit: permit,
                };
                self.watchers.insert(id, watcher);
                self.send(PbWatchResponse {
                    header: Some(header),
                    watch_id: id,
                    created: true,
                    ..PbWatchResponse::default()
                })
                .await?;
                self.send_events().await
            }
            Some(PbWatchRequestUnion::CancelRequest(cancel)) => {
                if self.watchers.remove(&cancel.watch_id).is_none() {
                    return Ok(());
                }
                self.send(PbWatchResponse {
                    header: Some(self.store.with(|store, _| store.header())),
                    watch_id: cancel.watch_id,
                    canceled: true,
                    ..PbWatchResponse::default()
                })
                .await
            }
            Some(PbWatchRequestUnion::ProgressRequest(_)) => {
                let revision = self.send_events_up_to_now().await?;
                let mut header = self.store.with(|store, _| store.header());
                header.revision = revision;
                self.send(PbWatchResponse {
                    header: Some(header),
                    watch_id: WHOLE_STREAM,
                    ..PbWatchResponse::default()
                })
                .await
            }
            None => self.fail(Refusal::Malformed("an empty watch request")).await,
        }
    }

    fn fresh_id(&mut self) -> i64 {
        loop {
            self.last_id += 1;
            if !self.watchers.contains_key(&self.last_id) {
                return self.last_id;
            }
        }
    }

    async fn refuse_duplicate_id(&mut self) -> Result<(), StreamEnd> {
        self.send(PbWatchResponse {
            header: Some(self.store.with(|store, _| store.header())),
            watch_id: WHOLE_STREAM,
            created: true,
            canceled: true,
            cancel_reason: "mvcc: duplicate watch ID provided on the WatchStream".to_owned(),
            ..PbWatchResponse::default()
        })
        .await
    }

    /// Sends all watches what they lack.
    async fn send_events(&mut self) -> Result<(), StreamEnd> {
        self.send_events_up_to_now().await.map(drop)
    }

    /// [`Self::send_events`]; returns the revision up to which everything is sent.
    async fn send_events_up_to_now(&mut self) -> Result<i64, StreamEnd> {
        let now = self.store.with(|store, _| store.revision());
        let ids: Vec<i64> = self.watchers.keys().copied().collect();
        for id in ids {
            while let Some(watcher) = self.watchers.get_mut(&id) {
                if watcher.next_revision > now {
                    break;
                }
                let response = self.store.with(|store, _| collect(store, id, watcher, now));
                if response.canceled {
                    self.watchers.remove(&id);
                }
                if response.canceled || !response.events.is_empty() {
                    self.send(response).await?;
                }
            }
        }
        Ok(now)
    }

    async fn send(&mut self, response: PbWatchResponse) -> Result<(), StreamEnd> {
        self.answers.send(Ok(response)).await.map_err(|_| StreamEnd)
    }

    /// Ends the stream with an error.
    async fn fail(&mut self, refusal: Refusal) -> Result<(), StreamEnd> {
        // Whether the client still hears it or not, the stream is over.
        let _ = self.answers.send(Err(refusal.into())).await;
        Err(StreamEnd)
    }
}

/// The next response of a watch: its events up to revision `now`, or to where the response is full.
fn collect(store: &MvccStore, id: i64, watcher: &mut Watcher, now: i64) -> PbWatchResponse {
    let mut header = store.header();
    let compact_revision = store.history().compact_revision();
    if watcher.next_revision < compact_revision {
        return PbWatchResponse {
            header: Some(header),
            watch_id: id,
            canceled: true,
            compact_revision,
            cancel_reason: Refusal::Compacted.to_string(),
            ..PbWatchResponse::default()
        };
    }
    let mut events: Vec<PbEvent> = Vec::new();
    let mut bytes = 0;
    let mut sent_up_to = now;
    for entry in store.history().since(watcher.next_revision) {
        if entry.revision > now {
            break;
        }
        if bytes > RESPONSE_BYTES {
            sent_up_to = entry.revision - 1;
            break;
        }
        for event in &entry.events {
            if watcher.range.contains(&event.kv.key) && watcher.wants(event.kind) {
                bytes += event.bytes();
                events.push(event.to_wire(watcher.with_prev));
            }
        }
    }
    watcher.next_revision = sent_up_to + 1;
    header.revision = sent_up_to;
    PbWatchResponse { header: Some(header), watch_id: id, events, ..PbWatchResponse::default() }
}
