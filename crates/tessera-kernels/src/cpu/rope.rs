//! Rotary embedding of all rows, by tables made once per step rather than once per layer.

use super::compute::{Compute, part_of};
use super::isa::{Isa, Task};
use super::memory::SharedOut;
use crate::reference::rope::rotate;

/// Cosine and sine `[rows, head_dim / 2]` of the uploaded positions, for one set of frequencies.
#[derive(Debug)]
pub(super) struct AngleTable<K> {
    frequencies: Option<K>,
    angles: Vec<(f32, f32)>,
}

impl<K> Default for AngleTable<K> {
    fn default() -> Self {
        Self { frequencies: None, angles: Vec::new() }
    }
}

impl<K: PartialEq> AngleTable<K> {
    /// Forgets the table: new positions were uploaded.
    pub(super) fn clear(&mut self) {
        self.frequencies = None;
    }

    /// The table for `frequencies`, filled from `rows` unless it is there already.
    pub(super) fn of<R: Iterator<Item = Vec<(f32, f32)>>>(
        &mut self,
        frequencies: K,
        rows: impl FnOnce() -> R,
    ) -> &[(f32, f32)] {
        if self.frequencies.as_ref() != Some(&frequencies) {
            self.angles.clear();
            rows().for_each(|row| self.angles.extend(row));
            self.frequencies = Some(frequencies);
        }
        &self.angles
    }
}

/// Rotates the first `rotated` of `cols` columns of every row, head by head.
pub(super) fn rotate_rows(
    compute: &Compute,
    data: &mut [f32],
    cols: usize,
    rotated: usize,
    dim: usize,
    angles: &[(f32, f32)],
) {
    let rows = data.len() / cols;
    let parts = if rows < 8 { 1 } else { compute.parts(rows) };
    let data = SharedOut::new(data);
    compute.pool.run(parts, &|_, part| {
        let rows = part_of(rows, parts, part);
        compute.path.dispatch(RotateRows { data, cols, rotated, dim, angles, rows });
    });
}

struct RotateRows<'a> {
    data: SharedOut<'a, f32>,
    cols: usize,
    rotated: usize,
    dim: usize,
    angles: &'a [(f32, f32)],
    rows: std::ops::Range<usize>,
}

impl Task for RotateRows<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let pairs = self.dim / 2;
        for row in self.rows.clone() {
            // SAFETY: each row belongs to the one thread that has it in its part.
            let heads = unsafe { self.data.slice(row * self.cols, self.rotated) };
            let angles = &self.angles[row * pairs..(row + 1) * pairs];
            heads.chunks_exact_mut(self.dim).for_each(|head| rotate(head, angles));
        }
    }
}
