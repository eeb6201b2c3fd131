//! Fixtures, and requests in the forms the tests need.

#![allow(dead_code)]

use std::path::PathBuf;

use serde_json::Value;
use tessera_media::{MediaLimits, media_id, probe};
use tessera_processor::{
    ChatPrompt, Content, ContentPart, MediaDescription, Message, PixelBounds, Processor, Role,
    ToolCall, VisionIdentity,
};
use tessera_types::{Hash256, ModelFingerprint, NumericsId};

pub fn fixture(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(path)
}

pub fn bytes(path: &str) -> Vec<u8> {
    std::fs::read(fixture(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub fn json(path: &str) -> Value {
    serde_json::from_slice(&bytes(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The list at `path`, never empty, so that a loop over it tests something.
pub fn rows(path: &str) -> Vec<Value> {
    let rows = json(path).as_array().expect("a list").clone();
    assert!(!rows.is_empty(), "{path} has no cases");
    rows
}

pub fn processor(checkpoint: &str) -> Processor {
    Processor::load(&fixture(checkpoint)).unwrap_or_else(|error| panic!("{checkpoint}: {error}"))
}

pub fn vision() -> VisionIdentity {
    let (weights, numerics) = (ModelFingerprint(Hash256([1; 32])), NumericsId(Hash256([2; 32])));
    VisionIdentity { weights, numerics }
}

/// A conversation in OpenAI's form.
pub fn chat(messages: &Value) -> ChatPrompt {
    ChatPrompt::new(messages.as_array().expect("messages").iter().map(message).collect())
}

fn message(value: &Value) -> Message {
    let role = Role::parse(value["role"].as_str().expect("a role")).expect("a known role");
    let content = match &value["content"] {
        Value::Array(list) => Content::Parts(list.iter().map(part).collect()),
        content => Content::Text(content.as_str().unwrap_or_default().to_owned()),
    };
    let calls = value["tool_calls"].as_array().into_iter().flatten().map(|call| ToolCall {
        id: call["id"].as_str().expect("an id").to_owned(),
        name: call["function"]["name"].as_str().expect("a name").to_owned(),
        arguments: call["function"]["arguments"].clone(),
    });
    let tool_call_id = value["tool_call_id"].as_str().map(str::to_owned);
    Message { role, content, tool_calls: calls.collect(), tool_call_id }
}

fn part(value: &Value) -> ContentPart {
    let has = |key: &str| value.get(key).is_some() || value["type"] == key;
    if has("image") || has("image_url") {
        ContentPart::Image
    } else if has("video") || has("video_url") {
        ContentPart::Video
    } else {
        ContentPart::Text(value["text"].as_str().expect("a text").to_owned())
    }
}

/// The checkpoint's own bounds.
pub fn bounds(processor: &Processor) -> PixelBounds {
    processor.config().pixel_bounds(None, None).expect("the checkpoint's bounds")
}

pub fn image(processor: &Processor, file: &str, bounds: PixelBounds) -> MediaDescription {
    let data = bytes(&format!("media/{file}"));
    let info = probe(&data, &MediaLimits::default()).expect("a header");
    processor.config().describe_image(&info, media_id(&data), bounds).expect("a description")
}

pub fn video(
    processor: &Processor,
    files: &[&str],
    fps: f64,
    bounds: PixelBounds,
) -> MediaDescription {
    let frames: Vec<_> = files
        .iter()
        .map(|file| {
            let data = bytes(&format!("media/{file}"));
            (probe(&data, &MediaLimits::default()).expect("a header"), media_id(&data))
        })
        .collect();
    processor.config().describe_frames(&frames, fps, bounds).expect("a description")
}

/// Describes the media of a golden case.
pub fn describe(processor: &Processor, media: &Value) -> Vec<MediaDescription> {
    let describe_one = |item: &Value| {
        let files = item["files"].as_array().expect("files").iter();
        let files: Vec<&str> = files.map(|file| file.as_str().expect("a name")).collect();
        match item["kind"].as_str() {
            Some("image") => image(processor, files[0], bounds(processor)),
            _ => {
                let fps = item["fps"].as_f64().expect("an fps");
                video(processor, &files, fps, bounds(processor))
            }
        }
    };
    media.as_array().expect("media").iter().map(describe_one).collect()
}
