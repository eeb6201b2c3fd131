//! Reads tool calls out of a reply as it arrives: text in pieces, the tag tokens by id.
//!
//! Invariants
//! - What is given out does not depend on where the text is cut, and is never taken back.
//! - Only tag tokens count: a reply that spells `<tool_call>` in other tokens is text.
//! - A call is given out once its name is known and its arguments have begun; what turns out to be no call
//!   before that is text after all, and nothing of it is lost.
//! - Work grows with the length of the text, however long a call becomes: only a bounded beginning is read
//!   more than once.

use std::collections::VecDeque;

use serde::Deserialize;
use serde_json::value::RawValue;
use tessera_types::TokenId;

use crate::tools::ToolTags;

/// Longest beginning of a call, up to its arguments, that is read piece by piece; a longer one is read when
/// it is complete.
const MAX_HEAD_BYTES: usize = 512;

/// Something that became certain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    Text(String),
    /// The next call begins; calls count from 0.
    Call {
        name: String,
    },
    /// More arguments of the latest call, as the model wrote them.
    Arguments(String),
}

/// Reads one reply.
#[derive(Debug, Clone)]
pub struct ToolCallReader {
    tags: ToolTags,
    is_parallel: bool,
    /// Tags whose text was not read yet: where it begins, in bytes from the start of all text.
    marks: VecDeque<(usize, bool)>,
    /// Bytes of text that tokens were noted for, and that were read.
    noted: usize,
    read: usize,
    state: State,
    /// The beginning of a tag that text ended in.
    partial: String,
    num_calls: usize,
    /// White space at the end of the text so far: dropped if a call follows.
    space: String,
    is_over: bool,
}

#[derive(Debug, Clone)]
enum State {
    Text,
    /// Inside a call whose arguments have not begun.
    Head {
        text: String,
        is_readable: bool,
    },
    /// Inside the arguments.
    Arguments(Scanner),
    /// Behind the arguments, before the closing tag.
    Tail,
}

impl ToolCallReader {
    /// A reader for one reply.
    pub fn new(tags: ToolTags, is_parallel: bool) -> Self {
        Self {
            tags,
            is_parallel,
            marks: VecDeque::new(),
            noted: 0,
            read: 0,
            state: State::Text,
            partial: String::new(),
            num_calls: 0,
            space: String::new(),
            is_over: false,
        }
    }

    /// Notes a token and the text that it completed, which [`ToolCallReader::read`] gets later.
    pub fn note(&mut self, token: TokenId, text: &str) {
        self.noted += text.len();
        let is_open = token == self.tags.open;
        if is_open || token == self.tags.close {
            // Before it may stand what became of an unfinished character.
            let length = ToolTags::text(is_open).len();
            self.marks.push_back((self.noted - length.min(text.len()), is_open));
        }
    }

    /// Takes the next piece of text, which may end anywhere, also inside a tag.
    pub fn read(&mut self, text: &str, out: &mut Vec<ToolEvent>) {
        if self.is_over {
            return;
        }
        let mut joined = std::mem::take(&mut self.partial);
        let mut text = match joined.is_empty() {
            true => text,
            false => {
                joined.push_str(text);
                joined.as_str()
            }
        };
        while let Some(&(at, is_open)) = self.marks.front()
            && at - self.read <= text.len()
        {
            self.take(&text[..at - self.read], out);
            text = &text[at - self.read..];
            self.read = at;
            let length = ToolTags::text(is_open).len();
            if text.len() < length {
                self.partial = text.to_owned();
                return;
            }
            self.marks.pop_front();
            self.read += length;
            text = &text[length..];
            match is_open {
                true => self.open(out),
                false => self.close(out),
            }
            if self.is_over {
                return;
            }
        }
        self.read += text.len();
        self.take(text, out);
    }

    /// Ends the reply: what was held back is text after all, or a call that lacks its closing tag.
    pub fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        let partial = std::mem::take(&mut self.partial);
        self.take(&partial, out);
        match std::mem::replace(&mut self.state, State::Text) {
            State::Head { text, .. } => self.end_head(&text, "", out),
            State::Text | State::Arguments(_) | State::Tail => {}
        }
        if self.num_calls == 0 && !self.space.is_empty() {
            out.push(ToolEvent::Text(std::mem::take(&mut self.space)));
        }
    }

    /// Calls so far.
    pub fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Whether the reply has ended: its calls are complete and something else followed, or only one was
    /// allowed. Nothing more is given out.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Text between tags.
    fn take(&mut self, text: &str, out: &mut Vec<ToolEvent>) {
        if text.is_empty() || self.is_over {
            return;
        }
        match &mut self.state {
            State::Text => self.say(text, out),
            State::Head { text: head, is_readable } => {
                head.push_str(text);
                if !*is_readable {
                    return;
                }
                match read_head(head) {
                    Head::Complete { name, arguments } if arguments < MAX_HEAD_BYTES => {
                        let rest = head.split_off(arguments);
                        self.begin(name, out);
                        self.state = State::Arguments(Scanner::default());
                        self.take(&rest, out);
                    }
                    Head::Unclear if head.len() < MAX_HEAD_BYTES => {}
                    _ => *is_readable = false,
                }
            }
            State::Arguments(scanner) => {
                let (length, is_complete) = scanner.advance(text);
                if is_complete {
                    self.state = State::Tail;
                }
                push_arguments(&text[..length], out);
            }
            State::Tail => {}
        }
    }

    /// Text outside of calls. After a call only white space may follow, before another call.
    fn say(&mut self, text: &str, out: &mut Vec<ToolEvent>) {
        let spoken = text.trim_end().len();
        if self.num_calls > 0 {
            self.is_over |= spoken > 0;
            return;
        }
        if spoken > 0 {
            let mut said = std::mem::take(&mut self.space);
            said.push_str(&text[..spoken]);
            out.push(ToolEvent::Text(said));
        }
        self.space.push_str(&text[spoken..]);
    }

    fn open(&mut self, out: &mut Vec<ToolEvent>) {
        // A tag inside a call: the closing one was forgotten.
        if let State::Head { text, .. } = std::mem::replace(&mut self.state, State::Text) {
            self.end_head(&text, "", out);
        }
        if self.num_calls > 0 && !self.is_parallel {
            self.is_over = true;
        }
        self.state = State::Head { text: String::new(), is_readable: true };
    }

    fn close(&mut self, out: &mut Vec<ToolEvent>) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => self.say(ToolTags::text(false), out),
            State::Head { text, .. } => self.end_head(&text, ToolTags::text(false), out),
            State::Arguments(_) | State::Tail => {}
        }
        self.is_over |= self.num_calls > 0 && !self.is_parallel;
    }

    /// A call that ends before its arguments were seen to begin: complete after all, or text.
    fn end_head(&mut self, text: &str, close: &str, out: &mut Vec<ToolEvent>) {
        match whole_call(text) {
            Some((name, arguments)) => {
                self.begin(name, out);
                push_arguments(&arguments, out);
            }
            None => {
                let all = format!("{}{text}{close}", ToolTags::text(true));
                self.say(&all, out);
            }
        }
    }

    fn begin(&mut self, name: String, out: &mut Vec<ToolEvent>) {
        self.space.clear();
        self.num_calls += 1;
        out.push(ToolEvent::Call { name });
    }
}

fn push_arguments(text: &str, out: &mut Vec<ToolEvent>) {
    if !text.is_empty() {
        out.push(ToolEvent::Arguments(text.to_owned()));
    }
}

/// Finds the end of a JSON object. It trusts the text: what is no JSON is given out as it is.
#[derive(Debug, Clone, Default)]
struct Scanner {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Scanner {
    /// Bytes of `text` that belong to the object, and whether it is complete with them.
    fn advance(&mut self, text: &str) -> (usize, bool) {
        for (i, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_string => self.is_escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return (i + 1, true);
                    }
                }
                _ => {}
            }
        }
        (text.len(), false)
    }
}

/// What the beginning of a call is.
enum Head {
    /// The arguments, an object, begin at this byte.
    Complete { name: String, arguments: usize },
    /// More text decides.
    Unclear,
    /// Keys in another order, arguments of another kind, or no JSON.
    Other,
}

/// Reads `{"name": "…", "arguments": {`.
fn read_head(text: &str) -> Head {
    let mut rest = text;
    let mut name = String::new();
    for (i, wanted) in ["{", "\"name\"", ":", "", ",", "\"arguments\"", ":", "{"].iter().enumerate()
    {
        rest = rest.trim_start_matches([' ', '\t', '\n', '\r']);
        if i == 3 {
            let Some(length) = string_length(rest) else {
                return if rest.is_empty() || rest.starts_with('"') {
                    Head::Unclear
                } else {
                    Head::Other
                };
            };
            match serde_json::from_str(&rest[..length]) {
                Ok(text) => name = text,
                Err(_) => return Head::Other,
            }
            rest = &rest[length..];
        } else if let Some(after) = rest.strip_prefix(wanted) {
            rest = after;
        } else {
            return if wanted.starts_with(rest) { Head::Unclear } else { Head::Other };
        }
    }
    match name.is_empty() {
        true => Head::Other,
        false => Head::Complete { name, arguments: text.len() - rest.len() - 1 },
    }
}

/// Length of the JSON string that `text` begins with, quotes included; none if it is incomplete.
fn string_length(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    for (i, byte) in text.strip_prefix('"')?.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => return Some(i + 2),
            _ => {}
        }
    }
    None
}

#[derive(Deserialize)]
struct Call<'t> {
    name: String,
    #[serde(borrow)]
    arguments: Option<&'t RawValue>,
}

/// Name and arguments of a complete call: an object, an object written as a string, or none.
fn whole_call(text: &str) -> Option<(String, String)> {
    let Call { name, arguments } = serde_json::from_str(text).ok()?;
    let arguments = match arguments.map_or("{}", RawValue::get) {
        object if object.starts_with('{') => object.to_owned(),
        other => {
            let inner: String = serde_json::from_str(other).ok()?;
            serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&inner).ok()?;
            inner
        }
    };
    (!name.is_empty()).then_some((name, arguments))
}

#[cfg(test)]
#[path = "tool_calls_tests.rs"]
mod tests;
