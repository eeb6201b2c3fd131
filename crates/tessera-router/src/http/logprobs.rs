//! Log probabilities in JSON: of the output as OpenAI writes them, of the prompt as vLLM does.

use serde::{Serialize, Serializer};
use tessera_types::{TokenId, TokenLogprobs};

use crate::events::OutputToken;

/// Gives the bytes of a token; empty for ids without text.
pub(crate) type TokenBytes<'a> = &'a dyn Fn(TokenId) -> Vec<u8>;

/// Log probability of a missing number: JSON has no infinity.
const LOWEST_LOGPROB: f32 = -9999.0;

#[derive(Serialize)]
struct TopLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// One entry of `logprobs.content`.
#[derive(Serialize)]
struct TokenEntry {
    #[serde(flatten)]
    token: TopLogprob,
    top_logprobs: Vec<TopLogprob>,
}

/// `logprobs` of a choice.
#[derive(Serialize)]
pub(super) struct ChoiceLogprobs {
    content: Vec<TokenEntry>,
    refusal: Option<()>,
}

fn top_logprob(id: TokenId, logprob: f32, bytes_of: TokenBytes<'_>) -> TopLogprob {
    let bytes = bytes_of(id);
    TopLogprob {
        token: String::from_utf8_lossy(&bytes).into_owned(),
        logprob: logprob.max(LOWEST_LOGPROB),
        bytes,
    }
}

fn token_entry(token: &OutputToken, bytes_of: TokenBytes<'_>) -> Option<TokenEntry> {
    let logprobs = token.logprobs.as_ref()?;
    let top = logprobs.top.iter();
    Some(TokenEntry {
        token: top_logprob(token.id, logprobs.logprob, bytes_of),
        top_logprobs: top.map(|&(id, logprob)| top_logprob(id, logprob, bytes_of)).collect(),
    })
}

/// Of these output tokens, if they have any.
pub(super) fn choice_logprobs(
    tokens: &[OutputToken],
    bytes_of: TokenBytes<'_>,
) -> Option<ChoiceLogprobs> {
    let content: Vec<_> = tokens.iter().filter_map(|token| token_entry(token, bytes_of)).collect();
    (!content.is_empty()).then_some(ChoiceLogprobs { content, refusal: None })
}

/// An entry under its token's id.
#[derive(Serialize)]
struct PromptEntry {
    logprob: f32,
    /// From 1; null for a prompt token that is not among the most likely ones.
    rank: Option<usize>,
    decoded_token: String,
}

/// One prompt token: itself, then the most likely ones.
pub(super) struct PromptPosition(Vec<(TokenId, PromptEntry)>);

impl Serialize for PromptPosition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, entry)| (id, entry)))
    }
}

/// `prompt_logprobs`: null for the first token of a prompt, then one object per token.
pub(super) fn prompt_logprobs(
    prompt: &[TokenId],
    logprobs: &[TokenLogprobs],
    bytes_of: TokenBytes<'_>,
) -> Vec<Option<PromptPosition>> {
    let positions = prompt.iter().skip(1).zip(logprobs);
    let positions = positions.map(|(&token, logprobs)| {
        let entry = |id: TokenId, logprob: f32, rank| {
            let decoded_token = String::from_utf8_lossy(&bytes_of(id)).into_owned();
            (id, PromptEntry { logprob: logprob.max(LOWEST_LOGPROB), rank, decoded_token })
        };
        let top = logprobs.top.iter().enumerate();
        let mut entries: Vec<_> =
            top.map(|(i, &(id, logprob))| entry(id, logprob, Some(i + 1))).collect();
        if !entries.iter().any(|(id, _)| *id == token) {
            entries.insert(0, entry(token, logprobs.logprob, None));
        }
        Some(PromptPosition(entries))
    });
    std::iter::once(None).chain(positions).collect()
}
