//! One sequence: what was asked, how far it is, and when it stops.

use std::cmp::Reverse;
use std::sync::Arc;

use tessera_types::{
    BlockId, BlockKey, FinishReason, Prompt, SamplingParams, SequenceId, StepId, TenantId, TokenId,
};

use crate::config::SchedulerConfig;
use crate::error::AddError;
use crate::tenants::AccountId;

/// A sequence as it is handed to the scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceRequest {
    pub sequence: SequenceId,
    pub prompt: Arc<Prompt>,
    /// Output of earlier attempts: forced, counted, never reported.
    pub output: Vec<TokenId>,
    pub sampling: Arc<SamplingParams>,
    /// Tokens that end the sequence unless `ignore_eos`.
    pub eos_token_ids: Arc<[TokenId]>,
    /// Effective seed of this choice.
    pub seed: u64,
    /// Higher goes first.
    pub priority: i32,
    /// Tenants of equal priority share the budget fairly.
    pub tenant: TenantId,
    /// Among equal priorities the lower goes first. Any clock will do, as long as all requests of a
    /// scheduler use the same one; a moved request keeps its arrival.
    pub arrival: u64,
    /// Keys of the prompt's full blocks from the first on (ENGINE §4); empty: no prefix caching.
    pub block_keys: Vec<BlockKey>,
    /// May take the reserved blocks and slot: the canary.
    pub use_reserve: bool,
}

/// Priority and seniority; reversed the order of preemption. A sequence keeps its place when it comes
/// back, so it can only be preempted by those that were admitted before it, or go before it.
pub(crate) type OrderKey = (Reverse<i32>, u64);

/// What is known about the embedding of one media span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MediaState {
    /// Nobody was asked for it: a prefix hit covers it, as far as is known.
    Covered,
    Needed,
    /// Another sequence was asked for the same one, which has not arrived.
    Deferred,
    Arrived,
}

/// Where a sequence with a slot stands. (Without one it waits.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Running,
    /// Back to the queue once no step in flight names it.
    Preempting,
    /// Gone once no step in flight names it.
    Ending,
}

/// A sequence inside the scheduler.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub request: SequenceRequest,
    pub stage: Stage,
    /// Output so far, forced output included.
    pub output: Vec<TokenId>,
    /// Tokens being drawn by steps in flight.
    pub num_pending: usize,
    /// Tokens in the KV cache once all scheduled steps have run.
    pub num_computed: usize,
    pub blocks: Vec<BlockId>,
    /// Leading blocks that are in the prefix cache, or may not enter it.
    pub num_registered_blocks: usize,
    /// One per span of the prompt.
    pub media: Vec<MediaState>,
    /// Last step that names the sequence.
    pub last_step: StepId,
    /// Not admitted while set.
    pub held: bool,
    /// Cannot be admitted until something happens to it.
    pub parked: bool,
    /// Its tenant's account.
    pub account: AccountId,
    /// Number of sequences admitted before it; set at its first admission.
    pub seniority: Option<u64>,
    /// Leading prompt tokens whose log probability was reported or does not exist (the first has none).
    pub num_reported_logprobs: usize,
    /// Prompt tokens found in the prefix cache at the first admission.
    pub num_cached_tokens: Option<usize>,
    /// Output tokens at which the sequence ends with `Length`.
    output_limit: usize,
}

impl Sequence {
    /// Checks a request against the limits. `num_blocks`: those an ordinary sequence may take.
    pub fn new(
        mut request: SequenceRequest,
        config: &SchedulerConfig,
        num_blocks: usize,
    ) -> Result<Self, AddError> {
        request.prompt.validate()?;
        request.sampling.validate()?;
        let prompt_tokens = request.prompt.tokens.len();
        let max_tokens = request.sampling.max_tokens;
        let max_model_len = config.max_model_len;
        let longest = prompt_tokens.saturating_add(max_tokens as usize);
        if longest > max_model_len as usize {
            return Err(AddError::ContextExceeded { prompt_tokens, max_tokens, max_model_len });
        }
        let output_tokens = request.output.len();
        if output_tokens > max_tokens as usize {
            return Err(AddError::OutputBeyondLimit { output_tokens, max_tokens });
        }
        // The last token is drawn but never computed, so it needs no place.
        let blocks = config.blocks_for(longest - 1);
        let available =
            if request.use_reserve { config.reserved_blocks as usize } else { num_blocks };
        if blocks > available {
            return Err(AddError::NeverFits { blocks, available });
        }
        Ok(Self {
            stage: Stage::Running,
            output: std::mem::take(&mut request.output),
            num_pending: 0,
            num_computed: 0,
            blocks: Vec::new(),
            num_registered_blocks: 0,
            media: vec![MediaState::Covered; request.prompt.media.len()],
            last_step: StepId(0),
            held: false,
            parked: false,
            account: 0,
            seniority: None,
            num_reported_logprobs: 1,
            num_cached_tokens: None,
            output_limit: max_tokens as usize,
            request,
        })
    }

    pub fn id(&self) -> SequenceId {
        self.request.sequence
    }

    pub fn order(&self) -> OrderKey {
        (Reverse(self.request.priority), self.seniority.unwrap_or(u64::MAX))
    }

    /// Tokens whose ids are known: prompt and output.
    pub fn len(&self) -> usize {
        self.request.prompt.tokens.len() + self.output.len()
    }

    /// Tokens that will be known once all steps in flight have run.
    pub fn num_wanted(&self) -> usize {
        self.len() + self.num_pending
    }

    /// Tokens that could be computed now: up to the last known one, or up to the first media span
    /// whose embedding is missing.
    pub fn gap(&self) -> usize {
        self.gap_from(self.num_computed)
    }

    /// [`Sequence::gap`], were `num_computed` tokens computed.
    pub fn gap_from(&self, num_computed: usize) -> usize {
        if self.output.len() + self.num_pending >= self.output_limit {
            return 0;
        }
        let end = self.media_gate(num_computed).unwrap_or(usize::MAX).min(self.num_wanted());
        end.saturating_sub(num_computed)
    }

    /// First row that must be computed for the log probability of a prompt token; `usize::MAX`: none.
    pub fn first_unreported_row(&self) -> usize {
        let wanted = self.request.sampling.prompt_logprobs.is_some();
        let missing = wanted && self.num_reported_logprobs < self.request.prompt.tokens.len();
        // The row of a token yields the distribution of the one after it.
        if missing { self.num_reported_logprobs - 1 } else { usize::MAX }
    }

    /// First token from `num_computed` on that needs a missing embedding.
    fn media_gate(&self, num_computed: usize) -> Option<usize> {
        let spans = &self.request.prompt.media;
        if spans.last().is_none_or(|last| last.end() as usize <= num_computed) {
            return None;
        }
        let spans = spans.iter().zip(&self.media);
        let mut missing = spans.filter(|(span, state)| {
            **state != MediaState::Arrived && span.end() as usize > num_computed
        });
        missing.next().map(|(span, _)| (span.offset as usize).max(num_computed))
    }

    /// Why the sequence ends with its output token `index`, if it does.
    pub fn stop_reason(&self, index: usize) -> Option<FinishReason> {
        let sampling = &self.request.sampling;
        let token = self.output[index];
        if index >= sampling.min_tokens as usize {
            if !sampling.ignore_eos && self.request.eos_token_ids.contains(&token) {
                return Some(FinishReason::EndOfSequence);
            }
            if sampling.stop_token_ids.contains(&token) {
                return Some(FinishReason::StopToken);
            }
        }
        (index + 1 >= self.output_limit).then_some(FinishReason::Length)
    }

    /// Why the sequence ends with output that exists already.
    pub fn forced_stop_reason(&self) -> Option<FinishReason> {
        (0..self.output.len()).find_map(|index| self.stop_reason(index))
    }

    /// Back to the state of one that waits, output kept.
    pub fn forget_computed(&mut self) {
        self.stage = Stage::Running;
        self.num_computed = 0;
        self.num_registered_blocks = 0;
        self.blocks.clear();
    }
}

#[cfg(test)]
mod tests {
    use tessera_types::{EmbeddingKey, GridThw, MediaKind, MediaSpan, PositionSpan};

    use super::*;

    fn media(item: u32, offset: u32, num_tokens: u32) -> MediaSpan {
        MediaSpan {
            item,
            kind: MediaKind::Image,
            offset,
            num_tokens,
            grid: GridThw { t: 1, h: 2, w: 2 * num_tokens },
            seconds_per_grid: 0.0,
            embedding_key: EmbeddingKey::default(),
        }
    }

    fn sequence(edit: impl FnOnce(&mut SamplingParams), output: Vec<TokenId>) -> Sequence {
        let mut sampling = SamplingParams { max_tokens: 8, ..SamplingParams::default() };
        edit(&mut sampling);
        let request = SequenceRequest {
            sequence: SequenceId(1),
            prompt: Arc::new(Prompt {
                tokens: vec![9; 20],
                media: vec![media(0, 4, 4), media(1, 10, 6)],
                positions: vec![PositionSpan::Text { len: 20 }],
            }),
            output,
            sampling: Arc::new(sampling),
            eos_token_ids: Arc::from([1]),
            seed: 0,
            priority: 0,
            tenant: TenantId::default(),
            arrival: 0,
            block_keys: Vec::new(),
            use_reserve: false,
        };
        Sequence::new(request, &SchedulerConfig::default(), 100).expect("a valid request")
    }

    #[test]
    fn stop_conditions_hold_for_forced_output_too() {
        let reason = |edit: fn(&mut SamplingParams), output: &[TokenId]| {
            sequence(edit, output.to_vec()).forced_stop_reason()
        };
        assert_eq!(reason(|_| (), &[5, 6]), None);
        assert_eq!(reason(|_| (), &[5, 1]), Some(FinishReason::EndOfSequence));
        assert_eq!(reason(|s| s.ignore_eos = true, &[5, 1]), None);
        assert_eq!(reason(|s| s.min_tokens = 2, &[5, 1]), None);
        assert_eq!(reason(|s| s.min_tokens = 1, &[5, 1]), Some(FinishReason::EndOfSequence));
        assert_eq!(reason(|s| s.stop_token_ids = vec![6], &[5, 6]), Some(FinishReason::StopToken));
        assert_eq!(reason(|s| s.max_tokens = 2, &[5, 6]), Some(FinishReason::Length));
        assert_eq!(reason(|s| s.max_tokens = 3, &[5, 6]), None);
    }

    #[test]
    fn a_missing_embedding_stops_at_its_span() {
        let mut sequence = sequence(|_| (), vec![]);
        assert_eq!(sequence.gap(), 4);
        sequence.media[1] = MediaState::Arrived;
        assert_eq!(sequence.gap(), 4, "a later embedding does not help");
        sequence.media[0] = MediaState::Arrived;
        assert_eq!(sequence.gap(), 20);
        sequence.media[1] = MediaState::Needed;
        assert_eq!(sequence.gap(), 10);
        assert_eq!(
            sequence.gap_from(12),
            0,
            "a hit may end inside a span, the rest still needs it"
        );
        assert_eq!(sequence.gap_from(16), 4);
    }
}
