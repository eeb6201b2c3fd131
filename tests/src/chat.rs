//! Requests that tests start from. All are greedy without penalties, so that their outcome is a fact of
//! the checkpoint.

use serde_json::{Value, json};
use tessera_proto::common::v1::SamplingOptions;
use tessera_proto::inference::v1::{
    ContentPart, GenerateRequest, Image, MediaSource, Message, content_part, media_source,
};

use crate::golden::Golden;

/// Sampling that always takes the most likely token and goes on for exactly `max_tokens`.
pub fn greedy(max_tokens: u32) -> SamplingOptions {
    SamplingOptions {
        temperature: Some(0.0),
        repetition_penalty: Some(1.0),
        ignore_eos: Some(true),
        max_tokens: Some(max_tokens),
        ..SamplingOptions::default()
    }
}

/// Sampling at temperature 1 from the whole distribution.
pub fn drawn(max_tokens: u32) -> SamplingOptions {
    SamplingOptions { temperature: Some(1.0), top_p: Some(1.0), ..greedy(max_tokens) }
}

/// The request of a golden case, which must give its greedy tokens.
pub fn golden(golden: &Golden) -> GenerateRequest {
    request(golden.grpc_messages(), greedy(golden.greedy_tokens.len() as u32))
}

/// A request that reports token ids.
pub fn request(messages: Vec<Message>, sampling: SamplingOptions) -> GenerateRequest {
    GenerateRequest {
        messages,
        sampling: Some(sampling),
        return_token_ids: true,
        ..GenerateRequest::default()
    }
}

/// One user message of these parts.
pub fn user(parts: Vec<ContentPart>) -> Vec<Message> {
    vec![Message { role: "user".to_owned(), parts, ..Message::default() }]
}

pub fn text(text: &str) -> ContentPart {
    ContentPart { part: Some(content_part::Part::Text(text.to_owned())) }
}

/// An image from any source.
pub fn image(source: media_source::Source) -> ContentPart {
    let source = Some(MediaSource { source: Some(source) });
    ContentPart { part: Some(content_part::Part::Image(Image { source, ..Image::default() })) }
}

/// An image by its bytes.
pub fn image_bytes(bytes: &[u8]) -> ContentPart {
    image(media_source::Source::Data(bytes.to_vec().into()))
}

/// Body of a greedy chat completion about a text.
pub fn text_body(text: &str, max_tokens: u32) -> Value {
    body(json!([{"role": "user", "content": text}]), max_tokens)
}

/// Body of a greedy chat completion about an image.
pub fn image_body(url: &str, text: &str, max_tokens: u32) -> Value {
    let content = json!([
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]);
    body(json!([{"role": "user", "content": content}]), max_tokens)
}

fn body(messages: Value, max_tokens: u32) -> Value {
    json!({
        "messages": messages,
        "temperature": 0,
        "repetition_penalty": 1,
        "ignore_eos": true,
        "max_tokens": max_tokens,
        "return_token_ids": true,
    })
}

/// The body with `extra` fields set.
pub fn with(mut body: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// Token ids under `key` of a JSON object.
///
/// # Panics
/// When they are missing.
pub fn ids(object: &Value, key: &str) -> Vec<u32> {
    let list = object[key].as_array().unwrap_or_else(|| panic!("no {key} in {object}"));
    list.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}
