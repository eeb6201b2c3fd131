//! Drawing one token from one row of logits, on the host. Pure functions, shared by every backend that
//! samples on the host.
//!
//! A row goes through these steps, in vLLM's order (`v1/sample/sampler.py`):
//! 1. log probabilities, from the model's own distribution before any edit ([`mod@logprobs`]);
//! 2. the grammar's mask, logit bias, penalties, `min_tokens` ([`mod@state`]);
//! 3. greedy rows: the highest logit;
//! 4. other rows: temperature, `min_p`, `top_k`, `top_p` ([`mod@filters`]), then the draw ([`mod@draw`]).
//!
//! Invariants
//! - The token is a function of the row, the sequence's state, the seed and the output index: not of
//!   the batch, the shard a logit came from, or the order in which candidates are visited.
//! - Ties go to the lowest token id, everywhere.
//! - Exponentials and logarithms are this module's own arithmetic ([`mod@math`]), so that the bits do
//!   not depend on the machine's C library.
//! - Padded vocabulary ids (`vocab_len` and above) are −∞ before anything reads them.

pub mod draw;
pub mod filters;
pub mod logprobs;
pub mod math;
pub mod state;

use tessera_types::{SamplingParams, TokenId, TokenLogprobs, TokenMask};

pub use draw::Candidate;
pub use state::SamplerState;

/// What a row gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    pub token: TokenId,
    /// Present when the sequence asked for log probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// A row that no token can be drawn from.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum DrawError {
    #[error("the logit of token {token} is {value}")]
    InvalidLogit { token: TokenId, value: f32 },
    #[error("no token may be drawn: mask, bias and min_tokens bar the whole vocabulary")]
    NothingAllowed,
}

/// Draws the token at `output_index` (the number of output tokens before it) from `logits`
/// `[padded vocabulary]`, which are overwritten.
///
/// Ids from `vocab_len` on are padding. `mask` bars every token whose bit is clear or missing. The
/// caller hands the token to [`SamplerState::record`] once it counts as output.
pub fn process_row(
    logits: &mut [f32],
    state: &SamplerState,
    mask: Option<&TokenMask>,
    output_index: u32,
    vocab_len: usize,
) -> Result<Draw, DrawError> {
    let vocab_len = vocab_len.min(logits.len());
    let logits = &mut logits[..vocab_len];
    if is_separable(state.params()) {
        let best = shard_candidate(logits, 0, state, mask, output_index)?;
        let token = best.ok_or(DrawError::NothingAllowed)?.token;
        return Ok(Draw { token, logprobs: None });
    }
    refuse_invalid(logits, 0)?;
    let params = state.params();
    let raw = params.logprobs.map(|top| logprobs::RawLogprobs::of(logits, top as usize));
    if let Some(mask) = mask {
        filters::apply_mask(logits, 0, mask);
    }
    state.edit(logits, 0, output_index);
    let greedy = draw::argmax(logits).ok_or(DrawError::NothingAllowed)?;
    let token = if params.is_greedy() {
        greedy
    } else {
        filters::apply_temperature(logits, params.temperature);
        filters::apply_min_p(logits, params.min_p);
        filters::apply_top_k(logits, params.top_k as usize);
        filters::apply_top_p(logits, params.top_p);
        let key = draw::DrawKey { seed: state.seed(), output_index };
        draw::gumbel_argmax(logits, 0, key).ok_or(DrawError::NothingAllowed)?.token
    };
    Ok(Draw { token, logprobs: raw.map(|raw| raw.of_token(token)) })
}

/// Whether a token's chance to win depends on its own logit alone, so that parts of the vocabulary may be
/// searched apart: no log probabilities, and no filter that looks at the whole row.
pub fn is_separable(params: &SamplingParams) -> bool {
    let is_filtered = params.min_p > 0.0 || params.top_k > 0 || params.top_p < 1.0;
    params.logprobs.is_none() && (params.is_greedy() || !is_filtered)
}

/// The winner among the tokens from `first_token` on, of a row that [`is_separable`]; `None` when none of
/// them is allowed. The winner of the row is that of the shards' winners which [`Candidate::beats`] all others.
/// `logits` are overwritten.
pub fn shard_candidate(
    logits: &mut [f32],
    first_token: TokenId,
    state: &SamplerState,
    mask: Option<&TokenMask>,
    output_index: u32,
) -> Result<Option<Candidate>, DrawError> {
    refuse_invalid(logits, first_token)?;
    if let Some(mask) = mask {
        filters::apply_mask(logits, first_token, mask);
    }
    state.edit(logits, first_token, output_index);
    let params = state.params();
    if params.is_greedy() {
        let best = draw::argmax(logits);
        return Ok(best.map(|at| Candidate {
            token: first_token + at,
            score: f64::from(logits[at as usize]),
        }));
    }
    filters::apply_temperature(logits, params.temperature);
    let key = draw::DrawKey { seed: state.seed(), output_index };
    Ok(draw::gumbel_argmax(logits, first_token, key))
}

/// NaN and +∞ come from broken weights or a half-reduced buffer; they must not become a plausible token.
fn refuse_invalid(logits: &[f32], first_token: TokenId) -> Result<(), DrawError> {
    // One pass that vectorises; the position is looked for only when there is something to report.
    let is_valid = |value: f32| value < f32::INFINITY;
    if logits.iter().fold(true, |all, &value| all & is_valid(value)) {
        return Ok(());
    }
    let at = logits.iter().position(|&value| !is_valid(value)).expect("one was seen");
    Err(DrawError::InvalidLogit { token: first_token + at as TokenId, value: logits[at] })
}

#[cfg(test)]
mod tests;
