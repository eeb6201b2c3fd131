//! Clusters that several tests of one binary use, since starting one is the slow part. They live in
//! statics, which are never dropped: the supervisor ends because its standard input closes with this
//! process.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::cluster::{Cluster, UpOptions};

/// A cluster that tests read from at the same time. Prints the cluster's log when the test fails.
#[derive(Debug)]
pub struct Shared(&'static Cluster);

impl Deref for Shared {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.supervisor.print_log();
        }
    }
}

/// `tiny` as `tessera up` starts it by default: two ranks in two processes.
pub fn tp2() -> Shared {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    Shared(CLUSTER.get_or_init(|| Cluster::up(&UpOptions::new("tiny", 2))))
}

/// A cluster that one test at a time uses, to observe its counters or to break it.
#[derive(Debug)]
pub struct Exclusive(MutexGuard<'static, Option<Cluster>>);

/// Takes the cluster in `slot` once no other test has it. A cluster that a test left unable to serve is
/// replaced.
pub fn exclusive(slot: &'static Mutex<Option<Cluster>>, options: &UpOptions) -> Exclusive {
    let mut guard = slot.lock().unwrap_or_else(PoisonError::into_inner);
    if guard.as_ref().is_none_or(|cluster| !cluster.endpoints.is_ready()) {
        // The old one ends before the new one starts: two cores are not enough for both.
        *guard = None;
        *guard = Some(Cluster::up(options));
    }
    Exclusive(guard)
}

impl Deref for Exclusive {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.0.as_ref().expect("filled when taken")
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.supervisor.print_log();
        }
    }
}
