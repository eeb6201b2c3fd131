//! The one ordered sum, and how a vector is cut between ranks. Both transports use exactly this code,
//! which is why they give the same bits.

use std::ops::Range;

/// Up to this many floats every rank gathers all inputs and sums them itself: one round instead of two.
const DIRECT_MAX_FLOATS: usize = 4096;

/// Floats summed at a time, so that the accumulator stays in the first-level cache (16 KiB).
const TILE_FLOATS: usize = 4096;

/// Whether an all-reduce gathers whole inputs (one round) or scatters the sum over ranks and gathers the
/// results (two rounds). With two ranks both move the same bytes, so the one round wins.
pub(crate) fn is_direct(num_floats: usize, world_size: usize) -> bool {
    world_size <= 2 || num_floats <= DIRECT_MAX_FLOATS
}

/// The part of `num_floats` that `rank` sums; the parts are contiguous, ascending and cover everything.
pub(crate) fn chunk(num_floats: usize, world_size: usize, rank: usize) -> Range<usize> {
    num_floats * rank / world_size..num_floats * (rank + 1) / world_size
}

/// Splits `data` at the chunks of [`chunk`], one slice per rank.
pub(crate) fn chunks_mut(mut data: &mut [f32], world_size: usize) -> Vec<&mut [f32]> {
    let num_floats = data.len();
    let mut parts = Vec::with_capacity(world_size);
    for rank in 0..world_size {
        let (part, rest) = data.split_at_mut(chunk(num_floats, world_size, rank).len());
        parts.push(part);
        data = rest;
    }
    parts
}

/// `out[i] = ((parts[0][i] + parts[1][i]) + parts[2][i]) + …`, in f32.
///
/// The sum starts from the first part and not from zero, so −0.0 survives. `part(rank)` has the length
/// of `out`.
pub(crate) fn ordered_sum<'a>(
    out: &mut [f32],
    world_size: usize,
    part: impl Fn(usize) -> &'a [f32],
) {
    let num_floats = out.len();
    for start in (0..num_floats).step_by(TILE_FLOATS) {
        let tile = start..num_floats.min(start + TILE_FLOATS);
        let sum = &mut out[tile.clone()];
        sum.copy_from_slice(&part(0)[tile.clone()]);
        for rank in 1..world_size {
            accumulate(sum, &part(rank)[tile.clone()]);
        }
    }
}

/// `sum[i] += addend[i]`. Never inlined: which operand's NaN payload survives depends on how the compiler
/// orders the addition, and one copy of the code orders it one way.
#[inline(never)]
fn accumulate(sum: &mut [f32], addend: &[f32]) {
    for (sum, addend) in sum.iter_mut().zip(addend) {
        *sum += *addend;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_everything_in_order() {
        for world_size in 1..9 {
            for num_floats in [0, 1, 2, 7, 8, 9, 1000] {
                let mut data: Vec<f32> = (0..num_floats).map(|i| i as f32).collect();
                let whole = data.clone();
                let parts = chunks_mut(&mut data, world_size);
                for (rank, part) in parts.iter().enumerate() {
                    assert_eq!(part.len(), chunk(num_floats, world_size, rank).len());
                }
                assert_eq!(parts.concat(), whole);
            }
        }
    }

    #[test]
    fn the_order_of_the_sum_is_by_ascending_rank() {
        // Any other order gives another number: 1 is lost beside 1e8.
        let parts = [[1e8f32], [1.0], [-1e8], [1.0]];
        let mut out = [0.0];
        ordered_sum(&mut out, 4, |rank| &parts[rank]);
        assert_eq!(out, [1.0]);
    }

    #[test]
    fn a_sum_of_negative_zeros_is_negative_zero() {
        let mut out = [1.0];
        ordered_sum(&mut out, 3, |_| &[-0.0]);
        assert_eq!(out[0].to_bits(), (-0.0f32).to_bits());
    }
}
