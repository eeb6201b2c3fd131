//! Golden cases: requests with what the reference implementation makes of them.
//! `golden/README.md` describes the files.

use std::fs;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tessera_proto::inference::v1::{
    ContentPart, Image, MediaSource, Message, Video, content_part, media_source,
};

use crate::fixtures;

/// Cases of the checkpoints `tiny` and `tiny-nested`.
pub const CASES: [&str; 6] = ["text", "image_odd", "images", "video", "video_slow", "multi_turn"];

/// One request and its outcome.
#[derive(Debug, Clone)]
pub struct Golden {
    pub model: String,
    pub case: String,
    messages: Value,
    /// What the model reads, placeholders expanded.
    pub prompt_ids: Vec<u32>,
    pub greedy_tokens: Vec<u32>,
    pub greedy_text: String,
    pub media: Vec<GoldenMedia>,
}

/// One media item of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct GoldenMedia {
    pub is_video: bool,
    /// Width and height in pixels.
    pub original: [u32; 2],
    pub resized: [u32; 2],
    pub grid_thw: [u32; 3],
    pub num_tokens: u32,
}

impl Golden {
    /// Reads a case.
    ///
    /// # Panics
    /// When it is missing or not as described.
    pub fn load(model: &str, case: &str) -> Self {
        let path = fixtures::model(model).join(format!("golden/{case}.json"));
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let json: Value = serde_json::from_str(&text).expect("golden files are JSON");
        Self {
            model: model.to_owned(),
            case: case.to_owned(),
            messages: json["messages"].clone(),
            prompt_ids: numbers(&json["expanded_ids"]),
            greedy_tokens: numbers(&json["greedy_tokens"]),
            greedy_text: json["greedy_text"].as_str().expect("a text").to_owned(),
            media: json["media"].as_array().expect("a list").iter().map(media).collect(),
        }
    }

    /// Messages in OpenAI's form, media as `data:` URLs.
    pub fn http_messages(&self) -> Value {
        let mut messages = self.messages.clone();
        for message in messages.as_array_mut().expect("a list") {
            for part in message["content"].as_array_mut().into_iter().flatten() {
                if let Some(url) = part.pointer_mut("/image_url/url") {
                    *url = as_data_url(url);
                }
                for frame in
                    part.get_mut("video").and_then(Value::as_array_mut).into_iter().flatten()
                {
                    *frame = as_data_url(frame);
                }
            }
        }
        messages
    }

    /// Body of a greedy chat completion that must give [`Golden::greedy_tokens`].
    pub fn http_body(&self) -> Value {
        json!({
            "model": self.model,
            "messages": self.http_messages(),
            "temperature": 0,
            "repetition_penalty": 1,
            "ignore_eos": true,
            "max_tokens": self.greedy_tokens.len(),
            "return_token_ids": true,
        })
    }

    /// Messages in the form of the gRPC service, media as bytes.
    pub fn grpc_messages(&self) -> Vec<Message> {
        let messages = self.messages.as_array().expect("a list");
        messages
            .iter()
            .map(|message| Message {
                role: message["role"].as_str().expect("a role").to_owned(),
                parts: grpc_parts(&message["content"]),
                ..Message::default()
            })
            .collect()
    }

    /// Logits of every decoding step: `[32, vocabulary rows]`.
    pub fn logits_steps(&self) -> Vec<Vec<f32>> {
        let path = fixtures::model(&self.model).join(format!("golden/{}.safetensors", self.case));
        let bytes = fs::read(&path).expect("the golden tensors are there");
        let tensors = SafeTensors::deserialize(&bytes).expect("golden tensors are safetensors");
        let steps = tensors.tensor("logits_steps").expect("every case has them");
        let value = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let row_bytes = steps.shape()[1] * size_of::<f32>();
        let rows = steps.data().chunks_exact(row_bytes);
        rows.map(|row| row.chunks_exact(4).map(value).collect()).collect()
    }
}

/// Ids that have a token; the rows of the vocabulary above them have none.
pub fn num_tokens_of(model: &str) -> usize {
    let text =
        fs::read_to_string(fixtures::model(model).join("tokenizer.json")).expect("a tokenizer");
    let json: Value = serde_json::from_str(&text).expect("tokenizer.json is JSON");
    let added = json["added_tokens"].as_array().expect("added tokens");
    let last = added.iter().filter_map(|token| token["id"].as_u64()).max();
    last.expect("there are added tokens") as usize + 1
}

/// The id of a special token.
pub fn special_id(model: &str, token: &str) -> u32 {
    let text =
        fs::read_to_string(fixtures::model(model).join("tokenizer.json")).expect("a tokenizer");
    let json: Value = serde_json::from_str(&text).expect("tokenizer.json is JSON");
    let added = json["added_tokens"].as_array().expect("added tokens");
    let found = added.iter().find(|added| added["content"] == token);
    found.and_then(|added| added["id"].as_u64()).expect("the token exists") as u32
}

fn numbers(list: &Value) -> Vec<u32> {
    let number = |value: &Value| value.as_u64().expect("a number") as u32;
    list.as_array().expect("a list").iter().map(number).collect()
}

fn media(item: &Value) -> GoldenMedia {
    let fixed = |key: &str| numbers(&item[key]);
    GoldenMedia {
        is_video: item["kind"] == "video",
        original: fixed("original").try_into().expect("width and height"),
        resized: fixed("resized").try_into().expect("width and height"),
        grid_thw: fixed("grid_thw").try_into().expect("three axes"),
        num_tokens: item["tokens"].as_u64().expect("a number") as u32,
    }
}

fn bytes_of(file: &Value) -> Vec<u8> {
    fixtures::media(file.as_str().expect("a file name"))
}

fn as_data_url(file: &Value) -> Value {
    Value::String(fixtures::data_url(&bytes_of(file)))
}

fn grpc_parts(content: &Value) -> Vec<ContentPart> {
    let part = |part| ContentPart { part: Some(part) };
    match content {
        Value::String(text) => vec![part(content_part::Part::Text(text.clone()))],
        other => {
            other.as_array().expect("parts").iter().map(|json| part(grpc_part(json))).collect()
        }
    }
}

fn grpc_part(json: &Value) -> content_part::Part {
    let source = |file: &Value| MediaSource {
        source: Some(media_source::Source::Data(bytes_of(file).into())),
    };
    match json["type"].as_str().expect("a type") {
        "text" => content_part::Part::Text(json["text"].as_str().expect("a text").to_owned()),
        "image_url" => content_part::Part::Image(Image {
            source: Some(source(&json["image_url"]["url"])),
            ..Image::default()
        }),
        "video" => content_part::Part::Video(Video {
            frames: json["video"].as_array().expect("frames").iter().map(source).collect(),
            fps: json["fps"].as_f64(),
            ..Video::default()
        }),
        other => panic!("golden cases have no part of type {other}"),
    }
}
