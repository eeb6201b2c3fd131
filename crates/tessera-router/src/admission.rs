//! Bounds on what is served at once: requests (running, then waiting in order of arrival) and bytes
//! held. Whatever does not fit is refused at once with a hint.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::LimitsConfig;
use crate::error::RequestError;

/// Unit of [`HeldBytes`], as semaphores count in 32 bits.
const BYTES_PER_PERMIT: u64 = 1024;

/// Gate in front of the pipeline. Clones share the counts.
#[derive(Debug, Clone)]
pub struct Admission {
    running: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    max_running: usize,
    max_waiting: usize,
    max_wait: Duration,
    retry_after: Duration,
    held: Arc<Semaphore>,
    max_held_bytes: u64,
}

/// A place among the running requests; dropping it gives the place to the next in line.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
}

/// Bytes of a body and its media, counted until dropped. Starts empty and grows.
#[derive(Debug)]
pub struct HeldBytes {
    admission: Admission,
    permit: Option<OwnedSemaphorePermit>,
    bytes: u64,
}

impl Admission {
    /// An empty gate with the bounds of `limits`.
    pub fn new(limits: &LimitsConfig) -> Self {
        let held_permits =
            limits.max_held_bytes.div_ceil(BYTES_PER_PERMIT).min(Semaphore::MAX_PERMITS as u64);
        Self {
            running: Arc::new(Semaphore::new(limits.max_running_requests)),
            waiting: Arc::new(AtomicUsize::new(0)),
            max_running: limits.max_running_requests,
            max_waiting: limits.max_waiting_requests,
            max_wait: Duration::from_millis(limits.max_wait_ms),
            retry_after: Duration::from_millis(limits.retry_after_ms),
            held: Arc::new(Semaphore::new(held_permits as usize)),
            max_held_bytes: limits.max_held_bytes,
        }
    }

    /// Takes a place, waiting in line if all are taken.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] if the line is full or the wait was too long.
    pub async fn place(&self) -> Result<Place, RequestError> {
        if let Ok(permit) = Arc::clone(&self.running).try_acquire_owned() {
            return Ok(Place { _permit: permit });
        }
        let _in_line = self.stand_in_line()?;
        let acquire = Arc::clone(&self.running).acquire_owned();
        match tokio::time::timeout(self.max_wait, acquire).await {
            Ok(Ok(permit)) => Ok(Place { _permit: permit }),
            Ok(Err(_)) => Err(RequestError::Internal { detail: "admission was closed".to_owned() }),
            Err(_) => Err(self.overloaded("requests served", self.max_running as u64)),
        }
    }

    /// Refuses early, before a body is read, when a request would not even find room in the line.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`].
    pub fn check_room(&self) -> Result<(), RequestError> {
        let no_place = self.running.available_permits() == 0;
        match no_place && self.num_waiting() >= self.max_waiting {
            true => Err(self.line_full()),
            false => Ok(()),
        }
    }

    /// Starts counting bytes for one request.
    pub fn held_bytes(&self) -> HeldBytes {
        HeldBytes { admission: self.clone(), permit: None, bytes: 0 }
    }

    /// Requests with a place.
    pub fn num_running(&self) -> usize {
        self.max_running - self.running.available_permits().min(self.max_running)
    }

    /// Requests in line.
    pub fn num_waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Bytes held by all requests, rounded up to the counting unit of each.
    pub fn held(&self) -> u64 {
        let all = self.max_held_bytes.div_ceil(BYTES_PER_PERMIT);
        all.saturating_sub(self.held.available_permits() as u64) * BYTES_PER_PERMIT
    }

    /// Hint for clients that are refused.
    pub fn retry_after(&self) -> Duration {
        self.retry_after
    }

    fn stand_in_line(&self) -> Result<InLine, RequestError> {
        let joined = self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
            (waiting < self.max_waiting).then_some(waiting + 1)
        });
        match joined {
            Ok(_) => Ok(InLine(Arc::clone(&self.waiting))),
            Err(_) => Err(self.line_full()),
        }
    }

    fn line_full(&self) -> RequestError {
        self.overloaded("requests waiting", self.max_waiting as u64)
    }

    fn overloaded(&self, what: &'static str, limit: u64) -> RequestError {
        RequestError::Overloaded { what, limit, retry_after: self.retry_after }
    }
}

/// Leaves the line when dropped, whether a place was found or the client went away.
struct InLine(Arc<AtomicUsize>);

impl Drop for InLine {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl HeldBytes {
    /// Counts `more` bytes.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] if all requests together would hold too much.
    pub fn grow(&mut self, more: usize) -> Result<(), RequestError> {
        let total = self.bytes + more as u64;
        let permits = total.div_ceil(BYTES_PER_PERMIT) - self.bytes.div_ceil(BYTES_PER_PERMIT);
        let overloaded =
            || self.admission.overloaded("bytes held by requests", self.admission.max_held_bytes);
        if permits > 0 {
            let permits = u32::try_from(permits).map_err(|_| overloaded())?;
            let more = Arc::clone(&self.admission.held)
                .try_acquire_many_owned(permits)
                .map_err(|_| overloaded())?;
            match &mut self.permit {
                Some(permit) => permit.merge(more),
                None => self.permit = Some(more),
            }
        }
        self.bytes = total;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(running: usize, waiting: usize) -> Admission {
        Admission::new(&LimitsConfig {
            max_running_requests: running,
            max_waiting_requests: waiting,
            max_wait_ms: 60_000,
            max_held_bytes: 10 * 1024,
            ..LimitsConfig::default()
        })
    }

    #[tokio::test]
    async fn a_full_line_refuses_at_once_and_a_freed_place_goes_to_the_next() {
        let gate = admission(1, 1);
        let first = gate.place().await.expect("a place");
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.place().await.map(|_| ()) }
        });
        while gate.num_waiting() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(gate.check_room().is_err());
        let refused = gate.place().await.expect_err("the line is full");
        assert!(refused.retry_after().is_some());
        drop(first);
        waiting.await.expect("joins").expect("got the place");
        assert_eq!((gate.num_running(), gate.num_waiting()), (0, 0));
    }

    #[tokio::test]
    async fn waiting_ends_after_its_time() {
        let gate = Admission::new(&LimitsConfig {
            max_running_requests: 1,
            max_wait_ms: 1,
            ..LimitsConfig::default()
        });
        let _first = gate.place().await.expect("a place");
        let error = gate.place().await.expect_err("waited too long");
        assert!(matches!(error, RequestError::Overloaded { limit: 1, .. }));
        assert_eq!(gate.num_waiting(), 0);
    }

    #[tokio::test]
    async fn a_client_that_leaves_the_line_frees_its_room() {
        let gate = admission(1, 1);
        let _first = gate.place().await.expect("a place");
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.place().await.map(|_| ()) }
        });
        while gate.num_waiting() == 0 {
            tokio::task::yield_now().await;
        }
        waiting.abort();
        waiting.await.expect_err("was aborted");
        assert_eq!(gate.num_waiting(), 0);
    }

    #[test]
    fn held_bytes_are_bounded_and_given_back() {
        let gate = admission(1, 1);
        let mut one = gate.held_bytes();
        for _ in 0..9 * 1024 {
            one.grow(1).expect("fits");
        }
        let mut other = gate.held_bytes();
        other.grow(1024).expect("fits exactly");
        assert!(matches!(other.grow(1), Err(RequestError::Overloaded { .. })));
        assert_eq!(gate.held(), 10 * 1024);
        drop(one);
        other.grow(9 * 1024).expect("there is room again");
    }
}
