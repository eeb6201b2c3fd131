//! Working memory of the threads. Grows to the largest step, which warm-up runs, and stays.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::memory::Buffer;
use crate::error::Result;

/// One thread's arrays; each kernel says what it keeps where.
#[derive(Debug)]
pub(super) struct Scratch {
    /// GEMM sums of one panel.
    pub(super) sums: Buffer<f32>,
    pub(super) attention: AttentionScratch,
}

/// Arrays of one unit of attention: a few query rows of one head against all keys.
#[derive(Debug)]
pub(super) struct AttentionScratch {
    /// Rows of queries and of probabilities, and tiles of keys and values that were collected or packed.
    pub(super) queries: Buffer<u32>,
    pub(super) probabilities: Buffer<u32>,
    pub(super) keys: Buffer<u32>,
    pub(super) values: Buffer<u32>,
    pub(super) scores: Buffer<f32>,
    /// Sums of the current chunk and of all chunks before it.
    pub(super) chunk: Buffer<f32>,
    pub(super) total: Buffer<f32>,
}

/// One [`Scratch`] per thread of the pool, and what the threads of one job share.
#[derive(Debug)]
pub(super) struct Workspace {
    threads: Vec<Mutex<Scratch>>,
    /// Results of chunks of attention that are merged when all are there.
    partials: Mutex<Buffer<f32>>,
}

impl Workspace {
    pub(super) fn new(threads: usize) -> Result<Self> {
        let scratch = || {
            Ok(Mutex::new(Scratch {
                sums: Buffer::zeroed(0)?,
                attention: AttentionScratch {
                    queries: Buffer::zeroed(0)?,
                    probabilities: Buffer::zeroed(0)?,
                    keys: Buffer::zeroed(0)?,
                    values: Buffer::zeroed(0)?,
                    scores: Buffer::zeroed(0)?,
                    chunk: Buffer::zeroed(0)?,
                    total: Buffer::zeroed(0)?,
                },
            }))
        };
        let threads = (0..threads).map(|_| scratch()).collect::<Result<_>>()?;
        Ok(Self { threads, partials: Mutex::new(Buffer::zeroed(0)?) })
    }

    /// The arrays of one thread; nobody else asks for them during a job.
    pub(super) fn of(&self, thread: usize) -> MutexGuard<'_, Scratch> {
        self.threads[thread].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shared array, for the thread that starts a job.
    pub(super) fn partials(&self) -> MutexGuard<'_, Buffer<f32>> {
        self.partials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares the arrays of every thread, between jobs.
    pub(super) fn reserve(&self, grow: impl Fn(&mut Scratch) -> Result<()>) -> Result<()> {
        (0..self.threads.len()).try_for_each(|thread| grow(&mut self.of(thread)))
    }
}
