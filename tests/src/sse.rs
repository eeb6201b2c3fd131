//! Server-sent events of a chat completion.

use std::io::{BufRead, BufReader};

use serde_json::Value;

use crate::http::Body;

/// JSON events of a stream, in order. Dropping it closes the connection.
#[derive(Debug)]
pub struct Events {
    lines: BufReader<Body>,
    done: bool,
}

impl Events {
    pub(crate) fn new(body: Body) -> Self {
        Self { lines: BufReader::new(body), done: false }
    }

    /// Whether the server said that the stream is complete. One that only breaks off is not.
    pub fn is_done(&self) -> bool {
        self.done
    }
}

impl Iterator for Events {
    type Item = Value;

    /// `None` at `[DONE]` and where the stream breaks off.
    fn next(&mut self) -> Option<Value> {
        loop {
            let mut line = String::new();
            if self.done || !matches!(self.lines.read_line(&mut line), Ok(read) if read > 0) {
                return None;
            }
            // Blank lines end an event, lines that start with a colon are comments.
            let Some(data) = line.trim_end().strip_prefix("data:") else { continue };
            if data.trim() == "[DONE]" {
                self.done = true;
                return None;
            }
            let event = serde_json::from_str(data);
            return Some(event.unwrap_or_else(|error| panic!("not JSON ({error}): {data}")));
        }
    }
}

/// What all events of a one-choice stream say together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Collected {
    pub prompt_token_ids: Vec<u32>,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub finish_reason: Option<String>,
    pub usage: Option<Value>,
    /// The error event, if the stream ended in one.
    pub error: Option<Value>,
}

impl Collected {
    /// Adds one event.
    pub fn add(&mut self, event: &Value) {
        if let Some(error) = event.get("error") {
            self.error = Some(error.clone());
        }
        if let Some(ids) = event.get("prompt_token_ids").and_then(Value::as_array) {
            self.prompt_token_ids.extend(ids.iter().filter_map(id));
        }
        if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
            self.usage = Some(usage.clone());
        }
        for choice in event.get("choices").and_then(Value::as_array).into_iter().flatten() {
            self.text.push_str(choice["delta"]["content"].as_str().unwrap_or(""));
            let ids = choice.get("token_ids").and_then(Value::as_array).into_iter().flatten();
            self.token_ids.extend(ids.filter_map(id));
            if let Some(reason) = choice["finish_reason"].as_str() {
                self.finish_reason = Some(reason.to_owned());
            }
        }
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

impl<'a> FromIterator<&'a Value> for Collected {
    fn from_iter<T: IntoIterator<Item = &'a Value>>(events: T) -> Self {
        let mut collected = Self::default();
        events.into_iter().for_each(|event| collected.add(event));
        collected
    }
}
