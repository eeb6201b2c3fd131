//! Draws on the device, for a rank without peers: the tokens never leave it but for the readback, and the next step's
//! embedding reads them where they lie.
//!
//! Same tokens as [`crate::sampling::process_row`] for equal logits, bit for bit (`cuda/sampler*.cu`). A sequence's
//! parameters, its marks (in the prompt, in the output how often, biased, ending) and its last token lie in a row of
//! the table; rows are searched as they are read, so logits are never written.
//!
//! [`admission`] brings sequences up, [`readback`] brings results down.

use tessera_types::{LateInputs, SequenceSlot, TokenMask};

use self::admission::{Admissions, SlotFlags};
pub(super) use self::readback::Drawn;
use self::readback::{Pending, ResultRing};
use super::DevicePtr;
use super::device::Gpu;
use super::memory::DeviceBuffer;
use super::staging::StagingRing;
use crate::error::{KernelError, Result};
use crate::inputs::{Readback, SampleRow, SamplerSequence, ScoreRow, StepLimits};

mod admission;
mod readback;
#[cfg(test)]
mod tests;

/// No mask, no known token.
const NONE: u32 = u32::MAX;
/// Tokens that one block of the search looks at.
const CHUNK: usize = 4096;
/// Words of `SlotParams`, and entries of a slot's bias.
const PARAM_WORDS: usize = 16;
const MAX_BIAS: usize = 1024;
/// Bytes of a `Found`.
const FOUND_BYTES: usize = 24;
/// Words of a `SampleRow` and of a `LogprobJob`.
const ROW_WORDS: usize = 4;
/// Most rows that are scored at once.
const MAX_SCORE_ROWS: usize = 256;
/// Steps whose inputs may be on their way at once, and one that is being packed.
const RING: usize = 3;

/// Arrays of the table, in the order of `Tables` in `cuda/sampler_row.cuh`.
#[derive(Debug)]
struct Table {
    params: DeviceBuffer,
    marks: DeviceBuffer,
    marked: DeviceBuffer,
    bias: DeviceBuffer,
    last_sampled: DeviceBuffer,
    /// The addresses of the above, on the device.
    addresses: DeviceBuffer,
}

impl Table {
    fn new(gpu: &Gpu, slots: usize, vocab: usize) -> Result<Self> {
        let words = vocab.div_ceil(32);
        let table = Self {
            params: gpu.alloc(slots * PARAM_WORDS * 4)?,
            marks: gpu.alloc(slots * words * 32 * 4)?,
            marked: gpu.alloc(slots * words * 4)?,
            bias: gpu.alloc(slots * MAX_BIAS * 8)?,
            last_sampled: gpu.alloc(slots * 4)?,
            addresses: gpu.alloc(6 * 8)?,
        };
        let mut pinned = gpu.alloc_pinned(6 * 8)?;
        let arrays = [&table.params, &table.marks, &table.marked, &table.bias, &table.last_sampled];
        let sizes = u64::from(vocab as u32) | (words as u64) << 32;
        let (places, _) = pinned.as_mut_slice().as_chunks_mut();
        let values = arrays.iter().map(|array| array.ptr()).chain([sizes]);
        places.iter_mut().zip(values).for_each(|(place, value)| *place = value.to_ne_bytes());
        gpu.copy_to_device(&pinned, 0..6 * 8, table.addresses.ptr())?;
        // The pinned memory goes with this function.
        gpu.synchronize()?;
        Ok(table)
    }

    fn bytes(&self) -> usize {
        let arrays = [&self.params, &self.marks, &self.marked, &self.bias, &self.last_sampled];
        arrays.iter().map(|array| array.bytes()).sum()
    }
}

/// The table of running sequences on the device, and what the step at hand has drawn.
#[derive(Debug)]
pub(super) struct DeviceSampler {
    vocab: usize,
    max_rows: usize,
    max_scores: usize,
    table: Table,
    /// What the host knows of each row of the table.
    slots: Vec<Option<HostSlot>>,
    admissions: Admissions,
    /// Rows, masks and lists of one call.
    inputs: DeviceBuffer,
    ring: StagingRing,
    /// `[max_rows, chunks]`
    found: DeviceBuffer,
    results: ResultRing,
    pending: Pending,
}

#[derive(Debug, Clone, Copy)]
struct HostSlot {
    flags: SlotFlags,
    num_logprobs: Option<u32>,
}

/// Where the parts of one call's upload begin, in words.
#[derive(Debug, Default)]
struct Upload {
    words: Vec<u32>,
}

impl Upload {
    /// Appends an array on 16 bytes and returns where it begins.
    fn array(&mut self, words: impl IntoIterator<Item = u32>) -> usize {
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let at = self.words.len();
        self.words.extend(words);
        at
    }
}

impl DeviceSampler {
    /// An empty table for `limits`.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self> {
        let vocab = limits.num_real_tokens as usize;
        let max_rows = limits.max_sequences as usize;
        let max_scores = if vocab == 0 { 0 } else { limits.max_tokens as usize };
        let row_words = ROW_WORDS + vocab.div_ceil(32) + 1 + ROW_WORDS;
        let input_words = (max_rows * row_words + 16).max(MAX_SCORE_ROWS * ROW_WORDS);
        let found_bytes = max_rows * vocab.div_ceil(CHUNK) * FOUND_BYTES;
        Ok(Self {
            vocab,
            max_rows,
            max_scores,
            table: Table::new(gpu, max_rows, vocab)?,
            slots: vec![None; max_rows],
            admissions: Admissions::new(gpu)?,
            inputs: gpu.alloc(input_words * 4)?,
            ring: StagingRing::new(gpu, RING, input_words * 4)?,
            found: gpu.alloc(found_bytes)?,
            results: ResultRing::new(gpu, max_rows, max_scores)?,
            pending: Pending::default(),
        })
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        let arrays = [&self.inputs, &self.found];
        let arrays: usize = arrays.iter().map(|array| array.bytes()).sum();
        (self.table.bytes() + arrays + self.results.bytes()) as u64
    }

    /// u32 per slot: the token drawn last, or the last that came with the sequence.
    pub(super) fn last_sampled(&self) -> DevicePtr {
        self.table.last_sampled.ptr()
    }

    /// Whether a sequence has this row of the table.
    pub(super) fn is_held(&self, slot: SequenceSlot) -> bool {
        self.slot(slot).is_ok()
    }

    /// Forgets all sequences and what was drawn.
    pub(super) fn clear(&mut self) {
        self.slots.fill(None);
        self.pending = Pending::default();
    }

    /// A sequence takes a row of the table. Enqueues its upload.
    ///
    /// # Errors
    /// No such row, an empty sequence; what the device reports.
    pub(super) fn admit(&mut self, gpu: &Gpu, sequence: &SamplerSequence<'_>) -> Result<()> {
        let slot = sequence.slot;
        if slot.index() >= self.slots.len() {
            return Err(KernelError::VacantSlot { slot });
        }
        let flags = self.admissions.send(gpu, self.table.addresses.ptr(), sequence, self.vocab)?;
        self.slots[slot.index()] = Some(HostSlot { flags, num_logprobs: sequence.params.logprobs });
        Ok(())
    }

    pub(super) fn release(&mut self, slot: SequenceSlot) {
        if let Some(row) = self.slots.get_mut(slot.index()) {
            *row = None;
        }
    }

    fn slot(&self, slot: SequenceSlot) -> Result<HostSlot> {
        let row = self.slots.get(slot.index()).copied().flatten();
        row.ok_or(KernelError::VacantSlot { slot })
    }

    /// Enqueues the draw of one token per row of `logits` `[rows, cols]` f32. What fails in a row is told by
    /// [`DeviceSampler::read`].
    ///
    /// # Errors
    /// Vacant slots, too many rows, logits that miss tokens; what the device reports.
    pub(super) fn sample(
        &mut self,
        gpu: &Gpu,
        (logits, cols): (DevicePtr, u32),
        rows: &[SampleRow],
        late: &LateInputs,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        self.check_vocabulary("sample", cols)?;
        let slots: Vec<HostSlot> =
            rows.iter().map(|row| self.slot(row.slot)).collect::<Result<_>>()?;
        let first = self.pending.rows.len();
        check_room("sample", "rows", first + rows.len(), self.max_rows)?;

        let mut upload = Upload::default();
        let (rows_at, masks_at) = self.pack_rows(&mut upload, rows, late);
        let is_filtered = |slot: &HostSlot| slot.flags.has(SlotFlags::FILTERED);
        let filtered: Vec<u32> =
            (0u32..).zip(&slots).filter(|(_, slot)| is_filtered(slot)).map(|(at, _)| at).collect();
        let jobs: Vec<(u32, u32)> =
            (0u32..).zip(&slots).filter_map(|(at, slot)| Some((at, slot.num_logprobs?))).collect();
        let filtered_at = upload.array(filtered.iter().copied());
        let jobs_at = upload.array(jobs.iter().flat_map(|&(at, num_top)| [at, NONE, num_top, 0]));
        self.send(gpu, &upload)?;

        let input = |at: usize| self.inputs.ptr() + 4 * at as u64;
        let table = self.table.addresses.ptr();
        let chunks = self.vocab.div_ceil(CHUNK) as u32;
        let num_rows = rows.len() as u32;
        gpu.launch("sampler_search")
            .grid([chunks, num_rows, 1])
            .block([256, 1, 1])
            .ptr(table)
            .ptr(input(rows_at))
            .ptr(input(masks_at))
            .ptr(logits)
            .u32(cols)
            .ptr(self.found.ptr())
            .go()?;
        gpu.launch("sampler_filter")
            .grid([filtered.len() as u32, 1, 1])
            .block([1024, 1, 1])
            .ptr(table)
            .ptr(input(rows_at))
            .ptr(input(masks_at))
            .ptr(logits)
            .u32(cols)
            .ptr(self.found.ptr())
            .u32(chunks)
            .ptr(input(filtered_at))
            .go()?;
        let drawn = self.results.drawn(first);
        gpu.launch("sampler_finish")
            .grid([num_rows, 1, 1])
            .block([32, 1, 1])
            .ptr(table)
            .ptr(input(rows_at))
            .ptr(logits)
            .u32(cols)
            .ptr(self.found.ptr())
            .u32(chunks)
            .ptr(drawn)
            .go()?;
        let out = self.results.logprobs(self.pending.num_logprobs);
        self.logprobs(gpu, (logits, cols), (input(jobs_at), jobs.len()), drawn, out)?;
        let with_logprobs = slots.iter().map(|slot| slot.num_logprobs.is_some());
        self.pending.num_logprobs += jobs.len();
        self.pending.rows.extend(rows.iter().copied().zip(with_logprobs));
        Ok(())
    }

    /// Appends rows and their masks to an upload; returns where both begin.
    fn pack_rows(
        &self,
        upload: &mut Upload,
        rows: &[SampleRow],
        late: &LateInputs,
    ) -> (usize, usize) {
        let mask_words = self.vocab.div_ceil(32);
        let mask_of = |row: &SampleRow| -> Option<&TokenMask> {
            late.masks.iter().find(|(slot, _)| *slot == row.slot).map(|(_, mask)| mask)
        };
        let masks: Vec<Option<&TokenMask>> = rows.iter().map(mask_of).collect();
        let mut num_masks = 0;
        let places: Vec<u32> = masks
            .iter()
            .map(|mask| match mask {
                None => NONE,
                Some(_) => {
                    num_masks += 1;
                    ((num_masks - 1) * mask_words) as u32
                }
            })
            .collect();
        let rows_at = upload.array(
            rows.iter()
                .zip(places)
                .flat_map(|(row, mask_at)| [row.slot.0, row.output_index, mask_at, 0]),
        );
        let halves = |mask: &TokenMask| {
            let words = mask.words.iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]);
            words.chain(std::iter::repeat(0)).take(mask_words).collect::<Vec<_>>()
        };
        (rows_at, upload.array(masks.into_iter().flatten().flat_map(halves)))
    }

    fn send(&mut self, gpu: &Gpu, upload: &Upload) -> Result<()> {
        self.ring.send(gpu, self.inputs.ptr(), |bytes| {
            let (places, _) = bytes.as_chunks_mut();
            let words = &upload.words;
            places.iter_mut().zip(words).for_each(|(place, word)| *place = word.to_ne_bytes());
            4 * words.len()
        })
    }

    /// Enqueues the log probabilities that jobs ask for.
    fn logprobs(
        &self,
        gpu: &Gpu,
        (logits, cols): (DevicePtr, u32),
        (jobs, num_jobs): (DevicePtr, usize),
        drawn: DevicePtr,
        out: DevicePtr,
    ) -> Result<()> {
        gpu.launch("sampler_logprobs")
            .grid([num_jobs as u32, 1, 1])
            .block([1024, 1, 1])
            .ptr(self.table.addresses.ptr())
            .ptr(logits)
            .u32(cols)
            .ptr(jobs)
            .ptr(drawn)
            .ptr(out)
            .go()
    }

    /// Enqueues the log probabilities of what `rows` names, by row of `logits` `[rows ≤ 256, cols]` f32.
    ///
    /// # Errors
    /// Targets beyond the vocabulary, too many rows; what the device reports.
    pub(super) fn score(
        &mut self,
        gpu: &Gpu,
        (logits, cols): (DevicePtr, u32),
        rows: &[ScoreRow],
    ) -> Result<()> {
        let operation = "score_rows";
        if let Some(row) = rows.iter().find(|row| row.target as usize >= self.vocab) {
            let (expected, found) = (self.vocab, row.target as usize);
            return Err(KernelError::Shape { operation, what: "target", expected, found });
        }
        if rows.is_empty() {
            return Ok(());
        }
        self.check_vocabulary(operation, cols)?;
        check_room(operation, "rows", rows.len(), MAX_SCORE_ROWS)?;
        let first = self.pending.num_scores;
        check_room(operation, "scores", first + rows.len(), self.max_scores)?;
        let mut upload = Upload::default();
        let jobs = (0u32..).zip(rows);
        upload.array(jobs.flat_map(|(at, row)| [at, row.target, row.num_top, 0]));
        self.send(gpu, &upload)?;
        let (jobs, out) = (self.inputs.ptr(), self.results.scores(first));
        self.logprobs(gpu, (logits, cols), (jobs, rows.len()), 0, out)?;
        self.pending.num_scores += rows.len();
        Ok(())
    }

    fn check_vocabulary(&self, operation: &'static str, cols: u32) -> Result<()> {
        let (expected, found) = (self.vocab, cols as usize);
        if found < expected || expected == 0 {
            return Err(KernelError::Shape { operation, what: "vocabulary", expected, found });
        }
        Ok(())
    }

    /// Enqueues the copy of what the step gave so far.
    ///
    /// # Errors
    /// What the device reports.
    pub(super) fn submit(&mut self, gpu: &Gpu) -> Result<Drawn> {
        self.results.submit(gpu, std::mem::take(&mut self.pending))
    }

    /// The results of a submitted step, once an event that was recorded after [`DeviceSampler::submit`] is done.
    ///
    /// # Errors
    /// A row from which nothing could be drawn, a scored row with an invalid value.
    pub(super) fn read(&self, drawn: &Drawn) -> Result<Readback> {
        self.results.read(drawn)
    }
}

fn check_room(
    operation: &'static str,
    what: &'static str,
    found: usize,
    expected: usize,
) -> Result<()> {
    match found <= expected {
        true => Ok(()),
        false => Err(KernelError::Shape { operation, what, expected, found }),
    }
}
