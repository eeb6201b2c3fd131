//! Linears on the device, and how their slices get there: several threads read pieces into pinned buffers while the
//! pieces before are copied, so that neither the storage nor the bus waits for the other, and the host never holds
//! more than a few pieces.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use half::bf16;

use super::device::Gpu;
use super::event::Event;
use super::memory::{DeviceBuffer, PinnedBuffer};
use super::staging::StagingRing;
use super::{DevicePtr, NAME};
use crate::act::DType;
use crate::error::{KernelError, Result, WeightError};
use crate::weights::{LinearSpec, PartLayout, SliceReader, TensorSlice, WeightFormat};

/// Most of a weight that is read and copied at once.
const PIECE_BYTES: usize = 8 << 20;
/// Threads that read at the same time.
const READERS: usize = 4;
/// Pieces between their thread and the device. Half are being filled while the others are on their way.
const PIECES: usize = 2 * READERS;
/// Copies on their way before the next piece is waited for.
const COPIES_IN_FLIGHT: usize = 2;
/// Longest that the copy of a piece may take before the device counts as lost.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);

/// A linear `[N, K]`, row-major as published, padding included.
#[derive(Debug)]
pub struct CudaLinear {
    pub(super) weight: DeviceBuffer,
    /// `[N]` in f32, for results in f32.
    pub(super) bias_f32: Option<DeviceBuffer>,
    /// `[N]` in the type of the weight, for results in that type.
    pub(super) bias: Option<DeviceBuffer>,
    pub(super) outputs: u32,
    pub(super) inputs: u32,
    pub(super) layout: PartLayout,
    pub(super) dtype: DType,
    /// Published rows that the first part holds, without padding: the ids of a vocabulary shard.
    pub(super) first_rows: Range<usize>,
}

impl CudaLinear {
    /// Where the bias for results of `output` lies.
    pub(super) fn bias(&self, output: DType) -> Option<DevicePtr> {
        let bias = match output {
            DType::F32 => &self.bias_f32,
            DType::Bf16 => &self.bias,
        };
        bias.as_ref().map(DeviceBuffer::ptr)
    }
}

/// Rows of one part that are read and copied at once.
#[derive(Debug)]
struct Piece<'a> {
    tensor: &'a str,
    shape: &'a [usize],
    rows: Range<usize>,
    cols: Range<usize>,
    /// Elements from one row to the next on the device; those beyond `cols` are zero.
    width: usize,
    target: DevicePtr,
}

impl Piece<'_> {
    fn bytes(&self, dtype: DType) -> usize {
        self.rows.len() * self.width * dtype.size_bytes()
    }
}

/// A filled buffer, and which piece it holds.
type Filled = Result<(PinnedBuffer, usize), WeightError>;

/// What loading keeps from one linear to the next.
#[derive(Debug, Default)]
pub(super) struct Loader {
    free: Vec<PinnedBuffer>,
}

impl Loader {
    /// Reads this rank's slices of a linear, as elements of `dtype`.
    ///
    /// # Errors
    /// What the reader and the device report; no memory.
    pub(super) fn load(
        &mut self,
        spec: &LinearSpec,
        src: &dyn SliceReader,
        dtype: DType,
        gpu: &Gpu,
        staging: &mut StagingRing,
    ) -> Result<CudaLinear> {
        match spec.format {
            WeightFormat::Dense => {}
        }
        let (outputs, inputs) = (spec.out_features(), spec.in_features());
        if spec.layout == PartLayout::GateUp && !outputs.is_multiple_of(2) {
            let what = "gate and up of different sizes".to_owned();
            return Err(KernelError::Unsupported { backend: NAME, what });
        }
        // Zeroed, so padding is there already.
        let weight = gpu.alloc(outputs * inputs * dtype.size_bytes())?;
        let names: Vec<String> = spec.parts.iter().map(|part| part.weight_name()).collect();
        let pieces = pieces(spec, &names, weight.ptr(), dtype);
        self.copy(&pieces, src, dtype, gpu)?;
        let bias = read_bias(spec, src)?;
        let mut upload = |dtype: DType| {
            let values = bias.as_ref()?;
            let sent = gpu.alloc(outputs * dtype.size_bytes()).and_then(|buffer| {
                staging.send_values(gpu, buffer.ptr(), values, dtype)?;
                Ok(buffer)
            });
            Some(sent)
        };
        Ok(CudaLinear {
            weight,
            bias_f32: upload(DType::F32).transpose()?,
            bias: upload(dtype).transpose()?,
            outputs: outputs as u32,
            inputs: inputs as u32,
            layout: spec.layout,
            dtype,
            first_rows: spec.parts.first().map_or(0..0, |part| part.rows.clone()),
        })
    }

    /// Reads all pieces and enqueues their copies.
    fn copy(
        &mut self,
        pieces: &[Piece<'_>],
        src: &dyn SliceReader,
        dtype: DType,
        gpu: &Gpu,
    ) -> Result<()> {
        let largest = pieces.iter().map(|piece| piece.bytes(dtype)).max().unwrap_or(0);
        let (free_sender, free) = channel();
        for buffer in self.buffers(gpu, largest, PIECES.min(pieces.len()))? {
            // Only fails without a receiver, which lives in this function.
            let _ = free_sender.send(buffer);
        }
        let (free, next) = (Mutex::new(free), AtomicUsize::new(0));
        let result = std::thread::scope(|scope| {
            // Both ends that readers wait at are closed when this closure ends, also on an error.
            let free_sender = free_sender;
            let (filled_sender, filled) = sync_channel(PIECES);
            for _ in 0..READERS.min(pieces.len()) {
                let (filled, free, next) = (filled_sender.clone(), &free, &next);
                scope.spawn(move || read_pieces(pieces, src, dtype, next, free, &filled));
            }
            drop(filled_sender);
            send_pieces(pieces, dtype, gpu, &filled, |buffer| {
                // Readers that ended on an error take no more buffers.
                let _ = free_sender.send(buffer);
            })
        });
        self.free.extend(free.into_inner().unwrap_or_else(PoisonError::into_inner).try_iter());
        result
    }

    /// `count` free buffers of at least `bytes`.
    fn buffers(&mut self, gpu: &Gpu, bytes: usize, count: usize) -> Result<Vec<PinnedBuffer>> {
        self.free.retain(|buffer| buffer.bytes() >= bytes);
        let kept = self.free.len().saturating_sub(count);
        let mut buffers = self.free.split_off(kept);
        while buffers.len() < count {
            buffers.push(gpu.alloc_pinned(bytes.max(PIECE_BYTES))?);
        }
        Ok(buffers)
    }
}

/// One reader: takes the next piece and a free buffer, until there is none.
fn read_pieces(
    pieces: &[Piece<'_>],
    src: &dyn SliceReader,
    dtype: DType,
    next: &AtomicUsize,
    free: &Mutex<Receiver<PinnedBuffer>>,
    filled: &SyncSender<Filled>,
) {
    loop {
        // Only who is handed which piece matters, not when others see it.
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(piece) = pieces.get(index) else { return };
        let buffer = free.lock().unwrap_or_else(PoisonError::into_inner).recv();
        // The copying side gave up.
        let Ok(mut buffer) = buffer else { return };
        let read = read_piece(piece, src, dtype, buffer.as_mut_slice());
        let failed = read.is_err();
        if filled.send(read.map(|()| (buffer, index))).is_err() || failed {
            return;
        }
    }
}

/// The copying side: enqueues what arrives, and gives buffers back when their copies are done.
fn send_pieces(
    pieces: &[Piece<'_>],
    dtype: DType,
    gpu: &Gpu,
    filled: &Receiver<Filled>,
    give_back: impl Fn(PinnedBuffer),
) -> Result<()> {
    let mut in_flight: VecDeque<(PinnedBuffer, Event)> = VecDeque::new();
    let finish = |in_flight: &mut VecDeque<(PinnedBuffer, Event)>, at_most: usize| {
        while in_flight.len() > at_most {
            let (buffer, copied) = in_flight.pop_front().expect("there are more than none");
            copied.wait(Instant::now() + COPY_TIMEOUT)?;
            give_back(buffer);
        }
        Ok::<(), KernelError>(())
    };
    let mut sent = 0;
    for result in filled {
        let (buffer, index) = result?;
        gpu.copy_to_device(&buffer, 0..pieces[index].bytes(dtype), pieces[index].target)?;
        in_flight.push_back((buffer, gpu.record()?));
        sent += 1;
        finish(&mut in_flight, COPIES_IN_FLIGHT)?;
    }
    debug_assert_eq!(sent, pieces.len(), "readers end when all pieces are read");
    finish(&mut in_flight, 0)
}

/// Cuts the weight of every part into pieces, from the top of `target` on.
fn pieces<'a>(
    spec: &'a LinearSpec,
    names: &'a [String],
    target: DevicePtr,
    dtype: DType,
) -> Vec<Piece<'a>> {
    let width = spec.in_features();
    let row_bytes = width * dtype.size_bytes();
    let step = (PIECE_BYTES / row_bytes.max(1)).max(1);
    let mut pieces = Vec::new();
    let mut first_row = 0;
    for (part, name) in spec.parts.iter().zip(names) {
        let rows = if part.cols.is_empty() { 0..0 } else { part.rows.clone() };
        for start in rows.clone().step_by(step) {
            let at = (first_row + start - rows.start) * row_bytes;
            pieces.push(Piece {
                tensor: name,
                shape: &part.shape,
                rows: start..rows.end.min(start + step),
                cols: part.cols.clone(),
                width,
                target: target + at as u64,
            });
        }
        first_row += part.padded_rows;
    }
    pieces
}

fn read_piece(
    piece: &Piece<'_>,
    src: &dyn SliceReader,
    dtype: DType,
    bytes: &mut [u8],
) -> Result<(), WeightError> {
    let Piece { tensor, shape, .. } = *piece;
    let slice = TensorSlice { tensor, shape, rows: piece.rows.clone(), cols: piece.cols.clone() };
    let bytes = &mut bytes[..piece.bytes(dtype)];
    match dtype {
        DType::F32 => {
            // SAFETY: any four bytes are an f32; pinned memory is aligned to pages, so nothing is left over.
            let (_, values, _) = unsafe { bytes.align_to_mut::<f32>() };
            read_rows(&slice, piece.width, values, 0.0, |out| src.read_f32(&slice, out))
        }
        DType::Bf16 => {
            // SAFETY: as above; a bf16 is a transparent u16.
            let (_, values, _) = unsafe { bytes.align_to_mut::<bf16>() };
            read_rows(&slice, piece.width, values, bf16::ZERO, |out| src.read_bf16(&slice, out))
        }
    }
}

/// Reads a slice into rows of `width`, zero behind its columns.
fn read_rows<T: Copy>(
    slice: &TensorSlice<'_>,
    width: usize,
    values: &mut [T],
    zero: T,
    read: impl FnOnce(&mut [T]) -> Result<(), WeightError>,
) -> Result<(), WeightError> {
    let cols = slice.cols.len();
    if cols == width {
        return read(values);
    }
    let mut dense = vec![zero; slice.len()];
    read(&mut dense)?;
    for (row, dense) in values.chunks_exact_mut(width).zip(dense.chunks_exact(cols)) {
        row[..cols].copy_from_slice(dense);
        row[cols..].fill(zero);
    }
    Ok(())
}

/// The biases of all parts `[N]`, 0 where a part has none; `None` where no part has one.
fn read_bias(spec: &LinearSpec, src: &dyn SliceReader) -> Result<Option<Vec<f32>>> {
    if !spec.parts.iter().any(|part| part.bias) {
        return Ok(None);
    }
    let mut bias = vec![0.0; spec.out_features()];
    let mut first_row = 0;
    for part in &spec.parts {
        if part.bias && !part.rows.is_empty() {
            let (tensor, shape) = (part.bias_name(), [part.shape[0]]);
            let (rows, cols) = (part.rows.clone(), 0..1);
            let slice = TensorSlice { tensor: &tensor, shape: &shape, rows, cols };
            src.read_f32(&slice, &mut bias[first_row..first_row + part.rows.len()])?;
        }
        first_row += part.padded_rows;
    }
    Ok(Some(bias))
}
