//! How far a rank has come, readable from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counter of layers computed by one rank since its backend was made. Clones share the count, so that
/// a thread that does no compute can report it while the rank thread is inside a step (CLUSTER §2).
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Layers computed so far. Only ever grows.
    pub fn count(&self) -> u64 {
        // A statistic: nothing else is published through it.
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one more layer. Called by the backend when the layer has been computed.
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
