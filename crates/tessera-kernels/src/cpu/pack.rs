//! Loading a linear: slices are read band by band and packed into panels by all threads.

use super::gemm::PANEL;
use super::memory::{Buffer, SharedOut};
use super::pool::Pool;
use super::word::Word;
use crate::error::Result;
use crate::weights::{LinearSpec, PartLayout, SliceReader, TensorSlice};

/// Panels read at once per thread.
const BAND_PANELS: usize = 4;
/// Words of K that a panel is transposed by at a time: the block stays in the first-level cache.
const BLOCK_WORDS: usize = 16;

/// Outputs of each of a panel's parts: all of one, or half gate and half up.
fn lanes(layout: PartLayout) -> usize {
    match layout {
        PartLayout::Stacked => PANEL,
        PartLayout::GateUp => PANEL / 2,
    }
}

/// Panels of a linear of `outputs` outputs, gate and up counted together.
pub(super) fn num_panels(outputs: usize, layout: PartLayout) -> usize {
    match layout {
        PartLayout::Stacked => outputs.div_ceil(PANEL),
        PartLayout::GateUp => (outputs / 2).div_ceil(PANEL / 2),
    }
}

/// The weights as panels `[num_panels][depth][32]`, outputs and K filled up with zeros.
pub(super) fn pack_weights<W: Word>(
    spec: &LinearSpec,
    src: &mut dyn SliceReader,
    pool: &Pool,
) -> Result<Buffer<u32>> {
    let (outputs, width) = (spec.out_features(), spec.in_features());
    let panels = num_panels(outputs, spec.layout);
    let panel_words = width.div_ceil(W::PER_WORD) * PANEL;
    let mut words = Buffer::zeroed(panels * panel_words)?;
    let lanes = lanes(spec.layout);
    // Rows of a stacked linear form one group, gate and up one each.
    let group_rows = outputs * lanes / PANEL;
    let band = (BAND_PANELS * pool.threads()).min(panels);
    let mut rows = vec![W::Element::default(); band * PANEL * width];
    for first in (0..panels).step_by(band.max(1)) {
        let count = band.min(panels - first);
        rows.fill(W::Element::default());
        for (group, rows) in rows.chunks_exact_mut((band * lanes * width).max(1)).enumerate() {
            let start = first * lanes;
            let end = (start + count * lanes).min(group_rows);
            let base = group * group_rows;
            read_rows::<W>(spec, src, base + start..base + end.max(start), rows)?;
        }
        let out = SharedOut::new(&mut words);
        pool.run(count, &|_, panel| {
            let row = |lane: usize| {
                let at = (lane / lanes * band + panel) * lanes + lane % lanes;
                &rows[at * width..(at + 1) * width]
            };
            // SAFETY: each panel is written by the one thread that takes this part.
            #[allow(unsafe_code)]
            let panel = unsafe { out.slice((first + panel) * panel_words, panel_words) };
            pack_panel::<W>(row, panel);
        });
    }
    Ok(words)
}

/// Words of 32 rows, transposed block by block.
fn pack_panel<'a, W: Word>(row: impl Fn(usize) -> &'a [W::Element], panel: &mut [u32]) {
    for (block, panel) in panel.chunks_mut(BLOCK_WORDS * PANEL).enumerate() {
        let mut words = [[0; BLOCK_WORDS]; PANEL];
        for (lane, words) in words.iter_mut().enumerate() {
            W::block(&row(lane)[block * BLOCK_WORDS * W::PER_WORD..], words);
        }
        for (k, panel) in panel.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            panel.iter_mut().zip(&words).for_each(|(to, words)| *to = words[k]);
        }
    }
}

/// Stacked rows `wanted` of all parts into the front of `out` `[.., width]`, which is zero. Rows that pad a
/// part stay zero.
fn read_rows<W: Word>(
    spec: &LinearSpec,
    src: &mut dyn SliceReader,
    wanted: std::ops::Range<usize>,
    out: &mut [W::Element],
) -> Result<()> {
    let width = spec.in_features();
    let mut start = 0;
    for part in &spec.parts {
        let (from, to) = (wanted.start.max(start), wanted.end.min(start + part.rows.len()));
        let cols = part.cols.len();
        if from < to && cols > 0 {
            let first = part.rows.start + from - start;
            let slice = TensorSlice {
                tensor: &part.weight_name(),
                shape: &part.shape,
                rows: first..first + (to - from),
                cols: part.cols.clone(),
            };
            let out = &mut out[(from - wanted.start) * width..(to - wanted.start) * width];
            if cols == width {
                W::read(src, &slice, out)?;
            } else {
                let mut dense = vec![W::Element::default(); slice.len()];
                W::read(src, &slice, &mut dense)?;
                for (out, dense) in out.chunks_exact_mut(width).zip(dense.chunks_exact(cols)) {
                    out[..cols].copy_from_slice(dense);
                }
            }
        }
        start += part.padded_rows;
    }
    Ok(())
}

/// The biases in the order of the panels' outputs `[num_panels · 32]`, if any part has one.
pub(super) fn read_bias(spec: &LinearSpec, src: &mut dyn SliceReader) -> Result<Option<Vec<f32>>> {
    if !spec.parts.iter().any(|part| part.bias) {
        return Ok(None);
    }
    let outputs = spec.out_features();
    let mut stacked = vec![0.0; outputs];
    let mut start = 0;
    for part in &spec.parts {
        if part.bias && !part.rows.is_empty() {
            let tensor = part.bias_name();
            let (shape, rows) = ([part.shape[0]], part.rows.clone());
            let slice = TensorSlice { tensor: &tensor, shape: &shape, rows, cols: 0..1 };
            src.read_f32(&slice, &mut stacked[start..start + part.rows.len()])?;
        }
        start += part.padded_rows;
    }
    let lanes = lanes(spec.layout);
    let group_rows = outputs * lanes / PANEL;
    let mut bias = vec![0.0; num_panels(outputs, spec.layout) * PANEL];
    for (panel, bias) in bias.chunks_exact_mut(PANEL).enumerate() {
        for (group, bias) in bias.chunks_exact_mut(lanes).enumerate() {
            let from = (panel * lanes).min(group_rows);
            let to = (from + lanes).min(group_rows);
            let base = group * group_rows;
            bias[..to - from].copy_from_slice(&stacked[base + from..base + to]);
        }
    }
    Ok(Some(bias))
}
