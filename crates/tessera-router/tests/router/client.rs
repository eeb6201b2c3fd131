//! A small HTTP/1.1 client that shows what is on the wire: status, headers, and events one by one.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// A complete reply.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the body is JSON")
    }
}

pub async fn get(address: SocketAddr, path: &str) -> Reply {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("writes");
    read(stream).await
}

pub async fn post(address: SocketAddr, path: &str, body: &[u8]) -> Reply {
    read(send(address, path, body, "connection: close\r\n").await).await
}

pub async fn post_json(address: SocketAddr, path: &str, body: &Value) -> Reply {
    post(address, path, body.to_string().as_bytes()).await
}

/// Sends a request and leaves the reply to be read.
pub async fn send(address: SocketAddr, path: &str, body: &[u8], headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\
         content-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("writes");
    // A server may answer and close before it has read everything.
    let _ = stream.write_all(body).await;
    stream
}

async fn read_head(reader: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    reader.read_line(&mut line).await.expect("a status line");
    let status = line[9..12].parse().expect("a status");
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).await.expect("a header");
        match line.trim_end().split_once(": ") {
            Some((key, value)) => headers.push((key.to_lowercase(), value.to_owned())),
            None => return (status, headers),
        }
    }
}

/// The rest of what the server sends on this connection.
pub async fn read(stream: TcpStream) -> Reply {
    let mut reader = BufReader::new(stream);
    let (status, headers) = read_head(&mut reader).await;
    let mut reply = Reply { status, headers, body: Vec::new() };
    if reply.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(&mut reader).await {
            reply.body.extend(chunk);
        }
    } else {
        reader.read_to_end(&mut reply.body).await.expect("a body");
    }
    reply
}

async fn read_chunk(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut line = String::new();
    if reader.read_line(&mut line).await.ok()? == 0 {
        return None;
    }
    let length = usize::from_str_radix(line.trim_end(), 16).expect("a chunk length");
    let mut chunk = vec![0; length + 2];
    reader.read_exact(&mut chunk).await.ok()?;
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}

/// An event stream that is read as it comes.
pub struct Events {
    reader: BufReader<TcpStream>,
    pub status: u16,
    buffer: String,
}

/// One server-sent event.
#[derive(Debug, Clone, PartialEq)]
pub enum SseEvent {
    Json(Value),
    Done,
}

impl SseEvent {
    pub fn json(&self) -> &Value {
        match self {
            Self::Json(json) => json,
            Self::Done => panic!("the end mark is not JSON"),
        }
    }
}

impl Events {
    pub async fn open(address: SocketAddr, body: &Value) -> Self {
        let body = body.to_string();
        let stream = send(address, "/v1/chat/completions", body.as_bytes(), "").await;
        Self::read_from(stream).await
    }

    pub async fn read_from(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let (status, _) = read_head(&mut reader).await;
        Self { reader, status, buffer: String::new() }
    }

    /// The next event; `None` when the reply has ended.
    pub async fn next(&mut self) -> Option<SseEvent> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let event: String = self.buffer.drain(..end + 2).collect();
                match event.trim_end().strip_prefix("data: ") {
                    // A comment.
                    None => continue,
                    Some("[DONE]") => return Some(SseEvent::Done),
                    Some(json) => {
                        return Some(SseEvent::Json(serde_json::from_str(json).expect("is JSON")));
                    }
                }
            }
            let chunk = read_chunk(&mut self.reader).await?;
            self.buffer.push_str(std::str::from_utf8(&chunk).expect("is UTF-8"));
        }
    }

    pub async fn rest(&mut self) -> Vec<SseEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// Joined text of one choice.
pub fn text_of(events: &[SseEvent], index: u64) -> String {
    let choices = events.iter().filter_map(|event| match event {
        SseEvent::Json(json) => json["choices"].get(0).cloned(),
        SseEvent::Done => None,
    });
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["delta"]["content"].as_str().map(str::to_owned))
        .collect()
}

/// The finish reason of one choice.
pub fn finish_of(events: &[SseEvent], index: u64) -> Option<String> {
    events.iter().find_map(|event| match event {
        SseEvent::Json(json) if json["choices"][0]["index"] == index => {
            json["choices"][0]["finish_reason"].as_str().map(str::to_owned)
        }
        _ => None,
    })
}
