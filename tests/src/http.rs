//! A small blocking HTTP/1.1 client: one connection per request, bodies by length, in chunks or until
//! the end. It shows exactly what the server sent, which a full client would tidy up.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::sse::Events;
use crate::wait;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Talks to one server.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    address: SocketAddr,
}

/// A whole response.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub headers: Headers,
    pub body: Vec<u8>,
}

/// Header fields in order of arrival.
#[derive(Debug, Clone, Default)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first field of this name, whatever the case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let field = self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        field.map(|(_, value)| value.as_str())
    }
}

impl Response {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {self}"))
    }

    /// The body as JSON of a response that must be a success.
    ///
    /// # Panics
    /// When the status is another.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self}");
        self.json()
    }
}

impl std::fmt::Display for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = String::from_utf8_lossy(&self.body);
        write!(f, "{}: {}", self.status, body.chars().take(2000).collect::<String>())
    }
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address }
    }

    /// # Panics
    /// Like the other methods without `try_`: when no whole response arrives.
    pub fn get(&self, path: &str) -> Response {
        self.try_get(path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// # Errors
    /// Whatever the connection says.
    pub fn try_get(&self, path: &str) -> io::Result<Response> {
        self.send("GET", path, None, &[])?.whole()
    }

    pub fn post(&self, path: &str, content_type: &str, body: &[u8]) -> Response {
        self.send("POST", path, Some(content_type), body)
            .and_then(Incoming::whole)
            .unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    pub fn post_json(&self, path: &str, body: &Value) -> Response {
        self.post(path, "application/json", body.to_string().as_bytes())
    }

    /// One chat completion, not streamed.
    pub fn chat(&self, body: &Value) -> Response {
        self.post_json("/v1/chat/completions", body)
    }

    /// One chat completion, or what the connection says.
    ///
    /// # Errors
    /// Whatever the connection says.
    pub fn try_chat(&self, body: &Value) -> io::Result<Response> {
        let body = body.to_string();
        let json = Some("application/json");
        self.send("POST", "/v1/chat/completions", json, body.as_bytes())?.whole()
    }

    /// One chat completion as a stream of events.
    ///
    /// # Panics
    /// When the server answers with anything but a stream.
    pub fn chat_stream(&self, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = Value::Bool(true);
        let json = Some("application/json");
        let incoming = self
            .send("POST", "/v1/chat/completions", json, body.to_string().as_bytes())
            .expect("the server answers");
        if incoming.status != 200 {
            panic!("no stream: {}", incoming.whole().expect("a whole response"));
        }
        assert_eq!(incoming.headers.get("content-type"), Some("text/event-stream"));
        Events::new(incoming.body)
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        content_type: Option<&str>,
        body: &[u8],
    ) -> io::Result<Incoming> {
        let mut stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(wait::BOUND))?;
        stream.set_write_timeout(Some(wait::BOUND))?;
        let kind =
            content_type.map_or_else(String::new, |kind| format!("content-type: {kind}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{kind}content-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        // A server may refuse a body before it has read it all: its answer counts, not our error.
        let answer = Incoming::read(stream);
        match (sent, answer) {
            (_, Ok(incoming)) => Ok(incoming),
            (Err(error), Err(_)) | (Ok(()), Err(error)) => Err(error),
        }
    }
}

/// A response whose body is still arriving.
struct Incoming {
    status: u16,
    headers: Headers,
    body: Body,
}

impl Incoming {
    fn read(stream: TcpStream) -> io::Result<Self> {
        let mut reader = BufReader::new(stream);
        let line = read_line(&mut reader)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| broken(format!("status line {line:?}")))?;
        let mut headers = Headers::default();
        loop {
            let line = read_line(&mut reader)?;
            if line.is_empty() {
                break;
            }
            let (name, value) =
                line.split_once(':').ok_or_else(|| broken(format!("header {line:?}")))?;
            headers.0.push((name.to_owned(), value.trim().to_owned()));
        }
        let body = Body::new(reader, &headers)?;
        Ok(Self { status, headers, body })
    }

    fn whole(mut self) -> io::Result<Response> {
        let mut body = Vec::new();
        self.body.read_to_end(&mut body)?;
        Ok(Response { status: self.status, headers: self.headers, body })
    }
}

/// Reads a body however it is framed. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Body {
    reader: BufReader<TcpStream>,
    framing: Framing,
}

#[derive(Debug)]
enum Framing {
    /// Bytes left.
    Length(u64),
    /// Bytes left in the current chunk; none before the first.
    Chunks(Option<u64>),
    UntilClosed,
    Ended,
}

impl Body {
    fn new(reader: BufReader<TcpStream>, headers: &Headers) -> io::Result<Self> {
        let chunked = headers.get("transfer-encoding").is_some_and(|value| value == "chunked");
        let framing = match (chunked, headers.get("content-length")) {
            (true, _) => Framing::Chunks(None),
            (false, None) => Framing::UntilClosed,
            (false, Some(length)) => {
                let length = length.parse().map_err(|_| broken(format!("length {length:?}")))?;
                Framing::Length(length)
            }
        };
        Ok(Self { reader, framing })
    }

    /// Reads the size of the next chunk, past the end of the one before.
    fn next_chunk(&mut self, after_one: bool) -> io::Result<u64> {
        if after_one && !read_line(&mut self.reader)?.is_empty() {
            return Err(broken("a chunk is longer than announced".into()));
        }
        let line = read_line(&mut self.reader)?;
        let size = u64::from_str_radix(line.trim(), 16)
            .map_err(|_| broken(format!("chunk size {line:?}")))?;
        if size == 0 {
            while !read_line(&mut self.reader)?.is_empty() {}
        }
        Ok(size)
    }

    fn read_at_most(&mut self, left: u64, buffer: &mut [u8]) -> io::Result<u64> {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match self.reader.read(&mut buffer[..most])? {
            0 if most > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            read => Ok(read as u64),
        }
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match self.framing {
            Framing::Ended | Framing::Length(0) => 0,
            Framing::UntilClosed => self.reader.read(buffer)? as u64,
            Framing::Length(left) => {
                let read = self.read_at_most(left, buffer)?;
                self.framing = Framing::Length(left - read);
                read
            }
            Framing::Chunks(left) => {
                let left = match left {
                    Some(left) if left > 0 => left,
                    other => self.next_chunk(other.is_some())?,
                };
                if left == 0 {
                    self.framing = Framing::Ended;
                    return Ok(0);
                }
                let read = self.read_at_most(left, buffer)?;
                self.framing = Framing::Chunks(Some(left - read));
                read
            }
        };
        Ok(read as usize)
    }
}

/// A line without its end.
fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn broken(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Serves one connection with fixed bytes.
    fn serve(answer: &'static str) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 4096];
            // The requests here fit one read.
            let _ = stream.read(&mut request).expect("a request");
            stream.write_all(answer.as_bytes()).expect("sent");
        });
        Client::new(address)
    }

    #[test]
    fn bodies_come_by_length_in_chunks_and_until_the_end() {
        let by_length =
            "HTTP/1.1 400 Bad Request\r\nX-One:  two \r\nContent-Length: 2\r\n\r\n{}rest";
        let response = serve(by_length).get("/");
        assert_eq!((response.status, response.headers.get("x-one")), (400, Some("two")));
        assert_eq!(response.json(), serde_json::json!({}));
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n[\r\n3\r\n1,2\r\n1\r\n]\r\n0\r\n\r\n";
        assert_eq!(serve(chunked).get("/").ok(), serde_json::json!([1, 2]));
        assert_eq!(serve("HTTP/1.1 200 OK\r\n\r\n7").get("/").ok(), 7);
    }

    #[test]
    fn a_body_that_breaks_off_is_an_error() {
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{}",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
        ] {
            let error = serve(answer).try_get("/").expect_err(answer);
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{answer}");
        }
    }

    #[test]
    fn events_arrive_one_by_one() {
        let events = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: hello\n\n\
                      data: {\"a\": 1}\n\ndata: [DONE]\n\n";
        let mut events = serve(events).chat_stream(&serde_json::json!({}));
        assert_eq!(events.next().expect("an event"), serde_json::json!({"a": 1}));
        assert!(!events.is_done());
        assert!(events.next().is_none());
        assert!(events.is_done());
    }
}
