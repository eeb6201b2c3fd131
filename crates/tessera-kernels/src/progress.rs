//! How far a rank has come, readable from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Layers that a device counts by itself, in memory that it shares with the host.
pub trait LayerCount: std::fmt::Debug + Send + Sync {
    /// Only ever grows.
    fn count(&self) -> u64;
}

/// Counter of layers computed by one rank since its backend was made. Clones share the count, so that
/// a thread that does no compute can report it while the rank thread is inside a step (CLUSTER §2).
#[derive(Debug, Clone, Default)]
pub struct Progress {
    host: Arc<AtomicU64>,
    /// What the device counted.
    device: Option<Arc<dyn LayerCount>>,
}

impl Progress {
    /// Layers counted by a device.
    pub fn of_device(counter: Arc<impl LayerCount + 'static>) -> Self {
        Self { device: Some(counter), ..Self::default() }
    }

    /// Layers computed so far. Only ever grows.
    pub fn count(&self) -> u64 {
        // A statistic: nothing else is published through it.
        let on_device = self.device.as_ref().map_or(0, |counter| counter.count());
        self.host.load(Ordering::Relaxed) + on_device
    }

    /// Counts one more layer. Called by the backend when the layer has been computed.
    pub fn bump(&self) {
        self.host.fetch_add(1, Ordering::Relaxed);
    }
}
