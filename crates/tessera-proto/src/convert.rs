//! Conversions between generated messages and the shared types.

use bytes::Bytes;
use prost::bytes;
use tessera_types::{
    FinishReason, Grammar, GridThw, Hash256, MediaKind, MediaSpan, PositionSpan, Prompt,
    PromptError, SamplingError, SamplingParams, TokenLogprobs,
};

use crate::common::v1 as common;
use crate::decoder::v1 as decoder;

/// A message that does not describe a valid value.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConvertError {
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field} must be a hash of 32 bytes, got {length}")]
    Hash { field: &'static str, length: usize },
    #[error("{field} has the unknown value {value}")]
    Enum { field: &'static str, value: i32 },
    #[error(transparent)]
    Prompt(#[from] PromptError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        let field = match &error {
            ConvertError::Missing { field }
            | ConvertError::Hash { field, .. }
            | ConvertError::Enum { field, .. } => field,
            ConvertError::Prompt(_) => "prompt",
            ConvertError::Sampling(source) => source.field(),
        };
        crate::ErrorReason::InvalidArgument.status(error.to_string()).field(field).into()
    }
}

/// Reads a 32-byte hash field.
pub fn hash_from_bytes(bytes: &[u8], field: &'static str) -> Result<Hash256, ConvertError> {
    Hash256::from_slice(bytes).ok_or(ConvertError::Hash { field, length: bytes.len() })
}

/// A hash as a bytes field.
pub fn hash_bytes(hash: &Hash256) -> Bytes {
    Bytes::copy_from_slice(hash.as_bytes())
}

/// Takes a message field that must be set.
pub(crate) fn required<T>(value: Option<T>, field: &'static str) -> Result<T, ConvertError> {
    value.ok_or(ConvertError::Missing { field })
}

impl From<FinishReason> for common::FinishReason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::EndOfSequence => Self::EndOfSequence,
            FinishReason::StopToken => Self::StopToken,
            FinishReason::StopString => Self::StopString,
            FinishReason::Length => Self::Length,
            FinishReason::ToolCalls => Self::ToolCalls,
            FinishReason::Cancelled => Self::Cancelled,
            FinishReason::DeadlineExceeded => Self::DeadlineExceeded,
        }
    }
}

impl TryFrom<common::FinishReason> for FinishReason {
    type Error = ConvertError;

    fn try_from(reason: common::FinishReason) -> Result<Self, ConvertError> {
        Ok(match reason {
            common::FinishReason::Unspecified => {
                return Err(ConvertError::Enum { field: "finish_reason", value: 0 });
            }
            common::FinishReason::EndOfSequence => Self::EndOfSequence,
            common::FinishReason::StopToken => Self::StopToken,
            common::FinishReason::StopString => Self::StopString,
            common::FinishReason::Length => Self::Length,
            common::FinishReason::ToolCalls => Self::ToolCalls,
            common::FinishReason::Cancelled => Self::Cancelled,
            common::FinishReason::DeadlineExceeded => Self::DeadlineExceeded,
        })
    }
}

impl From<MediaKind> for common::MediaKind {
    fn from(kind: MediaKind) -> Self {
        match kind {
            MediaKind::Image => Self::Image,
            MediaKind::Video => Self::Video,
        }
    }
}

impl TryFrom<common::MediaKind> for MediaKind {
    type Error = ConvertError;

    fn try_from(kind: common::MediaKind) -> Result<Self, ConvertError> {
        match kind {
            common::MediaKind::Image => Ok(Self::Image),
            common::MediaKind::Video => Ok(Self::Video),
            common::MediaKind::Unspecified => {
                Err(ConvertError::Enum { field: "media kind", value: 0 })
            }
        }
    }
}

impl From<GridThw> for common::GridThw {
    fn from(GridThw { t, h, w }: GridThw) -> Self {
        Self { t, h, w }
    }
}

impl From<common::GridThw> for GridThw {
    fn from(common::GridThw { t, h, w }: common::GridThw) -> Self {
        Self { t, h, w }
    }
}

impl From<&TokenLogprobs> for common::PositionLogprobs {
    fn from(logprobs: &TokenLogprobs) -> Self {
        let top = logprobs.top.iter();
        Self {
            logprob: logprobs.logprob,
            top: top
                .map(|&(token_id, logprob)| common::TokenLogprob { token_id, logprob })
                .collect(),
        }
    }
}

impl From<&common::PositionLogprobs> for TokenLogprobs {
    fn from(logprobs: &common::PositionLogprobs) -> Self {
        let top = logprobs.top.iter().map(|entry| (entry.token_id, entry.logprob)).collect();
        Self { logprob: logprobs.logprob, top }
    }
}

impl From<&SamplingParams> for decoder::Sampling {
    fn from(params: &SamplingParams) -> Self {
        let bias = params.logit_bias.iter();
        Self {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: bias
                .map(|&(token_id, bias)| decoder::LogitBias { token_id, bias })
                .collect(),
            max_tokens: params.max_tokens,
            min_tokens: params.min_tokens,
            stop_token_ids: params.stop_token_ids.clone(),
            ignore_eos: params.ignore_eos,
            logprobs: params.logprobs,
            prompt_logprobs: params.prompt_logprobs,
            grammar: params.grammar.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<&decoder::Sampling> for SamplingParams {
    type Error = ConvertError;

    fn try_from(sampling: &decoder::Sampling) -> Result<Self, ConvertError> {
        let params = Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(|b| (b.token_id, b.bias)).collect(),
            max_tokens: sampling.max_tokens,
            min_tokens: sampling.min_tokens,
            stop_token_ids: sampling.stop_token_ids.clone(),
            ignore_eos: sampling.ignore_eos,
            logprobs: sampling.logprobs,
            prompt_logprobs: sampling.prompt_logprobs,
            grammar: sampling.grammar.as_ref().map(TryInto::try_into).transpose()?,
        };
        params.validate()?;
        Ok(params)
    }
}

impl From<&Grammar> for common::Grammar {
    fn from(grammar: &Grammar) -> Self {
        use common::grammar::{Choice, Grammar as Wire};
        let wire = match grammar.clone() {
            Grammar::JsonSchema(schema) => Wire::JsonSchema(schema),
            Grammar::Regex(regex) => Wire::Regex(regex),
            Grammar::Choice(texts) => Wire::Choice(Choice { texts }),
            Grammar::Lark(lark) => Wire::Lark(lark),
        };
        Self { grammar: Some(wire) }
    }
}

impl TryFrom<&common::Grammar> for Grammar {
    type Error = ConvertError;

    fn try_from(grammar: &common::Grammar) -> Result<Self, ConvertError> {
        use common::grammar::Grammar as Wire;
        Ok(match required(grammar.grammar.clone(), "grammar")? {
            Wire::JsonSchema(schema) => Self::JsonSchema(schema),
            Wire::Regex(regex) => Self::Regex(regex),
            Wire::Choice(choice) => Self::Choice(choice.texts),
            Wire::Lark(lark) => Self::Lark(lark),
        })
    }
}

impl From<&Prompt> for decoder::Prompt {
    fn from(prompt: &Prompt) -> Self {
        Self {
            token_ids: prompt.tokens.clone(),
            media: prompt.media.iter().map(media_span).collect(),
            positions: prompt.positions.iter().map(position_span).collect(),
        }
    }
}

fn media_span(span: &MediaSpan) -> decoder::MediaSpan {
    decoder::MediaSpan {
        item: span.item,
        kind: common::MediaKind::from(span.kind).into(),
        offset: span.offset,
        num_tokens: span.num_tokens,
        grid: Some(span.grid.into()),
        seconds_per_grid: span.seconds_per_grid,
        embedding_key: hash_bytes(&span.embedding_key.0),
    }
}

fn position_span(span: &PositionSpan) -> decoder::PositionSpan {
    use decoder::position_span::Span;
    let span = match *span {
        PositionSpan::Text { len } => Span::TextLen(len),
        PositionSpan::Grid { t, h, w, step } => Span::Grid(decoder::PositionGrid { t, h, w, step }),
    };
    decoder::PositionSpan { span: Some(span) }
}

impl TryFrom<&decoder::Prompt> for Prompt {
    type Error = ConvertError;

    fn try_from(prompt: &decoder::Prompt) -> Result<Self, ConvertError> {
        let media = prompt.media.iter().map(media_span_from).collect::<Result<_, _>>()?;
        let positions =
            prompt.positions.iter().map(position_span_from).collect::<Result<_, _>>()?;
        let prompt = Self { tokens: prompt.token_ids.clone(), media, positions };
        prompt.validate()?;
        Ok(prompt)
    }
}

fn media_span_from(span: &decoder::MediaSpan) -> Result<MediaSpan, ConvertError> {
    let key = hash_from_bytes(&span.embedding_key, "embedding_key")?;
    Ok(MediaSpan {
        item: span.item,
        kind: span.kind().try_into()?,
        offset: span.offset,
        num_tokens: span.num_tokens,
        grid: required(span.grid, "grid")?.into(),
        seconds_per_grid: span.seconds_per_grid,
        embedding_key: tessera_types::EmbeddingKey(key),
    })
}

fn position_span_from(span: &decoder::PositionSpan) -> Result<PositionSpan, ConvertError> {
    use decoder::position_span::Span;
    Ok(match required(span.span, "position span")? {
        Span::TextLen(len) => PositionSpan::Text { len },
        Span::Grid(decoder::PositionGrid { t, h, w, step }) => PositionSpan::Grid { t, h, w, step },
    })
}
