//! Waiting on sockets with a deadline, in a way that an abort from another thread ends.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::abort::{AbortHandle, AbortTarget};
use crate::error::{CollectiveError, Result};

/// An event descriptor that becomes readable when the epoch is aborted, and stays so: it is never read.
pub(super) struct Waker {
    event: OwnedFd,
}

impl Waker {
    /// A waker that listens to `abort`.
    pub(super) fn attached(abort: &AbortHandle) -> Result<Arc<Self>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let refused = |source: Errno| {
            let what = "an event descriptor";
            CollectiveError::System { what, source: source.into() }
        };
        let waker = Arc::new(Self { event: event.map_err(refused)? });
        abort.attach(waker.clone());
        Ok(waker)
    }
}

impl AbortTarget for Waker {
    fn wake(&self) {
        // The counter starts at 0 and this is the only write, so it can neither block nor overflow.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// Why a wait ended without its event.
#[derive(Debug)]
pub(super) enum Stop {
    Aborted,
    TimedOut,
    /// The socket at hand failed, or the system refused to wait.
    Failed(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// The bounds of a wait.
#[derive(Clone, Copy)]
pub(super) struct Wait<'a> {
    pub abort: &'a AbortHandle,
    pub waker: &'a Waker,
    pub deadline: Option<Instant>,
}

impl Wait<'_> {
    /// `Err` once the epoch is aborted or the deadline has passed.
    pub(super) fn check(&self) -> Result<(), Stop> {
        if self.abort.is_aborted() {
            return Err(Stop::Aborted);
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(Stop::TimedOut),
            _ => Ok(()),
        }
    }

    /// Sleeps until one of `fds` is ready, which may also turn out not to be so: callers try and come
    /// back. `pause_until` ends the sleep earlier than the deadline, without an error.
    pub(super) fn sleep<'fd>(
        &'fd self,
        fds: &mut Vec<PollFd<'fd>>,
        pause_until: Option<Instant>,
    ) -> Result<(), Stop> {
        self.check()?;
        fds.push(PollFd::new(&self.waker.event, PollFlags::IN));
        let end = [self.deadline, pause_until].into_iter().flatten().min();
        let timeout = end.map(|end| end.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => self.check(),
            Err(error) => Err(Stop::Failed(error.into())),
        }
    }

    /// Sleeps on one descriptor.
    pub(super) fn ready(&self, fd: &impl std::os::fd::AsFd, events: PollFlags) -> Result<(), Stop> {
        self.sleep(&mut vec![PollFd::new(fd, events)], None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tessera_types::Epoch;

    use super::*;

    #[test]
    fn an_abort_ends_a_sleep_and_a_deadline_too() {
        let abort = AbortHandle::new(Epoch(1));
        let waker = Waker::attached(&abort).unwrap();
        let soon = Instant::now() + Duration::from_millis(1);
        let wait = Wait { abort: &abort, waker: &waker, deadline: Some(soon) };
        assert!(matches!(wait.sleep(&mut Vec::new(), None), Err(Stop::TimedOut)));

        let wait = Wait { deadline: None, ..wait };
        assert!(wait.sleep(&mut Vec::new(), Some(soon)).is_ok(), "a pause is no failure");
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| wait.sleep(&mut Vec::new(), None));
            abort.abort("test");
            assert!(matches!(sleeper.join().unwrap(), Err(Stop::Aborted)));
        });
        // A waker that comes late is awake at once.
        let late = Waker::attached(&abort).unwrap();
        assert!(poll(&mut [PollFd::new(&late.event, PollFlags::IN)], None).unwrap() == 1);
    }
}
