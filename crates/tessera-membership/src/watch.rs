//! A watch that does not end: it notices a dead connection, comes back where it stopped, and lists
//! anew when the store has forgotten that point.
//!
//! Invariants
//! - Changes arrive in the order of their revisions, each revision whole (all changes of one
//!   transaction are one [`WatchEvent::Changes`]) and at most once.
//! - After any gap the consumer's view is brought up to date: by replaying what happened, or by a
//!   [`WatchEvent::Resync`] that holds every difference, deletes included.
//! - The revision to resume at is taken from events and listings only. Progress answers prove that
//!   the store is there, but etcd before 3.4.25 and 3.5.8 may send them ahead of events (etcd#15220).

use std::collections::HashMap;
use std::time::Duration;

use etcd_client::proto::{PbEvent, PbWatchResponse};
use etcd_client::{WatchOptions, WatchRequestSender, WatchResponseStream};
use tessera_cluster::lease_keeper::Backoff;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::config::WatchConfig;
use crate::endpoints::classify;
use crate::error::StoreError;
use crate::kv::{KeyValue, PrefixSnapshot};
use crate::store::{Position, Store, position_of};

/// One difference between two states of a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key was written.
    Put(KeyValue),
    /// The key is gone.
    Delete {
        /// The key.
        key: String,
    },
}

impl Change {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key } => key,
        }
    }
}

/// What a watch tells its consumer.
#[derive(Debug)]
pub enum WatchEvent {
    /// The whole prefix. Comes once, before any other event with data.
    Snapshot {
        /// Revision of the store at which this was true.
        revision: i64,
        /// The keys, ascending.
        entries: Vec<KeyValue>,
    },
    /// What one revision changed.
    Changes {
        /// The revision.
        revision: i64,
        /// All its changes under the prefix, in the store's order.
        changes: Vec<Change>,
    },
    /// History was lost; these are all differences to what was told before (maybe none).
    Resync {
        /// Revision of the store at which the new state was true.
        revision: i64,
        /// The differences: deletes first, then writes, ascending.
        changes: Vec<Change>,
    },
    /// The watch stands; from here on the view lags by no more than the progress interval and
    /// time-out.
    Connected {
        /// Revision up to which everything has been told.
        revision: i64,
    },
    /// The store is not heard. The view stays as it is and grows old, until `Connected`.
    Disconnected {
        /// Time since the store was last heard on this watch.
        silent_for: Duration,
        /// Why it is not heard.
        error: StoreError,
    },
}

/// The receiving end of a watch. Dropping it ends the watch.
#[derive(Debug)]
pub struct PrefixWatch {
    events: mpsc::Receiver<WatchEvent>,
    supervisor: JoinHandle<()>,
}

impl PrefixWatch {
    /// The next event. `None` only if the runtime is shutting down. Safe to cancel.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        self.events.recv().await
    }
}

impl Drop for PrefixWatch {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

pub(crate) fn watch_prefix(store: Store, prefix: String) -> PrefixWatch {
    let config = store.config().watch.clone();
    let (sender, events) = mpsc::channel(config.queue_events);
    let backoff = Backoff::new(config.retry_min, config.retry_max, crate::random_seed());
    let supervisor = Supervisor {
        store,
        prefix,
        backoff,
        config,
        sender,
        known: HashMap::new(),
        cursor: None,
        must_list: true,
        partial: None,
        is_connected: false,
        has_complained: false,
        last_heard: Instant::now(),
    };
    PrefixWatch { events, supervisor: tokio::spawn(supervisor.run()) }
}

/// Why a session with the store ended.
enum SessionEnd {
    /// The consumer is gone.
    Unwanted,
    /// Silence or an error; what was told still holds.
    Broken(StoreError),
    /// The store has forgotten the point to resume at, or ended the watch by itself.
    Forgotten { error: Option<StoreError> },
}

impl From<StoreError> for SessionEnd {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Compacted { .. } => Self::Forgotten { error: None },
            // Asking for the same again would be refused again.
            StoreError::Refused { .. } => Self::Forgotten { error: Some(error) },
            error => Self::Broken(error),
        }
    }
}

struct Supervisor {
    store: Store,
    prefix: String,
    config: WatchConfig,
    backoff: Backoff,
    sender: mpsc::Sender<WatchEvent>,
    /// Revision of each key as told to the consumer.
    known: HashMap<String, i64>,
    /// Store and revision up to which everything was told; `None` before the snapshot.
    cursor: Option<Position>,
    must_list: bool,
    /// The revision that is being received: the store splits large answers, also inside a revision.
    partial: Option<(i64, Vec<Change>)>,
    is_connected: bool,
    /// The consumer has been told of this disconnection.
    has_complained: bool,
    last_heard: Instant,
}

impl Supervisor {
    async fn run(mut self) {
        loop {
            let error = match self.session().await {
                SessionEnd::Unwanted => return,
                SessionEnd::Broken(error) => Some(error),
                SessionEnd::Forgotten { error } => {
                    self.must_list = true;
                    error
                }
            };
            if let Some(error) = error
                && self.tell_disconnected(error).await.is_err()
            {
                return;
            }
            let pause = self.backoff.next_pause();
            let closed = self.sender.closed();
            if timeout(pause, closed).await.is_ok() {
                return;
            }
        }
    }

    async fn tell_disconnected(&mut self, error: StoreError) -> Result<(), SessionEnd> {
        self.is_connected = false;
        if std::mem::replace(&mut self.has_complained, true) {
            return Ok(());
        }
        tracing::warn!(prefix = %self.prefix, %error, "watch disconnected");
        let silent_for = self.last_heard.elapsed();
        self.tell(WatchEvent::Disconnected { silent_for, error }).await
    }

    /// Waits while the channel is full; the store's flow control then waits with us.
    async fn tell(&mut self, event: WatchEvent) -> Result<(), SessionEnd> {
        let sent = self.sender.send(event).await;
        sent.map_err(|_| SessionEnd::Unwanted)
    }

    /// Lists if need be, opens the watch, and follows it to its end.
    async fn session(&mut self) -> SessionEnd {
        match self.try_session().await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn try_session(&mut self) -> Result<std::convert::Infallible, SessionEnd> {
        if !self.must_list {
            self.check_identity().await?;
        }
        if self.must_list {
            self.list().await?;
        }
        let cursor = self.cursor.expect("a listing sets the cursor");
        let (index, client) = self.store.endpoints().current_client();
        self.partial = None;
        // Fragments keep answers below the 4 MiB that a message may have.
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(cursor.revision + 1)
            .with_fragment();
        let prefix = self.prefix.clone();
        let limit = self.store.config().call_timeout;
        let opened = timeout(limit, client.watch_client().watch(prefix, Some(options))).await;
        let result = match opened {
            Ok(Ok(stream)) => {
                let (requests, responses) = stream.split();
                self.follow(requests, responses).await
            }
            Ok(Err(error)) => Err(classify("watch", error).into()),
            Err(_) => Err(silence("watch", limit)),
        };
        if let Err(SessionEnd::Broken(_)) = &result {
            self.store.endpoints().leave(index).await;
        }
        // The client owns the connection; it lives as long as the stream.
        drop(client);
        result
    }

    /// A store that came back as another one, or from an older backup, would leave us waiting for a
    /// revision it will reach with other contents.
    async fn check_identity(&mut self) -> Result<(), SessionEnd> {
        let Some(cursor) = self.cursor else {
            return Ok(());
        };
        let now = self.store.position().await?;
        self.must_list |= is_other_history(cursor, now);
        Ok(())
    }

    async fn list(&mut self) -> Result<(), SessionEnd> {
        let (position, snapshot) = self.store.list(&self.prefix).await?;
        self.last_heard = Instant::now();
        let previous = self.cursor.replace(position);
        self.must_list = false;
        let Some(previous) = previous else {
            self.remember(&snapshot);
            let PrefixSnapshot { revision, entries } = snapshot;
            return self.tell(WatchEvent::Snapshot { revision, entries }).await;
        };
        // Revisions of another history say nothing about ours: everything counts as changed.
        if is_other_history(previous, position) {
            tracing::warn!(prefix = %self.prefix, "the store has another history; taking all of it");
            self.known.values_mut().for_each(|revision| *revision = -1);
        }
        let changes = difference(&self.known, &snapshot);
        self.remember(&snapshot);
        let revision = snapshot.revision;
        self.tell(WatchEvent::Resync { revision, changes }).await
    }

    fn remember(&mut self, snapshot: &PrefixSnapshot) {
        let entries = snapshot.entries.iter();
        self.known = entries.map(|entry| (entry.key.clone(), entry.mod_revision)).collect();
    }

    /// Follows an open watch. Only ends by an error.
    async fn follow(
        &mut self,
        mut requests: WatchRequestSender,
        mut responses: WatchResponseStream,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        loop {
            let interval = self.config.progress_interval;
            let response = tokio::select! {
                () = self.sender.closed() => return Err(SessionEnd::Unwanted),
                response = timeout(interval, responses.message()) => response,
            };
            let response = match response {
                Ok(response) => response,
                Err(_) => {
                    let limit = self.config.progress_timeout;
                    let answer = async {
                        requests.request_progress().await?;
                        responses.message().await
                    };
                    timeout(limit, answer).await.map_err(|_| silence("watch progress", limit))?
                }
            };
            match response {
                Ok(Some(response)) => self.on_response(response.0).await?,
                Ok(None) => {
                    return Err(SessionEnd::Broken(StoreError::Unavailable {
                        call: "watch",
                        source: "the stream ended".into(),
                    }));
                }
                Err(error) => return Err(classify("watch", error).into()),
            }
        }
    }

    async fn on_response(&mut self, response: PbWatchResponse) -> Result<(), SessionEnd> {
        self.last_heard = Instant::now();
        if response.canceled {
            let is_compacted = response.compact_revision > 0;
            let error = (!is_compacted).then(|| StoreError::Refused {
                call: "watch",
                code: "canceled".to_owned(),
                message: response.cancel_reason,
            });
            return Err(SessionEnd::Forgotten { error });
        }
        if response.created {
            position_of("watch", response.header).map_err(SessionEnd::Broken)?;
            self.backoff.reset();
        }
        if !self.is_connected {
            self.is_connected = true;
            self.has_complained = false;
            let revision = self.cursor.map_or(0, |cursor| cursor.revision);
            self.tell(WatchEvent::Connected { revision }).await?;
        }
        self.on_events(response.events).await?;
        match self.partial.take_if(|_| !response.fragment) {
            Some(whole) => self.tell_changes(whole).await,
            None => Ok(()),
        }
    }

    /// Tells the events revision by revision, except for the last one, which may go on.
    async fn on_events(&mut self, events: Vec<PbEvent>) -> Result<(), SessionEnd> {
        for event in events {
            let (revision, change) = to_change(event)?;
            if self.cursor.is_some_and(|cursor| revision <= cursor.revision) {
                continue;
            }
            if let Some(whole) = self.partial.take_if(|(at, _)| *at != revision) {
                self.tell_changes(whole).await?;
            }
            let (_, changes) = self.partial.get_or_insert((revision, Vec::new()));
            changes.extend(change);
        }
        Ok(())
    }

    async fn tell_changes(
        &mut self,
        (revision, changes): (i64, Vec<Change>),
    ) -> Result<(), SessionEnd> {
        for change in &changes {
            match change {
                Change::Put(entry) => {
                    self.known.insert(entry.key.clone(), entry.mod_revision);
                }
                Change::Delete { key } => {
                    self.known.remove(key);
                }
            }
        }
        if let Some(cursor) = &mut self.cursor {
            cursor.revision = revision;
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.tell(WatchEvent::Changes { revision, changes }).await
    }
}

fn silence(call: &'static str, after: Duration) -> SessionEnd {
    SessionEnd::Broken(StoreError::TimedOut { call, after })
}

fn is_other_history(before: Position, now: Position) -> bool {
    before.cluster_id != now.cluster_id || now.revision < before.revision
}

/// Revision and change of one event; no change if its key is not one of ours.
fn to_change(event: PbEvent) -> Result<(i64, Option<Change>), SessionEnd> {
    let against = |detail: String| {
        let call = "watch";
        let error = Some(StoreError::Protocol { call, detail });
        SessionEnd::Forgotten { error }
    };
    let kv = event.kv.ok_or_else(|| against("an event without a key".to_owned()))?;
    let revision = kv.mod_revision;
    let entry = KeyValue::from_wire(kv);
    match event.r#type {
        0 => Ok((revision, entry.map(Change::Put))),
        1 => Ok((revision, entry.map(|entry| Change::Delete { key: entry.key }))),
        unknown => Err(against(format!("an event of type {unknown}"))),
    }
}

/// What turns the known state into the listed one.
fn difference(known: &HashMap<String, i64>, listed: &PrefixSnapshot) -> Vec<Change> {
    let listed_keys: std::collections::HashSet<&str> =
        listed.entries.iter().map(|e| e.key.as_str()).collect();
    let mut gone: Vec<&String> =
        known.keys().filter(|key| !listed_keys.contains(key.as_str())).collect();
    gone.sort();
    let deletes = gone.into_iter().cloned().map(|key| Change::Delete { key });
    let puts = listed
        .entries
        .iter()
        .filter(|entry| known.get(&entry.key) != Some(&entry.mod_revision))
        .cloned()
        .map(Change::Put);
    deletes.chain(puts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, mod_revision: i64) -> KeyValue {
        KeyValue {
            key: key.to_owned(),
            value: Vec::new(),
            mod_revision,
            create_revision: 1,
            lease: 0,
        }
    }

    #[test]
    fn a_difference_holds_deletes_and_only_what_changed() {
        let known = HashMap::from([
            ("gone".to_owned(), 2),
            ("same".to_owned(), 3),
            ("new value".to_owned(), 4),
        ]);
        let listed = PrefixSnapshot {
            revision: 9,
            entries: vec![entry("born", 8), entry("new value", 9), entry("same", 3)],
        };
        let changes = difference(&known, &listed);
        assert_eq!(
            changes,
            [
                Change::Delete { key: "gone".to_owned() },
                Change::Put(entry("born", 8)),
                Change::Put(entry("new value", 9)),
            ]
        );
    }

    #[test]
    fn another_store_and_an_older_backup_are_another_history() {
        let at = |cluster_id, revision| Position { cluster_id, revision };
        assert!(!is_other_history(at(1, 5), at(1, 5)));
        assert!(!is_other_history(at(1, 5), at(1, 6)));
        assert!(is_other_history(at(1, 5), at(2, 6)));
        assert!(is_other_history(at(1, 5), at(1, 4)));
    }
}
