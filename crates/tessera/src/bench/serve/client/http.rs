//! `POST /v1/chat/completions` with a streamed reply, as OpenAI defines it.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Answer, Conversation, Failure};
use crate::bench::serve::args::Plan;
use crate::bench::serve::workload::Media;

/// Longest error body that is read.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Longest line of a stream.
const MAX_LINE_BYTES: usize = 4 << 20;

/// See the module documentation. Connections are shared by clones.
#[derive(Clone)]
pub struct HttpClient {
    client: HyperClient<HttpConnector, Full<Bytes>>,
    url: Arc<str>,
    authorization: Option<Arc<str>>,
    /// Fields that every body has.
    fields: Arc<Map<String, Value>>,
}

/// A piece of a streamed reply.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Chunk {
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice {
    delta: Delta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Delta {
    content: Option<String>,
    /// Of models that think aloud.
    reasoning_content: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Models {
    data: Vec<ModelEntry>,
}

#[derive(Debug, Deserialize)]
struct ModelEntry {
    id: String,
}

impl HttpClient {
    pub async fn connect(url: &str, plan: &Plan) -> Result<Self, Failure> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let mut this = Self {
            client: HyperClient::builder(TokioExecutor::new()).build(connector),
            url: url.into(),
            authorization: plan.api_key.as_ref().map(|key| format!("Bearer {key}").into()),
            fields: Arc::default(),
        };
        let model = match &plan.model {
            Some(model) => model.clone(),
            None => this.first_model().await?,
        };
        let mut fields = Map::new();
        fields.insert("model".into(), model.into());
        fields.insert("stream".into(), true.into());
        fields.insert("stream_options".into(), json!({"include_usage": true}));
        fields.insert("temperature".into(), plan.temperature.into());
        if plan.ignore_eos {
            fields.insert("ignore_eos".into(), true.into());
        }
        fields.extend(plan.extra_body.clone());
        this.fields = Arc::new(fields);
        Ok(this)
    }

    async fn first_model(&self) -> Result<String, Failure> {
        let response = self.send(Method::GET, "/v1/models", Bytes::new()).await?;
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| Failure::new("broken reply", error))?.to_bytes();
        let models: Models = serde_json::from_slice(&body)
            .map_err(|error| Failure::new("unreadable list of models", error))?;
        let first = models.data.into_iter().next();
        Ok(first.ok_or_else(|| Failure::new("no model", "the server lists none"))?.id)
    }

    /// Sends a request; a refusal is a failure.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, &**authorization);
        }
        let request =
            request.body(Full::new(body)).map_err(|error| Failure::new("bad url", error))?;
        let response = self.client.request(request).await.map_err(|error| {
            let kind = if error.is_connect() { "connect" } else { "broken connection" };
            Failure::new(
                kind,
                error.source().map_or_else(|| error.to_string(), ToString::to_string),
            )
        })?;
        match response.status() {
            status if status.is_success() => Ok(response),
            status => {
                let body = http_body_util::Limited::new(response.into_body(), MAX_ERROR_BYTES);
                let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                Err(refusal(status.as_u16(), &body))
            }
        }
    }

    pub async fn ask(&self, conversation: Conversation<'_>) -> Result<Answer, Failure> {
        let question = &conversation.chat.turns[conversation.answers.len()];
        let mut body = (*self.fields).clone();
        body.insert("messages".into(), messages(conversation));
        body.insert("max_tokens".into(), question.max_tokens.into());
        let body = Value::Object(body).to_string();
        let response = self.send(Method::POST, "/v1/chat/completions", body.into()).await?;
        read_stream(response.into_body()).await
    }
}

/// What a server said with an error status.
fn refusal(status: u16, body: &[u8]) -> Failure {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let error = json.as_ref().map(|json| json.get("error").unwrap_or(json));
    let word = |name: &str| error?.get(name)?.as_str().map(str::to_owned);
    let kind = word("code").or_else(|| word("type")).unwrap_or_default();
    let detail = word("message").unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    Failure::new(format!("http {status} {kind}").trim_end(), detail)
}

/// Everything said so far, and the next question.
fn messages(conversation: Conversation<'_>) -> Value {
    let chat = conversation.chat;
    let mut messages = Vec::new();
    if let Some(system) = &chat.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    for (turn, question) in chat.turns.iter().enumerate().take(conversation.answers.len() + 1) {
        let content = match turn {
            0 => first_content(&chat.media, &question.text),
            _ => question.text.clone().into(),
        };
        messages.push(json!({"role": "user", "content": content}));
        if let Some(answer) = conversation.answers.get(turn) {
            messages.push(json!({"role": "assistant", "content": answer}));
        }
    }
    messages.into()
}

fn first_content(media: &Media, text: &str) -> Value {
    let url = |file: &Bytes| format!("data:image/jpeg;base64,{}", STANDARD.encode(file));
    let mut parts: Vec<Value> = match media {
        Media::None => return text.into(),
        Media::Images(files) => files
            .iter()
            .map(|file| json!({"type": "image_url", "image_url": {"url": url(file)}}))
            .collect(),
        Media::Video { frames, fps } => {
            let frames: Vec<String> = frames.iter().map(url).collect();
            vec![json!({"type": "video", "video": frames, "fps": fps})]
        }
    };
    parts.push(json!({"type": "text", "text": text}));
    parts.into()
}

/// Reads server-sent events to `[DONE]`.
async fn read_stream(mut body: Incoming) -> Result<Answer, Failure> {
    let mut reader = StreamReader::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::new("broken stream", error))?;
        if let Some(data) = frame.data_ref() {
            reader.read(data, Instant::now())?;
        }
    }
    reader.finish()
}

/// Cuts a stream into events.
#[derive(Debug, Default)]
struct StreamReader {
    line: Vec<u8>,
    answer: Answer,
    is_done: bool,
}

impl StreamReader {
    fn read(&mut self, data: &[u8], at: Instant) -> Result<(), Failure> {
        for part in data.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > MAX_LINE_BYTES {
                return Err(Failure::new("unreadable stream", "a line is too long"));
            }
            if self.line.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.event(line.trim_ascii(), at)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, line: &[u8], at: Instant) -> Result<(), Failure> {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { return Ok(()) };
        if data == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data)
            .map_err(|error| Failure::new("unreadable stream", error))?;
        if let Some(error) = chunk.error {
            let kind = error.get("code").or_else(|| error.get("type"));
            let kind = kind.and_then(Value::as_str).unwrap_or_default();
            return Err(Failure::new(format!("stream error {kind}").trim_end(), error));
        }
        for Choice { delta } in chunk.choices {
            let text = delta.content.filter(|text| !text.is_empty());
            let thought = delta.reasoning_content.filter(|text| !text.is_empty());
            if text.is_some() || thought.is_some() {
                self.answer.pieces.push(at);
            }
            self.answer.text.extend(text);
        }
        if let Some(usage) = chunk.usage {
            self.answer.num_prompt_tokens = usage.prompt_tokens;
            self.answer.num_output_tokens = usage.completion_tokens;
            self.answer.num_cached_tokens =
                usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
        }
        Ok(())
    }

    fn finish(self) -> Result<Answer, Failure> {
        match self.is_done {
            true => Ok(self.answer),
            false => Err(Failure::new("broken stream", "it ended before [DONE]")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n\
        : keep-alive\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"On\"}}]}\r\n\r\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"ce\"},\"finish_reason\":\"stop\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\
        \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\ndata: [DONE]\n\n";

    #[test]
    fn a_stream_is_read_however_it_is_cut() {
        for cut in 1..STREAM.len() {
            let mut reader = StreamReader::default();
            for part in [&STREAM.as_bytes()[..cut], &STREAM.as_bytes()[cut..]] {
                reader.read(part, Instant::now()).expect("readable");
            }
            let answer = reader.finish().expect("a whole answer");
            assert_eq!((answer.text.as_str(), answer.pieces.len()), ("Once", 2));
            assert_eq!(
                (answer.num_prompt_tokens, answer.num_output_tokens, answer.num_cached_tokens),
                (Some(9), Some(2), Some(4))
            );
        }
    }

    #[test]
    fn broken_streams_and_refusals_have_kinds() {
        let mut reader = StreamReader::default();
        reader.read(b"data: {\"choices\":[]}\n", Instant::now()).expect("readable");
        assert_eq!(reader.finish().expect_err("not done").kind, "broken stream");
        let error = b"data: {\"error\":{\"code\":\"queue_full\",\"message\":\"full\"}}\n";
        let failure = StreamReader::default().read(error, Instant::now()).expect_err("an error");
        assert_eq!(failure.kind, "stream error queue_full");
        let body = br#"{"error": {"message": "no room", "type": "overloaded", "code": null}}"#;
        assert_eq!(refusal(503, body), Failure::new("http 503 overloaded", "no room"));
        assert_eq!(refusal(502, b"bad gateway").kind, "http 502");
    }
}
