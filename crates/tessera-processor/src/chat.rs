//! A conversation as clients send it, free of any wire format.

use serde_json::Value;

use crate::error::ProcessorError;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    /// Reads a role's name. `developer` is OpenAI's newer word for system.
    pub fn parse(name: &str) -> Result<Self, ProcessorError> {
        match name {
            "system" | "developer" => Ok(Self::System),
            "user" => Ok(Self::User),
            "assistant" => Ok(Self::Assistant),
            "tool" => Ok(Self::Tool),
            _ => Err(ProcessorError::UnknownRole { role: name.to_owned() }),
        }
    }

    /// The name templates know.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One piece of a message. Media parts only mark the place; the items themselves are given in the same
/// order beside the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContentPart {
    Text(String),
    Image,
    Video,
}

/// What a message says. Templates see a string or a list, as the client sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

impl Content {
    /// The parts, with a string as one text part.
    fn parts(&self) -> Vec<&ContentPart> {
        match self {
            Self::Text(_) => Vec::new(),
            Self::Parts(parts) => parts.iter().collect(),
        }
    }

    /// All texts joined, for templates that know strings only.
    fn joined_text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts
                .iter()
                .filter_map(|part| match part {
                    ContentPart::Text(text) => Some(text.as_str()),
                    ContentPart::Image | ContentPart::Video => None,
                })
                .collect(),
        }
    }
}

/// A call that the assistant made earlier in the conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// An object. A string is handed to the template as it is.
    pub arguments: Value,
}

impl ToolCall {
    /// From the OpenAI form, whose arguments are an object written as a string. Text that is no JSON
    /// object stays a string.
    pub fn new(id: impl Into<String>, name: impl Into<String>, arguments: &str) -> Self {
        let object = serde_json::from_str(arguments).ok().filter(Value::is_object);
        let arguments = object.unwrap_or_else(|| Value::String(arguments.to_owned()));
        Self { id: id.into(), name: name.into(), arguments }
    }

    fn to_json(&self) -> Value {
        serde_json::json!({
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        })
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub role: Role,
    pub content: Content,
    /// Calls of an assistant message.
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool message answers.
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A message of text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self::new(role, Content::Text(text.into()))
    }

    /// A message of parts.
    pub fn parts(role: Role, parts: Vec<ContentPart>) -> Self {
        Self::new(role, Content::Parts(parts))
    }

    fn new(role: Role, content: Content) -> Self {
        Self { role, content, tool_calls: Vec::new(), tool_call_id: None }
    }

    /// The value a template sees. With `flat`, contents are strings.
    pub(crate) fn to_json(&self, flat: bool) -> Value {
        let content = match &self.content {
            Content::Parts(parts) if !flat => parts.iter().map(part_to_json).collect(),
            content => Value::String(content.joined_text()),
        };
        let mut message = serde_json::json!({"role": self.role.name(), "content": content});
        if !self.tool_calls.is_empty() {
            message["tool_calls"] = self.tool_calls.iter().map(ToolCall::to_json).collect();
        }
        if let Some(id) = &self.tool_call_id {
            message["tool_call_id"] = Value::String(id.clone());
        }
        message
    }
}

/// Media parts carry both the type and the key that templates test for.
fn part_to_json(part: &ContentPart) -> Value {
    match part {
        ContentPart::Text(text) => serde_json::json!({"type": "text", "text": text}),
        ContentPart::Image => serde_json::json!({"type": "image", "image": ""}),
        ContentPart::Video => serde_json::json!({"type": "video", "video": ""}),
    }
}

/// A conversation and how to render it.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatPrompt {
    pub messages: Vec<Message>,
    /// Function tools in OpenAI's form; key order is kept.
    pub tools: Vec<Value>,
    /// Number the media items ("Picture 1: ").
    pub add_vision_id: bool,
    /// End with the start of the assistant's turn.
    pub add_generation_prompt: bool,
}

impl ChatPrompt {
    /// A conversation that the assistant is to continue, without tools.
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, tools: Vec::new(), add_vision_id: false, add_generation_prompt: true }
    }

    /// Media parts in order of appearance.
    pub fn media_parts(&self) -> impl Iterator<Item = &ContentPart> {
        let parts = self.messages.iter().flat_map(|message| message.content.parts());
        parts.filter(|part| !matches!(part, ContentPart::Text(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_known_or_refused_with_their_name() {
        assert_eq!(Role::parse("developer").expect("an alias"), Role::System);
        let refused = Role::parse("robot").expect_err("no such role");
        assert!(refused.to_string().contains("robot") && refused.param() == "messages");
    }

    #[test]
    fn arguments_become_an_object_where_they_are_one() {
        assert_eq!(ToolCall::new("1", "f", "{\"a\": 1}").arguments, serde_json::json!({"a": 1}));
        assert_eq!(ToolCall::new("1", "f", "[1]").arguments, Value::String("[1]".into()));
        assert_eq!(ToolCall::new("1", "f", "").arguments, Value::String(String::new()));
    }

    #[test]
    fn flat_contents_keep_the_text_only() {
        let parts =
            vec![ContentPart::Text("a".into()), ContentPart::Image, ContentPart::Text("b".into())];
        let message = Message::parts(Role::User, parts);
        assert_eq!(message.to_json(true)["content"], "ab");
        assert_eq!(message.to_json(false)["content"][1]["type"], "image");
    }
}
