//! The events of the last revisions, for watches that resume and reads of the past. Bounded by count
//! and bytes: the oldest revisions are compacted away, as etcd does on request.

use std::collections::VecDeque;
use std::sync::Arc;

use etcd_client::EventType;
use etcd_client::proto::{PbEvent, PbKeyValue};

/// One change of one key.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// The key as it stands after a put; after a delete, only key and revision.
    pub kv: Arc<PbKeyValue>,
    /// What stood there before.
    pub prev: Option<Arc<PbKeyValue>>,
    /// Put or delete.
    pub kind: EventType,
}

impl StoredEvent {
    /// Bytes of keys and values, before and after.
    pub fn bytes(&self) -> usize {
        let size = |kv: &PbKeyValue| kv.key.len() + kv.value.len();
        size(&self.kv) + self.prev.as_deref().map_or(0, size)
    }

    /// The event as it goes over the wire.
    pub fn to_wire(&self, with_prev: bool) -> PbEvent {
        PbEvent {
            r#type: self.kind as i32,
            kv: Some((*self.kv).clone()),
            prev_kv: self.prev.as_deref().filter(|_| with_prev).cloned(),
        }
    }
}

/// All changes of one revision.
#[derive(Debug)]
pub struct RevisionEvents {
    /// The revision.
    pub revision: i64,
    /// Its changes, in the order they were made; at most one per key.
    pub events: Vec<StoredEvent>,
    bytes: usize,
}

/// The kept revisions.
#[derive(Debug)]
pub struct History {
    revisions: VecDeque<RevisionEvents>,
    num_events: usize,
    bytes: usize,
    max_events: usize,
    max_bytes: usize,
    /// Oldest revision that can still be read and watched from.
    compact_revision: i64,
}

impl History {
    /// An empty history with these bounds.
    pub fn new(max_events: usize, max_bytes: usize) -> Self {
        Self {
            revisions: VecDeque::new(),
            num_events: 0,
            bytes: 0,
            max_events,
            max_bytes,
            compact_revision: 0,
        }
    }

    /// Oldest revision that can still be read and watched from; 0 if nothing was dropped.
    pub fn compact_revision(&self) -> i64 {
        self.compact_revision
    }

    /// Adds the newest revision and drops the oldest while the bounds are exceeded. The newest is
    /// always kept.
    pub fn push(&mut self, revision: i64, events: Vec<StoredEvent>) {
        let bytes = events.iter().map(StoredEvent::bytes).sum();
        self.num_events += events.len();
        self.bytes += bytes;
        self.revisions.push_back(RevisionEvents { revision, events, bytes });
        while self.revisions.len() > 1
            && (self.num_events > self.max_events || self.bytes > self.max_bytes)
        {
            self.drop_oldest();
        }
    }

    /// Drops all revisions before `revision`.
    pub fn compact(&mut self, revision: i64) {
        while self.revisions.front().is_some_and(|oldest| oldest.revision < revision) {
            self.drop_oldest();
        }
        self.compact_revision = self.compact_revision.max(revision);
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.revisions.pop_front() {
            self.num_events -= oldest.events.len();
            self.bytes -= oldest.bytes;
            self.compact_revision = self.compact_revision.max(oldest.revision + 1);
        }
    }

    /// Revisions from `start` on, oldest first.
    pub fn since(&self, start: i64) -> impl DoubleEndedIterator<Item = &RevisionEvents> {
        let first = self.revisions.partition_point(|entry| entry.revision < start);
        self.revisions.range(first..)
    }
}
