//! The order in which patches enter the tower: windows are made contiguous, so that window attention is
//! attention over segments (specification §7).

use tessera_kernels::VisionInputs;
use tessera_types::GridThw;

use crate::config::VisionConfig;

/// A batch in window order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WindowOrder {
    /// `[P]` patch `patches[i]` of the concatenated items comes i-th.
    pub patches: Vec<u32>,
    pub inputs: VisionInputs,
}

/// Orders the merge units of every item by window: frame group, window row, window column, then row and
/// column inside the window. Windows at the edge are smaller; none spans two frame groups. The
/// `merge²` patches of a unit move together.
///
/// Grids are whole multiples of the merge size.
pub fn window_order(grids: &[GridThw], config: &VisionConfig) -> WindowOrder {
    let merge = config.spatial_merge_size as u32;
    let unit_len = config.merge_unit() as u32;
    let mut order = WindowOrder::default();
    order.inputs.cu_window.push(0);
    order.inputs.cu_full.push(0);
    let mut units = Vec::new();
    for grid in grids {
        let (height, width) = (grid.h / merge, grid.w / merge);
        for _ in 0..grid.t {
            let first_unit = units.len() as u32;
            for window in windows(height, width, config.window_units() as u32) {
                for (row, col) in window {
                    units.push(first_unit + row * width + col);
                    push_unit(&mut order.inputs.row_col, row * merge, col * merge, merge);
                }
                order.inputs.cu_window.push(units.len() as u32 * unit_len);
            }
            order.inputs.cu_full.push(units.len() as u32 * unit_len);
        }
    }
    order.inputs.inverse = vec![0; units.len()];
    for (place, unit) in units.iter().enumerate() {
        order.inputs.inverse[*unit as usize] = place as u32;
    }
    order.patches = units.iter().flat_map(|unit| unit * unit_len..(unit + 1) * unit_len).collect();
    order
}

/// The units (row, col) of each window of one frame group.
fn windows(height: u32, width: u32, side: u32) -> impl Iterator<Item = Vec<(u32, u32)>> {
    let starts = move |len: u32| (0..len).step_by(side as usize);
    starts(height).flat_map(move |top| {
        starts(width).map(move |left| {
            let (rows, cols) = (top..(top + side).min(height), left..(left + side).min(width));
            rows.flat_map(|row| cols.clone().map(move |col| (row, col))).collect()
        })
    })
}

/// Patch coordinates of one merge unit, row by row.
fn push_unit(row_col: &mut Vec<[u32; 2]>, top: u32, left: u32, merge: u32) {
    for dy in 0..merge {
        row_col.extend((0..merge).map(|dx| [top + dy, left + dx]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VisionConfig {
        VisionConfig {
            depth: 1,
            hidden_size: 64,
            num_heads: 4,
            intermediate_size: 84,
            out_hidden_size: 64,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            full_attention_blocks: vec![],
            tokens_per_second: 2.0,
        }
    }

    fn grid(t: u32, h: u32, w: u32) -> GridThw {
        GridThw { t, h, w }
    }

    /// The recipe of the reference implementation: pad the numbers of the units to whole windows, which
    /// adds an empty window where nothing needs padding, cut, and drop the padding.
    fn reference_order(grid: GridThw) -> (Vec<i64>, Vec<usize>) {
        let (t, h, w) = (grid.t as usize, grid.h as usize / 2, grid.w as usize / 2);
        let (pad_h, pad_w) = (4 - h % 4, 4 - w % 4);
        let (rows, cols) = ((h + pad_h) / 4, (w + pad_w) / 4);
        let (mut order, mut counts) = (Vec::new(), Vec::new());
        for frame in 0..t {
            for (window_row, window_col) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                let before = order.len();
                for (y, x) in (0..4).flat_map(|y| (0..4).map(move |x| (y, x))) {
                    let (row, col) = (window_row * 4 + y, window_col * 4 + x);
                    if row < h && col < w {
                        order.push((frame * h * w + row * w + col) as i64);
                    }
                }
                counts.push(order.len() - before);
            }
        }
        (order, counts)
    }

    #[test]
    fn order_and_windows_follow_the_reference() {
        for grid in
            [grid(1, 2, 2), grid(1, 8, 8), grid(1, 18, 10), grid(3, 12, 16), grid(2, 10, 34)]
        {
            let order = window_order(&[grid], &config());
            let (units, counts) = reference_order(grid);
            let patches: Vec<u32> =
                units.iter().flat_map(|u| (*u * 4) as u32..(*u * 4 + 4) as u32).collect();
            assert_eq!(order.patches, patches);
            let mut sums = vec![0u32];
            for count in counts.into_iter().filter(|count| *count > 0) {
                sums.push(sums.last().unwrap() + 4 * count as u32);
            }
            assert_eq!(order.inputs.cu_window, sums);
            let frame = grid.h * grid.w;
            let full: Vec<u32> = (0..=grid.t).map(|i| i * frame).collect();
            assert_eq!(order.inputs.cu_full, full);
        }
    }

    #[test]
    fn the_inverse_undoes_the_order_over_several_items() {
        let grids = [grid(1, 18, 10), grid(2, 6, 4), grid(1, 2, 2)];
        let order = window_order(&grids, &config());
        let total: u64 = grids.iter().map(|grid| grid.num_patches()).sum();
        assert_eq!(order.patches.len() as u64, total);
        for (unit, place) in order.inputs.inverse.iter().enumerate() {
            assert_eq!(order.patches[*place as usize * 4], unit as u32 * 4);
        }
    }

    #[test]
    fn coordinates_are_those_of_the_patch_in_its_own_frame() {
        let grids = [grid(2, 4, 6), grid(1, 10, 10)];
        let order = window_order(&grids, &config());
        // Raster coordinates of the concatenated items, unit by unit.
        let mut raster = Vec::new();
        for grid in grids {
            for _ in 0..grid.t {
                for (row, col) in (0..grid.h / 2).flat_map(|r| (0..grid.w / 2).map(move |c| (r, c)))
                {
                    push_unit(&mut raster, row * 2, col * 2, 2);
                }
            }
        }
        for (place, patch) in order.patches.iter().enumerate() {
            assert_eq!(order.inputs.row_col[place], raster[*patch as usize]);
        }
    }
}
