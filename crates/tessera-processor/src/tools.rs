//! Which tools a reply may or must call, and the grammar that holds it to them.
//!
//! The form is the one that the published chat template teaches (Hermes): one JSON object between two tag
//! tokens, `<tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>`, calls separated by a newline.

use serde_json::{Value, json};
use tessera_types::{Grammar, TokenId};

use crate::error::ProcessorError;
use crate::tokenizer::Tokenizer;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// What the client wants of its tools.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// Text, calls, or both.
    #[default]
    Auto,
    /// Text only. The tools stay in the prompt, as in vLLM, so that turns share its prefix.
    None,
    /// At least one call and no text.
    Required,
    /// One call of this function.
    Function(String),
}

/// How tools are used in one reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolUse {
    pub choice: ToolChoice,
    /// Whether a reply may hold several calls.
    pub parallel: bool,
}

impl Default for ToolUse {
    fn default() -> Self {
        Self { choice: ToolChoice::Auto, parallel: true }
    }
}

impl ToolUse {
    /// Whether the reply must be calls.
    pub fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Function(_))
    }

    /// Whether a reply may hold more than one call.
    pub fn is_parallel(&self) -> bool {
        self.parallel && !matches!(self.choice, ToolChoice::Function(_))
    }
}

/// The tokens around a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolTags {
    pub open: TokenId,
    pub close: TokenId,
}

impl ToolTags {
    /// The tags of a vocabulary; none if it has no tokens for them.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let (open, close) = (tokenizer.added_token_id(OPEN)?, tokenizer.added_token_id(CLOSE)?);
        Some(Self { open, close })
    }

    /// The text of a tag token.
    pub(crate) fn text(open: bool) -> &'static str {
        if open { OPEN } else { CLOSE }
    }
}

/// The grammar of a reply with these tools. `answer` is what text must belong to, if anything.
///
/// Arguments are held to a function's schema if the reply is forced to call, or if the function is
/// `strict`; other functions then take any object. With `auto` and no strict function there is no grammar:
/// text stays free and costs nothing.
///
/// # Errors
/// A forced choice without tools or of a function that is not given, tools that the vocabulary has no tags
/// for, and an `answer` that cannot stand beside tools.
pub fn tool_grammar(
    tools: &[Value],
    tool_use: &ToolUse,
    answer: Option<&Grammar>,
    tags: Option<ToolTags>,
) -> Result<Option<Grammar>, ProcessorError> {
    let chosen = chosen_tools(tools, &tool_use.choice)?;
    let is_strict = chosen.iter().any(|tool| is_strict(tool));
    match (tool_use.is_forced(), answer) {
        (true, Some(_)) => {
            return Err(ProcessorError::GrammarConflict { field: "tool_choice" });
        }
        (true, None) => {}
        // Calls must stay possible beside an answer that is held to a schema.
        (false, Some(Grammar::JsonSchema(_))) if !chosen.is_empty() => {}
        (false, Some(_)) if !chosen.is_empty() => {
            return Err(ProcessorError::GrammarConflict { field: "tools" });
        }
        (false, None) if is_strict => {}
        (false, _) => return Ok(answer.cloned()),
    }
    tags.ok_or(ProcessorError::NoToolTags)?;
    let calls = calls_rule(&chosen, tool_use);
    let start = match (tool_use.is_forced(), answer) {
        (true, _) => "start: calls\n".to_owned(),
        (false, Some(Grammar::JsonSchema(schema))) => {
            format!("start: calls | answer\nanswer: %json {schema}\n")
        }
        (false, _) => "start: calls | TEXT calls | TEXT?\nTEXT: /(.|\\n)+/\n".to_owned(),
    };
    Ok(Some(Grammar::Lark(start + &calls)))
}

fn name_of(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

fn is_strict(tool: &Value) -> bool {
    tool["function"]["strict"] == true
}

/// The tools that may be called.
fn chosen_tools<'t>(
    tools: &'t [Value],
    choice: &ToolChoice,
) -> Result<Vec<&'t Value>, ProcessorError> {
    let refused = |detail: String| Err(ProcessorError::ToolChoice { detail });
    match choice {
        ToolChoice::None => Ok(Vec::new()),
        ToolChoice::Auto => Ok(tools.iter().collect()),
        ToolChoice::Required if tools.is_empty() => refused("needs tools".to_owned()),
        ToolChoice::Required => Ok(tools.iter().collect()),
        ToolChoice::Function(name) => match tools.iter().find(|tool| name_of(tool) == name) {
            Some(tool) => Ok(vec![tool]),
            None => refused(format!("names {name:.64?}, which is no function of tools")),
        },
    }
}

/// `calls` and what it is made of, in llguidance's Lark. Tags stand there as tokens, without quotes: as text
/// they would be other tokens, and no tags.
fn calls_rule(tools: &[&Value], tool_use: &ToolUse) -> String {
    let more = if tool_use.is_parallel() { " (\"\\n\" call)*" } else { "" };
    let alternatives: Vec<String> = (0..tools.len()).map(|i| format!("body_{i}")).collect();
    let mut lark = format!(
        "calls: call{more}\ncall: {OPEN} \"\\n\" body \"\\n\" {CLOSE}\nbody: {}\n",
        alternatives.join(" | ")
    );
    for (i, tool) in tools.iter().enumerate() {
        let name = Value::String(name_of(tool).to_owned());
        let head = quoted(&format!("{{\"name\": {name}, \"arguments\": "));
        let is_held = tool_use.is_forced() || is_strict(tool);
        let mut schema = if is_held { arguments_schema(tool) } else { json!({"type": "object"}) };
        let options = json!({
            // The spacing of the template, which also bounds the white space.
            "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ",
            // Only a strict function insists on keywords that cannot be kept to.
            "lenient": !is_strict(tool),
        });
        schema["x-guidance"] = options;
        // Schemas of their own, not one schema of all calls: references inside count from their root.
        lark += &format!("body_{i}: {head} arguments_{i} \"}}\"\narguments_{i}: %json {schema}\n");
    }
    lark
}

/// What a function takes; none given means no arguments, as in OpenAI's API. Always an object.
fn arguments_schema(tool: &Value) -> Value {
    match &tool["function"]["parameters"] {
        Value::Object(schema) if schema.contains_key("type") => Value::Object(schema.clone()),
        Value::Object(schema) => {
            let mut schema = schema.clone();
            schema.insert("type".to_owned(), json!("object"));
            Value::Object(schema)
        }
        _ => json!({"type": "object", "additionalProperties": false}),
    }
}

/// A Lark string literal, which is written as JSON's are.
fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAGS: Option<ToolTags> = Some(ToolTags { open: 7, close: 8 });

    fn tool(name: &str, extra: Value) -> Value {
        let mut tool = json!({"type": "function", "function": {"name": name}});
        for (key, value) in extra.as_object().expect("an object") {
            tool["function"][key] = value.clone();
        }
        tool
    }

    fn using(choice: ToolChoice) -> ToolUse {
        ToolUse { choice, ..ToolUse::default() }
    }

    fn lark(tools: &[Value], tool_use: &ToolUse, answer: Option<&Grammar>) -> String {
        match tool_grammar(tools, tool_use, answer, TAGS).expect("valid").expect("a grammar") {
            Grammar::Lark(lark) => lark,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn required_calls_are_held_to_their_schemas() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let tools = [tool("f", json!({"parameters": schema})), tool("g\"", json!({}))];
        let grammar = lark(&tools, &using(ToolChoice::Required), None);
        let expected = concat!(
            "start: calls\n",
            "calls: call (\"\\n\" call)*\n",
            "call: <tool_call> \"\\n\" body \"\\n\" </tool_call>\n",
            "body: body_0 | body_1\n",
            r#"body_0: "{\"name\": \"f\", \"arguments\": " arguments_0 "}""#,
            "\n",
            r#"arguments_0: %json {"type":"object","properties":{"a":{"type":"integer"}},"#,
            r#""x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": ","#,
            "\"lenient\":true}}\n",
            r#"body_1: "{\"name\": \"g\\\"\", \"arguments\": " arguments_1 "}""#,
            "\n",
            r#"arguments_1: %json {"type":"object","additionalProperties":false,"#,
            r#""x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": ","#,
            "\"lenient\":true}}\n",
        );
        assert_eq!(grammar, expected);
        let single = ToolUse { choice: ToolChoice::Required, parallel: false };
        assert!(lark(&tools, &single, None).contains("calls: call\n"));
    }

    #[test]
    fn a_named_function_is_called_once_and_alone() {
        let tools = [tool("f", json!({})), tool("g", json!({"parameters": {"required": ["x"]}}))];
        let grammar = lark(&tools, &using(ToolChoice::Function("g".to_owned())), None);
        assert!(grammar.contains("calls: call\n") && !grammar.contains("\\\"f\\\""), "{grammar}");
        assert!(grammar.contains(r#"%json {"required":["x"],"type":"object","x-g"#), "{grammar}");
    }

    #[test]
    fn free_text_has_no_grammar_unless_a_function_is_strict() {
        let plain = [tool("f", json!({"parameters": {"type": "object"}}))];
        assert_eq!(tool_grammar(&plain, &ToolUse::default(), None, TAGS).expect("valid"), None);
        assert_eq!(
            tool_grammar(&plain, &using(ToolChoice::None), None, None).expect("valid"),
            None
        );
        let strict = [
            tool("f", json!({"strict": true, "parameters": {"type": "object", "x": 1}})),
            tool("g", json!({"parameters": {"type": "object", "x": 2}})),
        ];
        let grammar = lark(&strict, &ToolUse::default(), None);
        assert!(grammar.starts_with("start: calls | TEXT calls | TEXT?\n"), "{grammar}");
        assert!(grammar.contains(r#"arguments_0: %json {"type":"object","x":1,"#), "{grammar}");
        assert!(grammar.contains(r#"arguments_1: %json {"type":"object","x-g"#), "{grammar}");
        assert!(grammar.contains("\"lenient\":false"), "{grammar}");
    }

    #[test]
    fn an_answer_of_json_leaves_calls_possible() {
        let tools = [tool("f", json!({}))];
        let answer = Grammar::JsonSchema(r#"{"type":"array"}"#.to_owned());
        let grammar = lark(&tools, &ToolUse::default(), Some(&answer));
        assert!(
            grammar.starts_with("start: calls | answer\nanswer: %json {\"type\":\"array\"}\n"),
            "{grammar}"
        );
        let alone = tool_grammar(&[], &ToolUse::default(), Some(&answer), TAGS).expect("valid");
        assert_eq!(alone, Some(answer.clone()));
        let unused = tool_grammar(&tools, &using(ToolChoice::None), Some(&answer), TAGS);
        assert_eq!(unused.expect("valid"), Some(answer));
    }

    #[test]
    fn impossible_choices_are_refused_by_field() {
        let tools = [tool("f", json!({}))];
        let regex = Grammar::Regex("a".to_owned());
        let named = |name: &str| using(ToolChoice::Function(name.to_owned()));
        let required = using(ToolChoice::Required);
        let cases = [
            ("tool_choice", tool_grammar(&[], &required, None, TAGS)),
            ("tool_choice", tool_grammar(&tools, &named("h"), None, TAGS)),
            ("tool_choice", tool_grammar(&tools, &required, Some(&regex), TAGS)),
            ("tools", tool_grammar(&tools, &ToolUse::default(), Some(&regex), TAGS)),
            ("tools", tool_grammar(&tools, &required, None, None)),
        ];
        for (field, refused) in cases {
            assert_eq!(refused.expect_err(field).param(), field);
        }
    }
}
