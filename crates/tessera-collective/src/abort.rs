//! The abort of one epoch: a flag that is set once with a reason, and whoever sleeps is woken.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tessera_types::Epoch;

use crate::error::CollectiveError;

/// Something that may sleep in a collective. `wake` is called once, after the flag is set; it must
/// return quickly and free nothing.
pub(crate) trait AbortTarget: Send + Sync {
    fn wake(&self);
}

struct Shared {
    epoch: Epoch,
    /// Set exactly once. Being set *is* the flag, so flag and reason can't disagree.
    reason: OnceLock<String>,
    /// One per transport built on this handle. They hold no handle themselves, so there is no cycle.
    targets: Mutex<Vec<Arc<dyn AbortTarget>>>,
}

/// Ends an epoch from any thread. One handle stands for one epoch and may serve several local ranks.
#[derive(Clone)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

impl AbortHandle {
    /// A handle for `epoch` that is not aborted.
    pub fn new(epoch: Epoch) -> Self {
        let (reason, targets) = (OnceLock::new(), Mutex::new(Vec::new()));
        Self { shared: Arc::new(Shared { epoch, reason, targets }) }
    }

    pub fn epoch(&self) -> Epoch {
        self.shared.epoch
    }

    /// Ends every pending and later call of this epoch's communicators with
    /// [`CollectiveError::Aborted`]. Only the first reason counts. Waits for no peer and frees nothing:
    /// sockets and memory stay with the communicator's owner.
    pub fn abort(&self, reason: impl Into<String>) {
        if self.shared.reason.set(reason.into()).is_err() {
            return;
        }
        for target in self.targets().clone() {
            target.wake();
        }
    }

    pub fn is_aborted(&self) -> bool {
        self.shared.reason.get().is_some()
    }

    /// The read-only side, for those who must look but not decide.
    pub fn flag(&self) -> AbortFlag {
        AbortFlag { handle: self.clone() }
    }

    /// `Err(Aborted)` once the flag is set.
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        match self.shared.reason.get() {
            None => Ok(()),
            Some(reason) => {
                Err(CollectiveError::Aborted { epoch: self.epoch(), reason: reason.clone() })
            }
        }
    }

    /// Adds a sleeper. Wakes it at once if the abort came first.
    pub(crate) fn attach(&self, target: Arc<dyn AbortTarget>) {
        self.targets().push(Arc::clone(&target));
        // The abort sets the flag before it reads the list, so one of the two sides sees the other.
        if self.is_aborted() {
            target.wake();
        }
    }

    fn targets(&self) -> std::sync::MutexGuard<'_, Vec<Arc<dyn AbortTarget>>> {
        self.shared.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (epoch, reason) = (&self.shared.epoch, self.shared.reason.get());
        f.debug_struct("AbortHandle").field("epoch", epoch).field("reason", &reason).finish()
    }
}

/// The flag of an epoch, to be read before a step is reported: a step that ran while the flag was set
/// holds half-reduced numbers and must be discarded whole (CLUSTER §2).
#[derive(Debug, Clone)]
pub struct AbortFlag {
    handle: AbortHandle,
}

impl AbortFlag {
    pub fn epoch(&self) -> Epoch {
        self.handle.epoch()
    }

    pub fn is_aborted(&self) -> bool {
        self.handle.is_aborted()
    }

    /// Why, once it is set.
    pub fn reason(&self) -> Option<&str> {
        self.handle.shared.reason.get().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl AbortTarget for Count {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_first_reason_stays_and_targets_wake_once() {
        let handle = AbortHandle::new(Epoch(7));
        let early = Arc::new(Count::default());
        handle.attach(early.clone());
        assert!(!handle.is_aborted() && handle.check().is_ok());

        handle.abort("first");
        handle.clone().abort("second");
        let late = Arc::new(Count::default());
        handle.attach(late.clone());

        assert_eq!(handle.flag().reason(), Some("first"));
        let (early, late) = (early.0.load(Ordering::SeqCst), late.0.load(Ordering::SeqCst));
        assert_eq!((early, late), (1, 1), "before and after the abort");
        assert!(matches!(
            handle.check(),
            Err(CollectiveError::Aborted { epoch: Epoch(7), reason }) if reason == "first"
        ));
    }
}
