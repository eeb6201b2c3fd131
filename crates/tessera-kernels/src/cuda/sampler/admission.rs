//! Sequences on their way into the table (`Admission` in `cuda/sampler.cu`).

use tessera_types::{SamplingParams, TokenId};

use super::{MAX_BIAS, PARAM_WORDS};
use crate::cuda::DevicePtr;
use crate::cuda::device::Gpu;
use crate::cuda::memory::DeviceBuffer;
use crate::cuda::staging::StagingRing;
use crate::error::{KernelError, Result};
use crate::inputs::SamplerSequence;
use crate::sampling::math::ln;

/// Words before the parameters.
const HEAD_WORDS: usize = 8;
/// Ids of prompt and output in one upload.
const PART_TOKENS: usize = 1 << 15;
/// Most distinct tokens that end a sequence.
const MAX_ENDING: usize = 1024;
const PART_WORDS: usize = HEAD_WORDS + PARAM_WORDS + PART_TOKENS + 2 * MAX_BIAS + MAX_ENDING;
/// Uploads that may be on their way at once.
const RING: usize = 4;
/// Bits of `Admission::part`.
const FIRST_PART: u32 = 1;
const LAST_PART: u32 = 2;

/// Bits of `SlotParams::flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotFlags(u32);

impl SlotFlags {
    const GREEDY: Self = Self(1);
    /// Logits change by the token: penalties, bias, `min_tokens`.
    const EDITED: Self = Self(2);
    const PENALIZED: Self = Self(4);
    /// The draw is cut by `min_p`, `top_k` or `top_p`.
    pub(super) const FILTERED: Self = Self(8);
    const HAS_MIN_P: Self = Self(16);

    pub(super) fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    fn of(params: &SamplingParams, num_ending: usize) -> Self {
        let is_edited = params.has_penalties() || !params.logit_bias.is_empty() || num_ending > 0;
        let is_filtered = params.min_p > 0.0 || params.top_k > 0 || params.top_p < 1.0;
        let flags = [
            (Self::GREEDY, params.is_greedy()),
            (Self::EDITED, is_edited),
            (Self::PENALIZED, params.has_penalties()),
            (Self::FILTERED, is_filtered && !params.is_greedy()),
            (Self::HAS_MIN_P, params.min_p > 0.0),
        ];
        Self(flags.iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag.0).sum())
    }
}

/// What the device keeps of a sequence; ids are real tokens.
struct Lists {
    flags: SlotFlags,
    params: [u32; PARAM_WORDS],
    /// Prompt ids, then output ids.
    tokens: Vec<TokenId>,
    num_prompt: usize,
    bias: Vec<(TokenId, f32)>,
    ending: Vec<TokenId>,
}

impl Lists {
    fn of(sequence: &SamplerSequence<'_>, vocab: usize) -> Result<Self> {
        let params = sequence.params;
        let is_real = |token: &TokenId| (*token as usize) < vocab;
        let real = |tokens: &[TokenId]| tokens.iter().copied().filter(is_real).collect::<Vec<_>>();
        let mut ending = Vec::new();
        if params.min_tokens > 0 {
            ending = real(sequence.eos_token_ids);
            ending.extend(params.stop_token_ids.iter().copied().filter(is_real));
            ending.sort_unstable();
            ending.dedup();
        }
        let mut bias = params.logit_bias.clone();
        bias.retain(|(token, _)| is_real(token));
        // Stable: entries of one token are added in their order.
        bias.sort_by_key(|(token, _)| *token);
        for (field, found, limit) in
            [("logit_bias", bias.len(), MAX_BIAS), ("stop_token_ids", ending.len(), MAX_ENDING)]
        {
            if found > limit {
                let reason = format!("{found} entries, of which the device keeps {limit}");
                return Err(KernelError::Input { field, reason });
            }
        }
        let mut tokens = Vec::new();
        if params.has_penalties() {
            tokens = real(sequence.prompt);
        }
        let num_prompt = tokens.len();
        if params.has_penalties() {
            tokens.extend(sequence.output.iter().copied().filter(is_real));
        }
        let flags = SlotFlags::of(params, ending.len());
        let ln_min_p = if params.min_p > 0.0 { ln(f64::from(params.min_p)) as f32 } else { 0.0 };
        let words = [
            params.temperature.to_bits(),
            ln_min_p.to_bits(),
            params.top_k,
            params.top_p.to_bits(),
            params.repetition_penalty.to_bits(),
            params.presence_penalty.to_bits(),
            params.frequency_penalty.to_bits(),
            params.min_tokens,
            sequence.seed as u32,
            (sequence.seed >> 32) as u32,
            flags.0,
            bias.len() as u32,
        ];
        let mut params = [0; PARAM_WORDS];
        params[..words.len()].copy_from_slice(&words);
        Ok(Self { flags, params, tokens, num_prompt, bias, ending })
    }
}

/// The way up: pinned buffers, and where the device reads them.
#[derive(Debug)]
pub(super) struct Admissions {
    area: DeviceBuffer,
    ring: StagingRing,
}

impl Admissions {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        let bytes = PART_WORDS * 4;
        Ok(Self { area: gpu.alloc(bytes)?, ring: StagingRing::new(gpu, RING, bytes)? })
    }

    /// Enqueues what makes `sequence` a row of the table at `table`. A long history goes in parts.
    ///
    /// # Errors
    /// An empty sequence, lists beyond the table's room; what the device reports.
    pub(super) fn send(
        &mut self,
        gpu: &Gpu,
        table: DevicePtr,
        sequence: &SamplerSequence<'_>,
        vocab: usize,
    ) -> Result<SlotFlags> {
        let last = sequence.output.last().or(sequence.prompt.last());
        let last = *last.ok_or_else(|| KernelError::Input {
            field: "prompt",
            reason: format!("the sequence of slot {} is empty", sequence.slot),
        })?;
        let lists = Lists::of(sequence, vocab)?;
        let mut begin = 0;
        loop {
            let end = lists.tokens.len().min(begin + PART_TOKENS);
            let is_last = end == lists.tokens.len();
            let part = FIRST_PART * u32::from(begin == 0) + LAST_PART * u32::from(is_last);
            let num_prompt = lists.num_prompt.clamp(begin, end) - begin;
            let (bias, ending) =
                if is_last { (&lists.bias[..], &lists.ending[..]) } else { (&[][..], &[][..]) };
            let head = [
                sequence.slot.0,
                part,
                last,
                num_prompt as u32,
                (end - begin - num_prompt) as u32,
                bias.len() as u32,
                ending.len() as u32,
                0,
            ];
            self.ring.send(gpu, self.area.ptr(), |bytes| {
                let pairs = bias.iter().flat_map(|(token, value)| [*token, value.to_bits()]);
                let words = head.into_iter().chain(lists.params);
                let words = words.chain(lists.tokens[begin..end].iter().copied());
                let words = words.chain(pairs).chain(ending.iter().copied());
                let (places, _) = bytes.as_chunks_mut();
                let filled = places.iter_mut().zip(words);
                4 * filled.map(|(place, word)| *place = word.to_ne_bytes()).count()
            })?;
            let launch = gpu.launch("sampler_admit").block([1024, 1, 1]);
            launch.ptr(table).ptr(self.area.ptr()).go()?;
            if is_last {
                return Ok(lists.flags);
            }
            begin = end;
        }
    }
}
