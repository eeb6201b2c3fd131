//! The body of `POST /v1/chat/completions` and of `/tokenize`: OpenAI's fields, vLLM's extras, and what
//! of both is known but not served.

use std::collections::BTreeMap;
use std::time::Duration;

use tessera_processor::{ChatPrompt, Content, Message, Role, SamplingOverrides};
use tessera_types::TenantId;
use tokio::time::Instant;

use super::constraint::parse_constraint;
use super::content::parse_content;
use super::fields::{Field, Fields};
use super::tools::{parse_tool_calls, parse_tool_use, parse_tools};
use super::unknown::UnknownFields;
use crate::config::LimitsConfig;
use crate::error::RequestError;
use crate::request::{ChatRequest, MediaPart, check_num_choices, check_priority};

/// Stop strings that are read before the processor's own, smaller bound is checked.
const MAX_STOPS_PARSED: usize = 1024;

/// Fields that change the output in ways this server does not implement. Ignoring them would answer
/// another question than the one asked.
const UNSUPPORTED: [&str; 9] = [
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "use_beam_search",
    "bad_words",
    "allowed_token_ids",
    "audio",
    "functions",
];

/// A request with what only HTTP cares about.
#[derive(Debug)]
pub(crate) struct ChatBody {
    pub(crate) request: ChatRequest,
    pub(crate) stream: bool,
    /// A last chunk with usage (streams only).
    pub(crate) include_usage: bool,
}

/// Parses a chat body.
///
/// # Errors
/// A typed error that names the field.
pub(crate) fn parse_chat(
    body: &[u8],
    request_id: String,
    arrival: Instant,
    limits: &LimitsConfig,
    unknown: &UnknownFields,
) -> Result<ChatBody, RequestError> {
    let mut fields = Fields::from_body(body)?;
    refuse_unsupported(&mut fields)?;
    let mut media = Vec::new();
    let messages = fields.required("messages")?;
    let messages = parse_messages(&messages, limits, unknown, &mut media)?;
    let stream = fields.get("stream")?.unwrap_or(false);
    let mut sampling = parse_sampling(&mut fields, stream)?;
    let mut grammar_field = String::new();
    if let Some(constraint) = parse_constraint(&mut fields, unknown)? {
        (sampling.grammar, grammar_field) = (Some(constraint.grammar), constraint.field);
    }
    let request = ChatRequest {
        request_id,
        arrival,
        model: fields.get("model")?.unwrap_or_default(),
        chat: ChatPrompt {
            messages,
            tools: parse_tools(&mut fields)?,
            add_vision_id: fields.get("add_vision_id")?.unwrap_or(false),
            add_generation_prompt: true,
        },
        media,
        sampling,
        grammar_field,
        tool_use: parse_tool_use(&mut fields)?,
        priority: check_priority(fields.get("priority")?.unwrap_or(0))?,
        tenant: TenantId::default(),
        seed: parse_seed(&mut fields)?,
        num_choices: parse_num_choices(&mut fields, limits)?,
        stop: parse_stop(&mut fields)?,
        return_token_ids: fields.get("return_token_ids")?.unwrap_or(false),
        timeout: parse_timeout(&mut fields)?,
    };
    let include_usage = parse_include_usage(&mut fields, unknown)?;
    unknown.note(&fields);
    Ok(ChatBody { request, stream, include_usage })
}

/// What `/tokenize` takes: a conversation or plain text.
#[derive(Debug)]
pub(crate) enum TokenizeBody {
    Chat(Box<ChatRequest>),
    Text { model: String, prompt: String },
}

/// Parses a body of `/tokenize`.
///
/// # Errors
/// A typed error that names the field.
pub(crate) fn parse_tokenize(
    body: &[u8],
    request_id: String,
    arrival: Instant,
    limits: &LimitsConfig,
    unknown: &UnknownFields,
) -> Result<TokenizeBody, RequestError> {
    let is_text = Fields::from_body(body)?.take("prompt").is_some();
    if !is_text {
        let chat = parse_chat(body, request_id, arrival, limits, unknown)?;
        return Ok(TokenizeBody::Chat(Box::new(chat.request)));
    }
    let mut fields = Fields::from_body(body)?;
    let text = TokenizeBody::Text {
        model: fields.get("model")?.unwrap_or_default(),
        prompt: fields.required("prompt")?.string()?.into_owned(),
    };
    unknown.note(&fields);
    Ok(text)
}

fn refuse_unsupported(fields: &mut Fields<'_>) -> Result<(), RequestError> {
    for name in UNSUPPORTED {
        if let Some(field) = fields.take(name) {
            return Err(field.unsupported(name));
        }
    }
    Ok(())
}

fn parse_messages(
    field: &Field<'_>,
    limits: &LimitsConfig,
    unknown: &UnknownFields,
    media: &mut Vec<MediaPart>,
) -> Result<Vec<Message>, RequestError> {
    let list = field.list(limits.max_messages)?;
    if list.is_empty() {
        return Err(field.invalid("must hold at least one message"));
    }
    list.iter().map(|message| parse_message(message, limits, unknown, media)).collect()
}

fn parse_message(
    field: &Field<'_>,
    limits: &LimitsConfig,
    unknown: &UnknownFields,
    media: &mut Vec<MediaPart>,
) -> Result<Message, RequestError> {
    let mut message = field.object()?;
    let role = message.required("role")?;
    let role = Role::parse(&role.string()?).map_err(|error| role.invalid(error.to_string()))?;
    let tool_calls = match message.take("tool_calls") {
        Some(calls) => parse_tool_calls(&calls, role)?,
        None => Vec::new(),
    };
    let content = match message.take("content") {
        Some(content) => parse_content(&content, limits, unknown, media)?,
        None if !tool_calls.is_empty() => Content::Text(String::new()),
        None => return Err(field.invalid("has no content")),
    };
    let tool_call_id = message.get("tool_call_id")?;
    // Names of speakers and refusals are not part of the template.
    message.take("name");
    message.take("refusal");
    unknown.note(&message);
    Ok(Message { role, content, tool_calls, tool_call_id })
}

fn parse_sampling(
    fields: &mut Fields<'_>,
    stream: bool,
) -> Result<SamplingOverrides, RequestError> {
    let max_tokens = parse_count(fields, "max_tokens")?;
    // OpenAI's newer name for the same limit; it wins when a client sends both.
    let max_completion_tokens = parse_count(fields, "max_completion_tokens")?;
    Ok(SamplingOverrides {
        temperature: parse_real(fields, "temperature")?,
        top_p: parse_real(fields, "top_p")?,
        top_k: parse_top_k(fields)?,
        min_p: parse_real(fields, "min_p")?,
        repetition_penalty: parse_real(fields, "repetition_penalty")?,
        presence_penalty: parse_real(fields, "presence_penalty")?,
        frequency_penalty: parse_real(fields, "frequency_penalty")?,
        logit_bias: parse_logit_bias(fields)?,
        // Whatever does not fit in 32 bits is beyond every context, and refused as that.
        max_tokens: max_completion_tokens
            .or(max_tokens)
            .map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX)),
        min_tokens: fields.get("min_tokens")?,
        stop_token_ids: fields.get("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.get("ignore_eos")?,
        logprobs: parse_logprobs(fields)?,
        prompt_logprobs: parse_prompt_logprobs(fields, stream)?,
        grammar: None,
    })
}

fn parse_real(fields: &mut Fields<'_>, name: &str) -> Result<Option<f32>, RequestError> {
    Ok(fields.get::<f64>(name)?.map(|value| value as f32))
}

fn parse_count(fields: &mut Fields<'_>, name: &str) -> Result<Option<u64>, RequestError> {
    let Some(field) = fields.take(name) else {
        return Ok(None);
    };
    match field.parse::<u64>() {
        Ok(0) | Err(_) => Err(field.invalid("must be a whole number of at least 1")),
        Ok(count) => Ok(Some(count)),
    }
}

/// vLLM writes "all tokens" as −1.
fn parse_top_k(fields: &mut Fields<'_>) -> Result<Option<u32>, RequestError> {
    let Some(field) = fields.take("top_k") else {
        return Ok(None);
    };
    match field.parse::<i64>()? {
        -1 => Ok(Some(0)),
        k => u32::try_from(k)
            .map(Some)
            .map_err(|_| field.invalid("must be -1 or a whole number of at least 0")),
    }
}

fn parse_logit_bias(fields: &mut Fields<'_>) -> Result<Vec<(u32, f32)>, RequestError> {
    let Some(field) = fields.take("logit_bias") else {
        return Ok(Vec::new());
    };
    let bias: BTreeMap<String, f64> = field.parse()?;
    bias.into_iter()
        .map(|(id, bias)| match id.parse() {
            Ok(id) => Ok((id, bias as f32)),
            Err(_) => Err(field.invalid("keys must be token ids")),
        })
        .collect()
}

/// `logprobs` switches them on, `top_logprobs` asks for alternatives.
fn parse_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, RequestError> {
    let wanted = fields.get::<bool>("logprobs")?.unwrap_or(false);
    let Some(top) = fields.take("top_logprobs") else {
        return Ok(wanted.then_some(0));
    };
    match (top.parse::<u32>()?, wanted) {
        (0, false) => Ok(None),
        (_, false) => Err(top.invalid("needs logprobs to be true")),
        (num, true) => Ok(Some(num)),
    }
}

/// A number, as in vLLM. A stream has no place for them, there as here.
fn parse_prompt_logprobs(
    fields: &mut Fields<'_>,
    stream: bool,
) -> Result<Option<u32>, RequestError> {
    match fields.take("prompt_logprobs") {
        Some(field) if stream => Err(field.invalid("cannot be had in a stream")),
        Some(field) => field.parse().map(Some),
        None => Ok(None),
    }
}

/// Any 64-bit number; OpenAI's clients may send negative ones.
fn parse_seed(fields: &mut Fields<'_>) -> Result<Option<u64>, RequestError> {
    let Some(field) = fields.take("seed") else {
        return Ok(None);
    };
    match (field.parse::<u64>(), field.parse::<i64>()) {
        (Ok(seed), _) => Ok(Some(seed)),
        (_, Ok(seed)) => Ok(Some(seed.cast_unsigned())),
        _ => Err(field.invalid("must be a whole number of 64 bits")),
    }
}

fn parse_num_choices(fields: &mut Fields<'_>, limits: &LimitsConfig) -> Result<u32, RequestError> {
    let Some(field) = fields.take("n") else {
        return Ok(1);
    };
    check_num_choices(field.parse::<u32>().unwrap_or(0), limits)
}

/// A string or a list of them; their bounds are the processor's.
fn parse_stop(fields: &mut Fields<'_>) -> Result<Vec<String>, RequestError> {
    let Some(field) = fields.take("stop") else {
        return Ok(Vec::new());
    };
    if field.is_string() {
        return Ok(vec![field.string()?.into_owned()]);
    }
    let list = field.list(MAX_STOPS_PARSED)?;
    list.iter().map(|entry| Ok(entry.string()?.into_owned())).collect()
}

fn parse_timeout(fields: &mut Fields<'_>) -> Result<Option<Duration>, RequestError> {
    let timeout_ms = parse_count(fields, "timeout_ms")?;
    Ok(timeout_ms.map(Duration::from_millis))
}

fn parse_include_usage(
    fields: &mut Fields<'_>,
    unknown: &UnknownFields,
) -> Result<bool, RequestError> {
    let Some(field) = fields.take("stream_options") else {
        return Ok(false);
    };
    let mut options = field.object()?;
    let include = options.get("include_usage")?.unwrap_or(false);
    unknown.note(&options);
    Ok(include)
}

#[cfg(test)]
#[path = "chat_request_tests.rs"]
mod tests;
