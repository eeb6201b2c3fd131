//! What every kernel needs: the instructions, the threads and their memory.

use super::gemm::PackedRows;
use super::isa::Path;
use super::pool::Pool;
use super::scratch::Workspace;
use crate::error::{KernelError, Result};

/// Instructions, threads and working memory of one backend.
#[derive(Debug)]
pub(super) struct Compute {
    pub(super) path: Path,
    pub(super) pool: Pool,
    pub(super) workspace: Workspace,
    /// Input of the current linear.
    pub(super) packed: PackedRows,
}

impl Compute {
    pub(super) fn new(path: Path, threads: usize) -> Result<Self> {
        let pool = Pool::new(threads).map_err(|source| KernelError::Threads { threads, source })?;
        let workspace = Workspace::new(threads)?;
        Ok(Self { path, pool, workspace, packed: PackedRows::new()? })
    }

    /// Into how many parts to cut `items` equal ones: a few per thread, since threads may be slowed by
    /// others on the machine, and never more than there are.
    pub(super) fn parts(&self, items: usize) -> usize {
        const PARTS_PER_THREAD: usize = 4;
        match self.pool.threads() {
            1 => items.min(1),
            threads => items.min(threads * PARTS_PER_THREAD),
        }
    }

    /// Spreads rows over the threads, one by one.
    pub(super) fn for_rows(&self) -> impl Fn(usize, &(dyn Fn(usize) + Sync)) + '_ {
        |rows, body| self.pool.run(rows, &|_, row| body(row))
    }
}

/// Part `part` of `items` cut into `parts` contiguous parts.
pub(super) fn part_of(items: usize, parts: usize, part: usize) -> std::ops::Range<usize> {
    items * part / parts..items * (part + 1) / parts
}
