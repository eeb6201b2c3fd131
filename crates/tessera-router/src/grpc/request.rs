//! Messages of the public service into requests.

use std::time::Duration;

use tessera_processor::{
    ChatPrompt, Content, ContentPart, Message, Role, SamplingOverrides, ToolCall, ToolChoice,
    ToolUse,
};
use tessera_proto::common::v1 as common;
use tessera_proto::hash_from_bytes;
use tessera_proto::inference::v1 as pb;
use tessera_types::{Grammar, MediaId, TenantId};
use tokio::time::Instant;

use crate::config::LimitsConfig;
use crate::error::RequestError;
use crate::http::decode_data_url;
use crate::request::{
    ChatRequest, DEFAULT_FPS, MediaContent, MediaPart, MediaSource, check_num_choices,
    check_priority, check_tool, request_id,
};

/// Reads a generation request.
///
/// # Errors
/// A typed error that names the field.
pub(super) fn chat_request(
    request: pb::GenerateRequest,
    tenant: TenantId,
    arrival: Instant,
    limits: &LimitsConfig,
) -> Result<ChatRequest, RequestError> {
    let mut media = Vec::new();
    let chat =
        chat_prompt(request.messages, request.tools, request.add_vision_id, limits, &mut media)?;
    Ok(ChatRequest {
        request_id: request_id(&request.request_id),
        arrival,
        model: request.model,
        chat,
        media,
        sampling: sampling(request.sampling.unwrap_or_default())?,
        grammar_field: "grammar".to_owned(),
        tool_use: ToolUse {
            choice: tool_choice(request.tool_choice)?,
            parallel: request.parallel_tool_calls.unwrap_or(true),
        },
        priority: check_priority(request.priority.into())?,
        tenant,
        seed: request.seed,
        num_choices: check_num_choices(request.n.unwrap_or(1), limits)?,
        stop: request.stop,
        return_token_ids: request.return_token_ids,
        timeout: match request.timeout_ms {
            Some(0) => return Err(RequestError::invalid("timeout_ms", "must be at least 1")),
            timeout_ms => timeout_ms.map(|timeout_ms| Duration::from_millis(timeout_ms.into())),
        },
    })
}

/// Reads a conversation that is only to be tokenized.
///
/// # Errors
/// A typed error that names the field.
pub(super) fn tokenize_request(
    request: pb::TokenizeRequest,
    limits: &LimitsConfig,
) -> Result<ChatRequest, RequestError> {
    let request = pb::GenerateRequest {
        messages: request.messages,
        tools: request.tools,
        add_vision_id: request.add_vision_id,
        ..pb::GenerateRequest::default()
    };
    chat_request(request, TenantId::default(), Instant::now(), limits)
}

fn tool_choice(choice: Option<pb::ToolChoice>) -> Result<ToolChoice, RequestError> {
    use pb::tool_choice::{Choice, Mode};
    let choice = match choice.and_then(|choice| choice.choice) {
        None => return Ok(ToolChoice::Auto),
        Some(Choice::Function(name)) => return Ok(ToolChoice::Function(name)),
        Some(Choice::Mode(mode)) => mode,
    };
    match Mode::try_from(choice) {
        Ok(Mode::Auto) => Ok(ToolChoice::Auto),
        Ok(Mode::None) => Ok(ToolChoice::None),
        Ok(Mode::Required) => Ok(ToolChoice::Required),
        Ok(Mode::Unspecified) | Err(_) => {
            Err(RequestError::invalid("tool_choice", "must be auto, none, required or a function"))
        }
    }
}

fn chat_prompt(
    messages: Vec<pb::Message>,
    tools: Vec<pb::Tool>,
    add_vision_id: bool,
    limits: &LimitsConfig,
    media: &mut Vec<MediaPart>,
) -> Result<ChatPrompt, RequestError> {
    if messages.is_empty() || messages.len() > limits.max_messages {
        let detail = format!("must hold 1 to {} messages", limits.max_messages);
        return Err(RequestError::invalid("messages", detail));
    }
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(i, one)| message(one, &format!("messages[{i}]"), limits, media))
        .collect::<Result<_, _>>()?;
    let tools = tools.into_iter().enumerate().map(|(i, tool)| {
        let field = format!("tools[{i}].json");
        let value = serde_json::from_str(&tool.json)
            .map_err(|error| RequestError::invalid(&field, format!("is not JSON: {error}")))?;
        check_tool(value, &field)
    });
    Ok(ChatPrompt {
        messages,
        tools: tools.collect::<Result<_, _>>()?,
        add_vision_id,
        add_generation_prompt: true,
    })
}

fn message(
    message: pb::Message,
    field: &str,
    limits: &LimitsConfig,
    media: &mut Vec<MediaPart>,
) -> Result<Message, RequestError> {
    let role = Role::parse(&message.role)
        .map_err(|error| RequestError::invalid(format!("{field}.role"), error.to_string()))?;
    if role != Role::Assistant && !message.tool_calls.is_empty() {
        let field = format!("{field}.tool_calls");
        return Err(RequestError::invalid(field, "only assistant messages have tool calls"));
    }
    if message.parts.is_empty() && message.tool_calls.is_empty() {
        return Err(RequestError::invalid(field, "has no content"));
    }
    let mut parts = Vec::with_capacity(message.parts.len());
    for (i, part) in message.parts.into_iter().enumerate() {
        parts.push(content_part(part, &format!("{field}.parts[{i}]"), limits, media)?);
    }
    let calls = message.tool_calls.iter();
    Ok(Message {
        role,
        content: content(parts),
        tool_calls: calls.map(|c| ToolCall::new(&c.id, &c.name, &c.arguments)).collect(),
        tool_call_id: (!message.tool_call_id.is_empty()).then_some(message.tool_call_id),
    })
}

/// One text is plain content, which is what templates expect of it.
fn content(mut parts: Vec<ContentPart>) -> Content {
    match (parts.pop(), parts.is_empty()) {
        (None, _) => Content::Text(String::new()),
        (Some(ContentPart::Text(text)), true) => Content::Text(text),
        (Some(last), _) => {
            parts.push(last);
            Content::Parts(parts)
        }
    }
}

fn content_part(
    part: pb::ContentPart,
    field: &str,
    limits: &LimitsConfig,
    media: &mut Vec<MediaPart>,
) -> Result<ContentPart, RequestError> {
    use pb::content_part::Part;
    let (kind, part) = match part.part {
        None => return Err(RequestError::invalid(field, "is empty")),
        Some(Part::Text(text)) => return Ok(ContentPart::Text(text)),
        Some(Part::Image(part)) => (ContentPart::Image, image(part, field)?),
        Some(Part::Video(part)) => (ContentPart::Video, video(part, field, limits)?),
    };
    if media.len() == limits.max_media_items {
        let detail = format!("a request holds at most {} media items", limits.max_media_items);
        return Err(RequestError::invalid(field, detail));
    }
    media.push(part);
    Ok(kind)
}

fn image(image: pb::Image, field: &str) -> Result<MediaPart, RequestError> {
    let field = format!("{field}.image");
    let source = image.source.unwrap_or_default();
    Ok(MediaPart {
        content: MediaContent::Image(media_source(source, &format!("{field}.source"))?),
        field,
        min_pixels: image.min_pixels,
        max_pixels: image.max_pixels,
    })
}

fn video(video: pb::Video, field: &str, limits: &LimitsConfig) -> Result<MediaPart, RequestError> {
    let field = format!("{field}.video");
    let limit = limits.max_video_frames as usize;
    if video.frames.is_empty() || video.frames.len() > limit {
        let detail = format!("must hold 1 to {limit} frames");
        return Err(RequestError::invalid(format!("{field}.frames"), detail));
    }
    let frames = video.frames.into_iter().enumerate();
    let frames = frames
        .map(|(i, frame)| media_source(frame, &format!("{field}.frames[{i}]")))
        .collect::<Result<_, _>>()?;
    Ok(MediaPart {
        content: MediaContent::Video { frames, fps: video.fps.unwrap_or(DEFAULT_FPS) },
        field,
        min_pixels: video.min_pixels,
        max_pixels: video.max_pixels,
    })
}

fn media_source(source: pb::MediaSource, field: &str) -> Result<MediaSource, RequestError> {
    use pb::media_source::Source;
    match source.source {
        None => Err(RequestError::invalid(field, "is empty")),
        Some(Source::Data(bytes)) => Ok(MediaSource::Bytes(bytes)),
        Some(Source::Url(url)) => decode_data_url(&url, field).map(MediaSource::Bytes),
        Some(Source::MediaId(id)) => {
            let id = hash_from_bytes(&id, "media_id")
                .map_err(|error| RequestError::invalid(field, error.to_string()))?;
            Ok(MediaSource::Uploaded(MediaId(id)))
        }
    }
}

fn sampling(options: common::SamplingOptions) -> Result<SamplingOverrides, RequestError> {
    let grammar = options.grammar.as_ref().map(Grammar::try_from).transpose();
    Ok(SamplingOverrides {
        temperature: options.temperature,
        top_p: options.top_p,
        top_k: options.top_k,
        min_p: options.min_p,
        repetition_penalty: options.repetition_penalty,
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        logit_bias: options.logit_bias.into_iter().collect(),
        max_tokens: options.max_tokens,
        min_tokens: options.min_tokens,
        stop_token_ids: options.stop_token_ids,
        ignore_eos: options.ignore_eos,
        logprobs: options.logprobs,
        prompt_logprobs: options.prompt_logprobs,
        grammar: grammar.map_err(|error| RequestError::invalid("grammar", error.to_string()))?,
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn text_part(text: &str) -> pb::ContentPart {
        pb::ContentPart { part: Some(pb::content_part::Part::Text(text.to_owned())) }
    }

    fn image_part(source: Option<pb::media_source::Source>) -> pb::ContentPart {
        let image = pb::Image { source: Some(pb::MediaSource { source }), ..pb::Image::default() };
        pb::ContentPart { part: Some(pb::content_part::Part::Image(image)) }
    }

    fn request(parts: Vec<pb::ContentPart>) -> pb::GenerateRequest {
        let message = pb::Message { role: "user".to_owned(), parts, ..pb::Message::default() };
        pb::GenerateRequest { messages: vec![message], ..pb::GenerateRequest::default() }
    }

    fn parse(request: pb::GenerateRequest) -> Result<ChatRequest, RequestError> {
        chat_request(request, TenantId::default(), Instant::now(), &LimitsConfig::default())
    }

    #[test]
    fn parts_keep_their_order_and_zero_stays_a_value() {
        use pb::media_source::Source;
        let bytes = Bytes::from_static(b"png");
        let parts =
            vec![text_part("a"), image_part(Some(Source::Data(bytes.clone()))), text_part("b")];
        let sampling = common::SamplingOptions { temperature: Some(0.0), ..Default::default() };
        let parsed = parse(pb::GenerateRequest { sampling: Some(sampling), ..request(parts) });
        let parsed = parsed.expect("valid");
        let Content::Parts(parts) = &parsed.chat.messages[0].content else { panic!("parts") };
        assert!(matches!(
            parts[..],
            [ContentPart::Text(_), ContentPart::Image, ContentPart::Text(_)]
        ));
        assert_eq!(parsed.media[0].content, MediaContent::Image(MediaSource::Bytes(bytes)));
        assert_eq!((parsed.sampling.temperature, parsed.sampling.top_p), (Some(0.0), None));
        assert_eq!(parsed.num_choices, 1);
    }

    #[test]
    fn bad_input_is_refused_by_field() {
        use pb::media_source::Source;
        let url = |url: &str| request(vec![image_part(Some(Source::Url(url.to_owned())))]);
        let choosing = |choice| {
            let tool_choice = Some(pb::ToolChoice { choice });
            pb::GenerateRequest { tool_choice, ..request(vec![text_part("x")]) }
        };
        let short_id = Source::MediaId(Bytes::from_static(b"short"));
        let cases = [
            ("messages", pb::GenerateRequest::default()),
            ("messages[0]", request(vec![])),
            ("messages[0].parts[0]", request(vec![pb::ContentPart::default()])),
            ("messages[0].parts[0].image.source", request(vec![image_part(None)])),
            ("messages[0].parts[0].image.source", url("http://127.0.0.1/x.png")),
            ("messages[0].parts[0].image.source", url("file:///etc/passwd")),
            ("messages[0].parts[0].image.source", request(vec![image_part(Some(short_id))])),
            ("n", pb::GenerateRequest { n: Some(0), ..request(vec![text_part("x")]) }),
            (
                "timeout_ms",
                pb::GenerateRequest { timeout_ms: Some(0), ..request(vec![text_part("x")]) },
            ),
            ("priority", pb::GenerateRequest { priority: 5000, ..request(vec![text_part("x")]) }),
            ("tool_choice", choosing(Some(pb::tool_choice::Choice::Mode(0)))),
            ("tool_choice", choosing(Some(pb::tool_choice::Choice::Mode(77)))),
            (
                "grammar",
                pb::GenerateRequest {
                    sampling: Some(common::SamplingOptions {
                        grammar: Some(common::Grammar::default()),
                        ..common::SamplingOptions::default()
                    }),
                    ..request(vec![text_part("x")])
                },
            ),
            (
                "tools[0].json",
                pb::GenerateRequest {
                    tools: vec![pb::Tool { json: "{".to_owned() }],
                    ..request(vec![text_part("x")])
                },
            ),
        ];
        for (field, request) in cases {
            let error = parse(request).expect_err(field);
            assert_eq!(error.field(), Some(field), "{error}");
        }
        let mut king = request(vec![text_part("x")]);
        king.messages[0].role = "king".to_owned();
        assert_eq!(parse(king).expect_err("a role").field(), Some("messages[0].role"));
    }
}
