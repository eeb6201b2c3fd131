//! Sampling parameters of one request and the ranges they must lie in. `Default` is plain greedy; the
//! server merges the checkpoint's `generation_config.json` before it fills the rest.

use serde::{Deserialize, Serialize};

use crate::grammar::Grammar;
use crate::ids::TokenId;

/// Most log probabilities that may be asked for per token (OpenAI's limit).
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// Most stop token ids per request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Most entries of a logit bias.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// At or below this temperature the draw is greedy, as dividing by it would overflow f32.
pub const GREEDY_TEMPERATURE: f32 = 1e-5;

/// How tokens of one sequence are drawn. Valid by construction once [`SamplingParams::validate`] passed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 (or up to [`GREEDY_TEMPERATURE`]) is greedy; at most 2.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; in (0, 1].
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens less likely than this share of the most likely one; in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; in (0, 2].
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the output; in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to logits before the filters; each in [-100, 100]. Sorted by token.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Tokens to generate at most; at least 1.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens cannot be drawn before this many output tokens.
    pub min_tokens: u32,
    /// Tokens that end the sequence, beside the checkpoint's end-of-sequence tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on past the checkpoint's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// `None`: no log probabilities; `Some(n)`: of the drawn token and the n most likely.
    pub logprobs: Option<u32>,
    /// The same for every prompt token but the first. Such a prompt is computed in full: no prefix hit.
    pub prompt_logprobs: Option<u32>,
    /// What the output is constrained to.
    pub grammar: Option<Grammar>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
        }
    }
}

/// A sampling value outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("{field} must be {range}, got {value}")]
    OutOfRange { field: &'static str, range: &'static str, value: f64 },
    #[error("{field} takes at most {limit} entries, got {got}")]
    TooMany { field: &'static str, limit: usize, got: usize },
    #[error("{field} takes at most {limit} bytes, got {got}")]
    TooLong { field: &'static str, limit: usize, got: usize },
    #[error("{field} must not be empty")]
    Empty { field: &'static str },
    #[error("min_tokens {min_tokens} is larger than max_tokens {max_tokens}")]
    MinAboveMax { min_tokens: u32, max_tokens: u32 },
}

impl SamplingError {
    /// The request field at fault, for typed error details.
    pub fn field(&self) -> &'static str {
        match self {
            Self::OutOfRange { field, .. }
            | Self::TooMany { field, .. }
            | Self::TooLong { field, .. }
            | Self::Empty { field } => field,
            Self::MinAboveMax { .. } => "min_tokens",
        }
    }
}

impl SamplingParams {
    /// Whether the highest logit wins.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= GREEDY_TEMPERATURE
    }

    /// Whether logits change by what stands in prompt or output.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Checks every range; NaN is outside of all of them.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |ok: bool, field, range, value: f32| match ok {
            true => Ok(()),
            false => Err(SamplingError::OutOfRange { field, range, value: f64::from(value) }),
        };
        let within = |value: f32, low: f32, high: f32| value >= low && value <= high;
        check(within(self.temperature, 0.0, 2.0), "temperature", "in [0, 2]", self.temperature)?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)?;
        check(within(self.min_p, 0.0, 1.0), "min_p", "in [0, 1]", self.min_p)?;
        let penalty = self.repetition_penalty;
        check(penalty > 0.0 && penalty <= 2.0, "repetition_penalty", "in (0, 2]", penalty)?;
        let presence = self.presence_penalty;
        check(within(presence, -2.0, 2.0), "presence_penalty", "in [-2, 2]", presence)?;
        let frequency = self.frequency_penalty;
        check(within(frequency, -2.0, 2.0), "frequency_penalty", "in [-2, 2]", frequency)?;
        for &(_, bias) in &self.logit_bias {
            check(within(bias, -100.0, 100.0), "logit_bias", "in [-100, 100]", bias)?;
        }
        check(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens as f32)?;
        let top = self.logprobs.unwrap_or(0);
        check(top <= MAX_TOP_LOGPROBS, "top_logprobs", "in [0, 20]", top as f32)?;
        let top = self.prompt_logprobs.unwrap_or(0);
        check(top <= MAX_TOP_LOGPROBS, "prompt_logprobs", "in [0, 20]", top as f32)?;
        if let Some(grammar) = &self.grammar {
            grammar.validate()?;
        }
        if self.stop_token_ids.len() > MAX_STOP_TOKENS {
            let (limit, got) = (MAX_STOP_TOKENS, self.stop_token_ids.len());
            return Err(SamplingError::TooMany { field: "stop_token_ids", limit, got });
        }
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            let (limit, got) = (MAX_LOGIT_BIAS, self.logit_bias.len());
            return Err(SamplingError::TooMany { field: "logit_bias", limit, got });
        }
        if self.min_tokens > self.max_tokens {
            let (min_tokens, max_tokens) = (self.min_tokens, self.max_tokens);
            return Err(SamplingError::MinAboveMax { min_tokens, max_tokens });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_out_of_range_values_are_refused_by_field() {
        type Edit = fn(&mut SamplingParams);
        let cases: [(&str, Edit); 13] = [
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = f32::NAN),
            ("min_p", |p| p.min_p = 1.5),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("presence_penalty", |p| p.presence_penalty = f32::NAN),
            ("frequency_penalty", |p| p.frequency_penalty = 2.5),
            ("logit_bias", |p| p.logit_bias = vec![(1, f32::NAN)]),
            ("max_tokens", |p| p.max_tokens = 0),
            ("top_logprobs", |p| p.logprobs = Some(21)),
            ("prompt_logprobs", |p| p.prompt_logprobs = Some(21)),
        ];
        for (field, edit) in cases {
            let mut params = SamplingParams::default();
            edit(&mut params);
            let error = params.validate().expect_err(field);
            assert_eq!(error.field(), field, "{error}");
        }
        assert_eq!(SamplingParams::default().validate(), Ok(()));
    }
}
