//! What the sampler remembers of a sequence, and the edits of logits that follow from it.

use tessera_types::{SamplingParams, TokenId};

use crate::inputs::SamplerSequence;

/// One row of the sampler's table. Rebuilt from prompt and output whenever a sequence takes the slot, so
/// a moved or preempted sequence goes on as if nothing had happened.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerState {
    params: SamplingParams,
    /// Barred until `min_tokens` tokens of output exist: end-of-sequence and stop tokens.
    ending_tokens: Vec<TokenId>,
    seed: u64,
    /// Distinct tokens of prompt and output with their count in the *output*, sorted by token. Empty
    /// when no penalty is set, as nothing would read it.
    seen: Vec<(TokenId, u32)>,
}

impl SamplerState {
    pub fn new(sequence: &SamplerSequence<'_>) -> Self {
        let params = sequence.params.clone();
        let mut ending_tokens = sequence.eos_token_ids.to_vec();
        ending_tokens.extend(&params.stop_token_ids);
        let mut state = Self { params, ending_tokens, seed: sequence.seed, seen: Vec::new() };
        if state.params.has_penalties() {
            state.seen = sequence.prompt.iter().map(|&token| (token, 0)).collect();
            state.seen.extend(sequence.output.iter().map(|&token| (token, 1)));
            state.seen.sort_unstable();
            state.seen.dedup_by(|next, kept| {
                let is_same = next.0 == kept.0;
                kept.1 += if is_same { next.1 } else { 0 };
                is_same
            });
        }
        state
    }

    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Effective seed of this choice.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Counts a token of output.
    pub fn record(&mut self, token: TokenId) {
        if !self.params.has_penalties() {
            return;
        }
        match self.seen.binary_search_by_key(&token, |&(seen, _)| seen) {
            Ok(at) => self.seen[at].1 += 1,
            Err(at) => self.seen.insert(at, (token, 1)),
        }
    }

    /// Logit bias, penalties and `min_tokens`, in this order, on the logits of the tokens from `first_token`
    /// on. Ids outside of them are passed over.
    pub fn edit(&self, logits: &mut [f32], first_token: TokenId, output_index: u32) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logit_of(logits, first_token, token) {
                *logit += bias;
            }
        }
        self.penalize(logits, first_token);
        if output_index < self.params.min_tokens {
            for &token in &self.ending_tokens {
                if let Some(logit) = logit_of(logits, first_token, token) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// The repetition penalty (Keskar et al. 2019, as in transformers) counts prompt and output, image
    /// placeholders included; presence and frequency (OpenAI) count the output alone.
    fn penalize(&self, logits: &mut [f32], first_token: TokenId) {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } =
            self.params;
        for &(token, count) in &self.seen {
            let Some(logit) = logit_of(logits, first_token, token) else { continue };
            let repeated = match *logit > 0.0 {
                true => *logit / repetition_penalty,
                false => *logit * repetition_penalty,
            };
            let presence = if count > 0 { presence_penalty } else { 0.0 };
            *logit = repeated - frequency_penalty * count as f32 - presence;
        }
    }
}

/// The logit of `token` among those from `first_token` on.
fn logit_of(logits: &mut [f32], first_token: TokenId, token: TokenId) -> Option<&mut f32> {
    logits.get_mut(token.checked_sub(first_token)? as usize)
}
