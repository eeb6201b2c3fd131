//! Loading a linear: each of several threads reads the rows of a panel and packs them, so that reading,
//! converting and packing overlap and no more than one panel per thread is ever held twice.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::gemm::PANEL;
use super::memory::{Buffer, SharedOut};
use super::word::Word;
use crate::error::{KernelError, Result};
use crate::weights::{LinearSpec, PartLayout, SliceReader, TensorSlice};

/// Readers of a large linear, at least: a disk answers several requests at once.
const MIN_READERS: usize = 4;
/// Bytes that are worth another reader.
const READER_BYTES: usize = 1 << 20;
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

/// The weights as panels `[num_panels][depth][32]`, outputs and K filled up with zeros. Read by up to
/// `threads` threads, or a few more.
pub(super) fn pack_weights<W: Word>(
    spec: &LinearSpec,
    src: &dyn SliceReader,
    threads: usize,
) -> Result<Buffer<u32>> {
    let (outputs, width) = (spec.out_features(), spec.in_features());
    let panels = num_panels(outputs, spec.layout);
    let panel_words = width.div_ceil(W::PER_WORD) * PANEL;
    let mut words = Buffer::zeroed(panels * panel_words)?;
    let readers = (size_of_val(&*words) / READER_BYTES).clamp(1, threads.max(MIN_READERS));
    let out = SharedOut::new(&mut words);
    let reading = Reading { spec, src, next: AtomicUsize::new(0), failed: OnceLock::new() };
    let read = || {
        reading.panels::<W>(panels, |panel, rows| {
            // SAFETY: each panel is written by the one thread that took its number.
            #[allow(unsafe_code)]
            let panel = unsafe { out.slice(panel * panel_words, panel_words) };
            pack_panel::<W>(|lane| &rows[lane * width..(lane + 1) * width], panel);
        });
    };
    std::thread::scope(|scope| {
        for _ in 1..readers {
            // Where a thread cannot be started, the others read its panels.
            let _ = std::thread::Builder::new().name("load".into()).spawn_scoped(scope, read);
        }
        read();
    });
    match reading.failed.into_inner() {
        None => Ok(words),
        Some(error) => Err(error),
    }
}

/// A linear whose panels several threads take one by one.
struct Reading<'a> {
    spec: &'a LinearSpec,
    src: &'a dyn SliceReader,
    next: AtomicUsize,
    /// The first error; it ends all threads.
    failed: OnceLock<KernelError>,
}

impl Reading<'_> {
    /// Takes panels until none is left or one failed, and hands the rows `[32][width]` of each to
    /// `pack`. Called by every thread.
    fn panels<W: Word>(&self, panels: usize, pack: impl Fn(usize, &[W::Element])) {
        let (width, lanes) = (self.spec.in_features(), lanes(self.spec.layout));
        // Rows of a stacked linear form one group, gate and up one each.
        let group_rows = self.spec.out_features() * lanes / PANEL;
        let mut rows = vec![W::Element::default(); PANEL * width];
        while self.failed.get().is_none() {
            let panel = self.next.fetch_add(1, Ordering::Relaxed);
            if panel >= panels {
                return;
            }
            let (start, end) = (panel * lanes, ((panel + 1) * lanes).min(group_rows));
            rows.fill(W::Element::default());
            let groups = rows.chunks_exact_mut((lanes * width).max(1)).enumerate();
            let read = groups.into_iter().try_for_each(|(group, rows)| {
                let base = group * group_rows;
                read_rows::<W>(self.spec, self.src, base + start..base + end.max(start), rows)
            });
            match read {
                Ok(()) => pack(panel, &rows),
                // Only the first is reported.
                Err(error) => drop(self.failed.set(error)),
            }
        }
    }
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
    src: &dyn SliceReader,
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
pub(super) fn read_bias(spec: &LinearSpec, src: &dyn SliceReader) -> Result<Option<Vec<f32>>> {
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
