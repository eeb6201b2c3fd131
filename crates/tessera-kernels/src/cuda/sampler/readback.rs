//! Results on their way down (`Drawn` in `cuda/sampler.cu`, `Logprobs` in `cuda/sampler_logprobs.cu`).

use tessera_types::{SampledToken, TokenLogprobs};

use crate::cuda::DevicePtr;
use crate::cuda::device::Gpu;
use crate::cuda::memory::{DeviceBuffer, PinnedBuffer};
use crate::error::{KernelError, Result};
use crate::inputs::{Readback, SampleRow};
use crate::sampling::DrawError;

/// Bytes of a `Drawn`.
const DRAWN_BYTES: usize = 16;
/// Most tokens that are told beside one, and words and bytes of a `Logprobs`.
const MAX_TOP: usize = 20;
const LOGPROBS_WORDS: usize = 4 + 2 * MAX_TOP;
const LOGPROBS_BYTES: usize = 4 * LOGPROBS_WORDS;
/// Values of `Drawn::status`.
const DRAWN: u32 = 0;
const INVALID_LOGIT: u32 = 1;
/// Steps whose results may be on their way at once, and one that is read.
const RING: usize = 3;

/// What the step at hand has drawn and scored so far.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Rows, and whether they asked for log probabilities.
    pub(super) rows: Vec<(SampleRow, bool)>,
    pub(super) num_logprobs: usize,
    pub(super) num_scores: usize,
}

/// Names the results of a submitted step until they are read.
#[derive(Debug)]
pub(in crate::cuda) struct Drawn {
    turn: u64,
    pending: Pending,
}

/// Results on the device: draws, their log probabilities, scores; and pinned copies of the last few.
#[derive(Debug)]
pub(super) struct ResultRing {
    device: DeviceBuffer,
    max_rows: usize,
    copies: Vec<PinnedBuffer>,
    /// Number of the next step.
    turn: u64,
}

impl ResultRing {
    pub(super) fn new(gpu: &Gpu, max_rows: usize, max_scores: usize) -> Result<Self> {
        let bytes = max_rows * (DRAWN_BYTES + LOGPROBS_BYTES) + max_scores * LOGPROBS_BYTES;
        let copies = (0..RING).map(|_| gpu.alloc_pinned(bytes)).collect::<Result<_>>()?;
        Ok(Self { device: gpu.alloc(bytes)?, max_rows, copies, turn: 0 })
    }

    pub(super) fn bytes(&self) -> usize {
        self.device.bytes()
    }

    fn logprobs_at(&self, index: usize) -> usize {
        self.max_rows * DRAWN_BYTES + index * LOGPROBS_BYTES
    }

    fn scores_at(&self, index: usize) -> usize {
        self.logprobs_at(self.max_rows + index)
    }

    /// Where draw `index` of the step goes.
    pub(super) fn drawn(&self, index: usize) -> DevicePtr {
        self.device.ptr() + (index * DRAWN_BYTES) as u64
    }

    /// Where the log probabilities `index` of the step's draws go.
    pub(super) fn logprobs(&self, index: usize) -> DevicePtr {
        self.device.ptr() + self.logprobs_at(index) as u64
    }

    /// Where score `index` of the step goes.
    pub(super) fn scores(&self, index: usize) -> DevicePtr {
        self.device.ptr() + self.scores_at(index) as u64
    }

    pub(super) fn submit(&mut self, gpu: &Gpu, pending: Pending) -> Result<Drawn> {
        let turn = self.turn;
        let ranges = [
            0..pending.rows.len() * DRAWN_BYTES,
            self.logprobs_at(0)..self.logprobs_at(pending.num_logprobs),
            self.scores_at(0)..self.scores_at(pending.num_scores),
        ];
        let copy = &mut self.copies[turn as usize % RING];
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            gpu.copy_to_host(self.device.ptr() + range.start as u64, copy, range)?;
        }
        self.turn += 1;
        Ok(Drawn { turn, pending })
    }

    pub(super) fn read(&self, drawn: &Drawn) -> Result<Readback> {
        if self.turn - drawn.turn > RING as u64 {
            let reason = "its results were overwritten by later steps".to_owned();
            return Err(KernelError::Input { field: "ticket", reason });
        }
        let bytes = self.copies[drawn.turn as usize % RING].as_slice();
        let Pending { rows, num_scores, .. } = &drawn.pending;
        let mut num_logprobs = 0;
        let mut tokens = Vec::with_capacity(rows.len());
        for (index, (row, with_logprobs)) in rows.iter().enumerate() {
            let SampleRow { slot, sequence, .. } = *row;
            let [status, token, value, _] = words(bytes, index * DRAWN_BYTES);
            if status != DRAWN {
                let source = match status {
                    INVALID_LOGIT => {
                        DrawError::InvalidLogit { token, value: f32::from_bits(value) }
                    }
                    _ => DrawError::NothingAllowed,
                };
                return Err(KernelError::Draw { slot, source });
            }
            let mut logprobs = None;
            if *with_logprobs {
                logprobs = Some(read_logprobs(bytes, self.logprobs_at(num_logprobs))?);
                num_logprobs += 1;
            }
            tokens.push(SampledToken { slot, sequence, token, logprobs });
        }
        let score = |index| read_logprobs(bytes, self.scores_at(index));
        let scores = (0..*num_scores).map(score).collect::<Result<_>>()?;
        Ok(Readback { tokens, scores })
    }
}

fn words<const COUNT: usize>(bytes: &[u8], at: usize) -> [u32; COUNT] {
    let (words, _) = bytes[at..at + 4 * COUNT].as_chunks();
    std::array::from_fn(|index| u32::from_ne_bytes(words[index]))
}

fn read_logprobs(bytes: &[u8], at: usize) -> Result<TokenLogprobs> {
    let words: [u32; LOGPROBS_WORDS] = words(bytes, at);
    let [status, logprob, num_top, ..] = words;
    if status != 0 {
        return Err(KernelError::Input {
            field: "logits",
            reason: "a row to be scored holds an invalid value".to_owned(),
        });
    }
    let (tokens, values) = words[4..].split_at(MAX_TOP);
    let top = tokens.iter().zip(values).take(num_top as usize);
    let top = top.map(|(token, value)| (*token, f32::from_bits(*value))).collect();
    Ok(TokenLogprobs { logprob: f32::from_bits(logprob), top })
}
