//! A few threads that share one job at a time.
//!
//! The thread that calls [`Pool::run`] works too, and takes every part that no other thread has come to
//! take; it waits only for parts that were begun. So a helper that wakes up late delays nobody. Which
//! thread computes a part never changes its bits.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work or for the end of it before it sleeps.
const SPIN: Duration = Duration::from_micros(20);

/// `body(thread, part)`, thread < number of threads.
type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// State word: the number of the job, whether it takes no more helpers, and how many are inside.
const CLOSED: u64 = 1 << 31;
const INSIDE: u64 = CLOSED - 1;
const JOB_SHIFT: u32 = 32;

struct Job {
    body: *const Body<'static>,
    parts: usize,
    caller: Thread,
}

struct Shared {
    state: AtomicU64,
    /// Written by the caller while the job is closed and nobody is inside, read by those inside.
    job: UnsafeCell<Option<Job>>,
    next_part: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    spin: bool,
}

// SAFETY: `job` is the only part that is not Sync; the state word orders its one writer and its readers.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}
// SAFETY: the body behind the pointer is Sync, and `run` keeps it alive while anyone is inside.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}

/// Threads of one backend: the caller's own and `threads − 1` helpers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One job at a time.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` ≥ 1 threads, the caller's included.
    ///
    /// # Errors
    /// Where a thread cannot be started.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: UnsafeCell::new(None),
            next_part: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            // Where threads share a core, one that spins keeps from work the one it waits for.
            spin: threads <= cores,
        });
        let mut pool = Self { shared, helpers: Vec::new(), turn: Mutex::new(()) };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let helper = std::thread::Builder::new().name(format!("cpu-kernel-{thread}"));
            pool.helpers.push(helper.spawn(move || help(&shared, thread))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `body(thread, part)` once for every part, and returns when all have returned.
    ///
    /// # Panics
    /// When `body` panicked.
    pub(super) fn run(&self, parts: usize, body: &Body<'_>) {
        if parts <= 1 || self.helpers.is_empty() {
            (0..parts).for_each(|part| body(0, part));
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.open(parts, body);
        let outcome = catch_unwind(AssertUnwindSafe(|| take_parts(&self.shared, 0, parts, body)));
        self.close();
        let helper_panicked = self.shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
        assert!(!helper_panicked, "a part of a kernel panicked in a helper thread");
    }

    #[allow(unsafe_code)]
    fn open(&self, parts: usize, body: &Body<'_>) {
        // SAFETY: only the lifetime changes; `close` returns when nobody can use the body any more.
        let body = unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body) };
        let job = Job { body, parts, caller: std::thread::current() };
        // SAFETY: the last job is closed with nobody inside and `turn` is held, so nobody reads the cell.
        unsafe { *self.shared.job.get() = Some(job) };
        self.shared.next_part.store(0, Ordering::Relaxed);
        let number = (self.shared.state.load(Ordering::Relaxed) >> JOB_SHIFT) + 1;
        self.shared.state.store(number << JOB_SHIFT, Ordering::Release);
        self.helpers.iter().for_each(|helper| helper.thread().unpark());
    }

    /// Lets nobody in any more and waits for those inside.
    fn close(&self) {
        self.shared.state.fetch_or(CLOSED, Ordering::AcqRel);
        wait_until(self.shared.spin, || self.shared.state.load(Ordering::Acquire) & INSIDE == 0);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // Its panics were reported by `run`.
            let _ = helper.join();
        }
    }
}

fn take_parts(shared: &Shared, thread: usize, parts: usize, body: &Body<'_>) {
    loop {
        let part = shared.next_part.fetch_add(1, Ordering::Relaxed);
        if part >= parts {
            return;
        }
        body(thread, part);
    }
}

/// Life of a helper.
fn help(shared: &Shared, thread: usize) {
    let mut last_job = 0;
    loop {
        let is_new = || {
            let state = shared.state.load(Ordering::Acquire);
            state >> JOB_SHIFT != last_job && state & CLOSED == 0
        };
        wait_until(shared.spin, || shared.stop.load(Ordering::Acquire) || is_new());
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        let state = shared.state.load(Ordering::Acquire);
        let may_enter = state >> JOB_SHIFT != last_job && state & CLOSED == 0;
        let (order, relaxed) = (Ordering::AcqRel, Ordering::Relaxed);
        if may_enter && shared.state.compare_exchange(state, state + 1, order, relaxed).is_ok() {
            last_job = state >> JOB_SHIFT;
            work_inside(shared, thread);
        }
    }
}

#[allow(unsafe_code)]
fn work_inside(shared: &Shared, thread: usize) {
    // SAFETY: this thread is counted as inside, so the cell is not written and the body lives.
    let job = unsafe { &*shared.job.get() }.as_ref().expect("an open state has a job");
    // SAFETY: as above.
    let body = unsafe { &*job.body };
    let caller = job.caller.clone();
    let outcome = catch_unwind(AssertUnwindSafe(|| take_parts(shared, thread, job.parts, body)));
    if outcome.is_err() {
        shared.panicked.store(true, Ordering::Relaxed);
    }
    let before = shared.state.fetch_sub(1, Ordering::AcqRel);
    if before & INSIDE == 1 && before & CLOSED != 0 {
        caller.unpark();
    }
}

/// Spins for a short while, then sleeps; whoever makes `done` true unparks this thread.
fn wait_until(spin: bool, done: impl Fn() -> bool) {
    if spin {
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..32 {
                if done() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    }
    while !done() {
        std::thread::park();
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).unwrap();
            for parts in (0..40).chain([1000; 50]) {
                let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                pool.run(parts, &|thread, part| {
                    assert!(thread < threads);
                    counts[part].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_works_on() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            let run = || pool.run(64, &|_, part| assert_ne!(part, 40, "planted"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|_, part| {
                sum.fetch_add(part, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }
}
