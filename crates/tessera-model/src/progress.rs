//! How far loading is, readable from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of weights, in the types they are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadProgress {
    pub loaded_bytes: u64,
    /// Of all slices that were announced so far; 0 until the first part was checked.
    pub total_bytes: u64,
}

/// Counts what is loaded. Clones share the counts, so that one meter may serve several ranks and be read
/// while they load.
#[derive(Debug, Clone, Default)]
pub struct LoadMeter(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    loaded_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl LoadMeter {
    /// The counts; `loaded_bytes` never exceeds `total_bytes` once a part was announced.
    pub fn progress(&self) -> LoadProgress {
        // Statistics: nothing else is published through them.
        LoadProgress {
            loaded_bytes: self.0.loaded_bytes.load(Ordering::Relaxed),
            total_bytes: self.0.total_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn announce(&self, bytes: u64) {
        self.0.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.0.loaded_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
