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
    /// Queries and probabilities packed as left operands, and a tile of keys and values as right ones.
    pub(super) queries: Buffer<u32>,
    pub(super) probabilities: Buffer<u32>,
    pub(super) keys: Buffer<u32>,
    pub(super) values: Buffer<u32>,
    pub(super) scores: Buffer<f32>,
    /// Sums of the current chunk and of all chunks before it.
    pub(super) chunk: Buffer<f32>,
    pub(super) total: Buffer<f32>,
}

/// One [`Scratch`] per thread of the pool.
#[derive(Debug)]
pub(super) struct Workspace(Vec<Mutex<Scratch>>);

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
        Ok(Self((0..threads).map(|_| scratch()).collect::<Result<_>>()?))
    }

    /// The arrays of one thread; nobody else asks for them during a job.
    pub(super) fn of(&self, thread: usize) -> MutexGuard<'_, Scratch> {
        self.0[thread].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares the arrays of every thread, between jobs.
    pub(super) fn reserve(&self, grow: impl Fn(&mut Scratch) -> Result<()>) -> Result<()> {
        (0..self.0.len()).try_for_each(|thread| grow(&mut self.of(thread)))
    }
}
