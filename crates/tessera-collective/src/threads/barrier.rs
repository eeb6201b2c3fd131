//! A barrier that spins briefly and then parks, and that an abort or a departed rank breaks.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tessera_types::Rank;

use crate::abort::{AbortHandle, AbortTarget};

/// Looks at the flags this many times between two looks at the clock.
const SPINS_PER_CLOCK_READ: u32 = 32;

/// How a wait ended.
pub(super) enum Outcome {
    /// Every rank has come.
    Met,
    Aborted,
    /// This rank dropped its communicator and will not come.
    Departed(Rank),
    /// These ranks had not come at the deadline.
    TimedOut(Vec<Rank>),
}

pub(super) struct Barrier {
    /// Ranks that wait in the current round.
    arrived: AtomicU32,
    /// Rounds completed.
    generation: AtomicU64,
    /// Rounds entered by each rank, to name those that are late.
    entered: Vec<AtomicU64>,
    /// 1 + the first rank that departed, 0 for none.
    departed: AtomicU32,
    sleepers: Arc<Sleepers>,
}

/// Where ranks park.
#[derive(Default)]
pub(super) struct Sleepers {
    /// How many are parked; without any, nobody pays for a wake-up call.
    parked: Mutex<u32>,
    condvar: Condvar,
}

impl Sleepers {
    fn lock(&self) -> MutexGuard<'_, u32> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AbortTarget for Sleepers {
    /// Whoever changed a flag did so before this lock, and sleepers look at the flags under it, so none
    /// can miss the change.
    fn wake(&self) {
        if *self.lock() > 0 {
            self.condvar.notify_all();
        }
    }
}

impl Barrier {
    pub(super) fn new(world_size: usize) -> Self {
        Self {
            arrived: AtomicU32::new(0),
            generation: AtomicU64::new(0),
            entered: (0..world_size).map(|_| AtomicU64::new(0)).collect(),
            departed: AtomicU32::new(0),
            sleepers: Arc::default(),
        }
    }

    pub(super) fn sleepers(&self) -> Arc<Sleepers> {
        Arc::clone(&self.sleepers)
    }

    /// Marks a rank that will not come again.
    pub(super) fn depart(&self, rank: usize) {
        let mark = rank as u32 + 1;
        // Only the first is worth naming; the others leave because of it or after it.
        let _ = self.departed.compare_exchange(0, mark, Ordering::AcqRel, Ordering::Acquire);
        self.sleepers.wake();
    }

    /// Waits for all ranks. After any outcome but [`Outcome::Met`] the barrier is of no further use.
    pub(super) fn wait(
        &self,
        rank: usize,
        abort: &AbortHandle,
        spin: Duration,
        deadline: Option<Instant>,
    ) -> Outcome {
        let generation = self.generation.load(Ordering::Acquire);
        self.entered[rank].fetch_add(1, Ordering::Relaxed);
        if self.arrived.fetch_add(1, Ordering::AcqRel) as usize + 1 == self.entered.len() {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation.store(generation + 1, Ordering::Release);
            self.sleepers.wake();
            return Outcome::Met;
        }
        if let Some(outcome) = self.spin(generation, abort, spin) {
            return outcome;
        }
        self.park(generation, abort, deadline)
    }

    fn look(&self, generation: u64, abort: &AbortHandle) -> Option<Outcome> {
        if self.generation.load(Ordering::Acquire) != generation {
            return Some(Outcome::Met);
        }
        if abort.is_aborted() {
            return Some(Outcome::Aborted);
        }
        let departed = self.departed.load(Ordering::Acquire);
        if departed == 0 {
            return None;
        }
        // The round may have been completed just before the departure was noted.
        match self.generation.load(Ordering::Acquire) != generation {
            true => Some(Outcome::Met),
            false => Some(Outcome::Departed(Rank(departed - 1))),
        }
    }

    fn spin(&self, generation: u64, abort: &AbortHandle, spin: Duration) -> Option<Outcome> {
        if spin.is_zero() {
            return None;
        }
        let end = Instant::now() + spin;
        loop {
            for _ in 0..SPINS_PER_CLOCK_READ {
                if let Some(outcome) = self.look(generation, abort) {
                    return Some(outcome);
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= end {
                return None;
            }
        }
    }

    fn park(&self, generation: u64, abort: &AbortHandle, deadline: Option<Instant>) -> Outcome {
        let mut parked = self.sleepers.lock();
        *parked += 1;
        let outcome = loop {
            if let Some(outcome) = self.look(generation, abort) {
                break outcome;
            }
            let condvar = &self.sleepers.condvar;
            let Some(deadline) = deadline else {
                parked = condvar.wait(parked).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Outcome::TimedOut(self.late(generation));
            }
            let woken = condvar.wait_timeout(parked, left);
            parked = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        *parked -= 1;
        outcome
    }

    /// Ranks that have not entered the round after `generation`.
    fn late(&self, generation: u64) -> Vec<Rank> {
        let is_late = |rank: &usize| self.entered[*rank].load(Ordering::Relaxed) <= generation;
        (0..self.entered.len()).filter(is_late).map(|rank| Rank(rank as u32)).collect()
    }
}
