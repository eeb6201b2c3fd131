//! JSON of chat replies, whole and in chunks, in the shape of OpenAI's API with vLLM's extras
//! (`prompt_token_ids`, `token_ids`, `stop_reason`) and one of our own (`tessera`: media, timings, seed).
//! Clients that validate strictly find every field they expect; extras are left out unless asked for or
//! harmless.

use serde::Serialize;
use tessera_types::{FinishReason, MediaId, MediaKind, TokenId, TokenLogprobs};

use super::logprobs::{
    ChoiceLogprobs, PromptPosition, TokenBytes, choice_logprobs, prompt_logprobs,
};
use crate::events::{
    ChoiceFinish, Completion, Delta, MediaInfo, OutputToken, PromptInfo, Timings, ToolCallDelta,
    Usage, push_call,
};

fn token_ids(tokens: &[OutputToken]) -> Vec<TokenId> {
    tokens.iter().map(|token| token.id).collect()
}

/// vLLM's `stop_reason`: the stop string, the stop token's id, or null.
#[derive(Serialize)]
#[serde(untagged)]
enum StopReason<'a> {
    Text(&'a str),
    Token(TokenId),
}

fn stop_reason(finish: &ChoiceFinish) -> Option<StopReason<'_>> {
    match (&finish.matched_stop, finish.stop_token) {
        (Some(text), _) => Some(StopReason::Text(text)),
        (None, Some(id)) => Some(StopReason::Token(id)),
        (None, None) => None,
    }
}

#[derive(Serialize)]
struct UsageJson {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl From<Usage> for UsageJson {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.num_prompt_tokens,
            completion_tokens: usage.num_output_tokens,
            total_tokens: usage.num_prompt_tokens.saturating_add(usage.num_output_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.num_cached_tokens },
        }
    }
}

/// Facts that OpenAI's shape has no place for.
#[derive(Serialize)]
struct Extras<'a> {
    effective_seed: u64,
    media: Vec<MediaJson>,
    timings: &'a Timings,
}

/// A media item as it was seen, shared with `/tokenize`.
#[derive(Serialize)]
pub(super) struct MediaJson {
    kind: MediaKind,
    media_id: MediaId,
    source_width: u32,
    source_height: u32,
    resized_width: u32,
    resized_height: u32,
    grid_thw: [u32; 3],
    num_tokens: u32,
    cache_hit: bool,
}

impl From<&MediaInfo> for MediaJson {
    fn from(info: &MediaInfo) -> Self {
        Self {
            kind: info.kind,
            media_id: info.media_id,
            source_width: info.source_width,
            source_height: info.source_height,
            resized_width: info.resized_width,
            resized_height: info.resized_height,
            grid_thw: [info.grid.t, info.grid.h, info.grid.w],
            num_tokens: info.num_tokens,
            cache_hit: info.cache_hit,
        }
    }
}

fn extras<'a>(prompt: &PromptInfo, completion: &'a Completion) -> Extras<'a> {
    Extras {
        effective_seed: prompt.effective_seed,
        media: completion.media.iter().map(MediaJson::from).collect(),
        timings: &completion.timings,
    }
}

/// A whole reply, gathered from its events.
#[derive(Debug, Default, Clone)]
pub(crate) struct Gathered {
    pub(crate) choices: Vec<GatheredChoice>,
    /// Of every prompt token but the first, if they were asked for.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
}

/// A choice of it.
#[derive(Debug, Default, Clone)]
pub(crate) struct GatheredChoice {
    pub(crate) text: String,
    pub(crate) tokens: Vec<OutputToken>,
    /// Each in one piece.
    pub(crate) tool_calls: Vec<ToolCallDelta>,
    pub(crate) finish: Option<ChoiceFinish>,
}

impl GatheredChoice {
    /// Adds a delta.
    pub(crate) fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.tokens);
        delta.tool_calls.into_iter().for_each(|call| push_call(&mut self.tool_calls, call));
    }
}

#[derive(Serialize)]
struct Reply<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ReplyChoice<'a>>,
    usage: UsageJson,
    system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptPosition>>>,
    tessera: Extras<'a>,
}

#[derive(Serialize)]
struct ReplyChoice<'a> {
    index: u32,
    message: ReplyMessage<'a>,
    logprobs: Option<ChoiceLogprobs>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct ReplyMessage<'a> {
    role: &'static str,
    /// Null beside calls without text.
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallJson<'a>>,
}

/// A tool call, or the part of one that a chunk adds.
#[derive(Serialize)]
struct ToolCallJson<'a> {
    /// In chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionJson<'a>,
}

#[derive(Serialize)]
struct FunctionJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

fn tool_call_json(call: &ToolCallDelta, index: Option<u32>) -> ToolCallJson<'_> {
    let start = call.start.as_ref();
    ToolCallJson {
        index,
        id: start.map(|start| start.id.as_str()),
        r#type: start.map(|_| "function"),
        function: FunctionJson {
            name: start.map(|start| start.name.as_str()),
            arguments: &call.arguments,
        },
    }
}

/// The `chat.completion` object.
pub(crate) fn reply_json(
    id: &str,
    prompt: &PromptInfo,
    gathered: &Gathered,
    completion: &Completion,
    return_token_ids: bool,
    bytes_of: TokenBytes<'_>,
) -> Vec<u8> {
    let choices = gathered.choices.iter().enumerate().map(|(index, choice)| ReplyChoice {
        index: index as u32,
        message: ReplyMessage {
            role: "assistant",
            content: (!choice.text.is_empty() || choice.tool_calls.is_empty())
                .then_some(&choice.text),
            refusal: None,
            tool_calls: choice.tool_calls.iter().map(|call| tool_call_json(call, None)).collect(),
        },
        logprobs: choice_logprobs(&choice.tokens, bytes_of),
        finish_reason: choice
            .finish
            .as_ref()
            .map_or(FinishReason::Cancelled, |finish| finish.reason)
            .openai(),
        stop_reason: choice.finish.as_ref().and_then(stop_reason),
        token_ids: return_token_ids.then(|| token_ids(&choice.tokens)),
    });
    let prompt_tokens = prompt.prompt.tokens.as_slice();
    let reply = Reply {
        id,
        object: "chat.completion",
        created: prompt.created,
        model: &prompt.model,
        choices: choices.collect(),
        usage: completion.usage.into(),
        system_fingerprint: &prompt.system_fingerprint,
        prompt_token_ids: return_token_ids.then_some(prompt_tokens),
        prompt_logprobs: (!gathered.prompt_logprobs.is_empty())
            .then(|| prompt_logprobs(prompt_tokens, &gathered.prompt_logprobs, bytes_of)),
        tessera: extras(prompt, completion),
    };
    to_json(&reply)
}

/// Writes the chunks of one stream. What all chunks share is serialised once.
#[derive(Debug)]
pub(crate) struct ChunkWriter {
    /// `data: {"id":…,"model":…,"choices":[`
    head: Vec<u8>,
    /// `]}` or, with usage asked for, `],"usage":null}`, and the blank line that ends an event.
    tail: &'static [u8],
    include_usage: bool,
    return_token_ids: bool,
}

#[derive(Serialize)]
struct ChunkHead<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: ChunkDelta<'a>,
    logprobs: Option<ChoiceLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize, Default)]
struct ChunkDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallJson<'a>>,
}

impl ChunkWriter {
    /// A writer for the stream `id`.
    pub(crate) fn new(
        id: &str,
        prompt: &PromptInfo,
        include_usage: bool,
        return_token_ids: bool,
    ) -> Self {
        let shared = to_json(&ChunkHead {
            id,
            object: "chat.completion.chunk",
            created: prompt.created,
            model: &prompt.model,
            system_fingerprint: &prompt.system_fingerprint,
        });
        let mut head = b"data: ".to_vec();
        // All but the closing brace: choices follow.
        head.extend_from_slice(&shared[..shared.len() - 1]);
        head.extend_from_slice(b",\"choices\":[");
        Self {
            head,
            tail: match include_usage {
                true => b"],\"usage\":null}\n\n",
                false => b"]}\n\n",
            },
            include_usage,
            return_token_ids,
        }
    }

    /// The first chunk of every choice names the role; prompt ids go with the very first.
    pub(crate) fn write_start(&self, prompt: &PromptInfo, num_choices: u32, out: &mut Vec<u8>) {
        for index in 0..num_choices {
            let choice = ChunkChoice {
                index,
                delta: ChunkDelta {
                    role: Some("assistant"),
                    content: Some(""),
                    ..ChunkDelta::default()
                },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            out.extend_from_slice(&self.head);
            append_json(&choice, out);
            if self.return_token_ids && index == 0 {
                out.extend_from_slice(b"],\"prompt_token_ids\":");
                append_json(&prompt.prompt.tokens, out);
                out.extend_from_slice(&self.tail[1..]);
            } else {
                out.extend_from_slice(self.tail);
            }
        }
    }

    /// Text and tokens of one choice.
    pub(crate) fn write_delta(&self, delta: &Delta, bytes_of: TokenBytes<'_>, out: &mut Vec<u8>) {
        let logprobs = choice_logprobs(&delta.tokens, bytes_of);
        let is_silent = delta.text.is_empty() && delta.tool_calls.is_empty();
        if is_silent && logprobs.is_none() && !self.return_token_ids {
            return;
        }
        let calls = delta.tool_calls.iter();
        self.write_choice(
            &ChunkChoice {
                index: delta.choice,
                delta: ChunkDelta {
                    role: None,
                    content: (!delta.text.is_empty() || delta.tool_calls.is_empty())
                        .then_some(&delta.text),
                    tool_calls: calls.map(|call| tool_call_json(call, Some(call.index))).collect(),
                },
                logprobs,
                finish_reason: None,
                stop_reason: None,
                token_ids: self.return_token_ids.then(|| token_ids(&delta.tokens)),
            },
            out,
        );
    }

    /// The chunk that ends a choice.
    pub(crate) fn write_finish(&self, finish: &ChoiceFinish, out: &mut Vec<u8>) {
        self.write_choice(
            &ChunkChoice {
                index: finish.choice,
                delta: ChunkDelta::default(),
                logprobs: None,
                finish_reason: Some(finish.reason.openai()),
                stop_reason: stop_reason(finish),
                token_ids: self.return_token_ids.then(Vec::new),
            },
            out,
        );
    }

    /// The usage chunk, if asked for, and the end mark.
    pub(crate) fn write_end(
        &self,
        prompt: &PromptInfo,
        completion: &Completion,
        out: &mut Vec<u8>,
    ) {
        if self.include_usage {
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            append_json(&UsageJson::from(completion.usage), out);
            out.extend_from_slice(b",\"tessera\":");
            append_json(&extras(prompt, completion), out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn write_choice(&self, choice: &ChunkChoice<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        append_json(choice, out);
        out.extend_from_slice(self.tail);
    }
}

/// An error event. No end mark follows: the stream did not complete.
pub(crate) fn write_error(error_json: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(error_json);
    out.extend_from_slice(b"\n\n");
}

fn append_json<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("plain data always serializes into memory");
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    append_json(value, &mut out);
    out
}

#[cfg(test)]
#[path = "chat_response_tests.rs"]
mod tests;
