//! `tools`, `tool_choice` and `parallel_tool_calls`, and the calls of earlier turns.

use serde_json::Value;
use tessera_processor::{Role, ToolCall, ToolChoice, ToolUse};

use super::fields::{Field, Fields};
use crate::error::RequestError;
use crate::request::check_tool;

/// Tools of one request at most.
const MAX_TOOLS: usize = 256;
/// Tool calls of one message at most.
const MAX_TOOL_CALLS: usize = 256;

/// Tools for the prompt.
pub(super) fn parse_tools(fields: &mut Fields<'_>) -> Result<Vec<Value>, RequestError> {
    let Some(tools) = fields.take("tools") else {
        return Ok(Vec::new());
    };
    let list = tools.list(MAX_TOOLS)?;
    list.iter().map(|tool| check_tool(tool.parse()?, &tool.path)).collect()
}

/// How the reply may use them.
pub(super) fn parse_tool_use(fields: &mut Fields<'_>) -> Result<ToolUse, RequestError> {
    let choice = match fields.take("tool_choice") {
        Some(choice) => parse_tool_choice(&choice)?,
        None => ToolChoice::Auto,
    };
    let parallel = fields.get("parallel_tool_calls")?.unwrap_or(true);
    Ok(ToolUse { choice, parallel })
}

/// A word, or `{"type": "function", "function": {"name": …}}`.
fn parse_tool_choice(field: &Field<'_>) -> Result<ToolChoice, RequestError> {
    if field.is_string() {
        return match field.string()?.as_ref() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" => Ok(ToolChoice::Required),
            _ => Err(field.invalid("must be auto, none, required or a function")),
        };
    }
    let mut choice = field.object()?;
    let kind = choice.required("type")?;
    match kind.string()?.as_ref() {
        "function" => {
            let mut function = choice.required("function")?.object()?;
            Ok(ToolChoice::Function(function.required("name")?.string()?.into_owned()))
        }
        other => Err(kind.unsupported(format!("a tool choice of type {other:.40?}"))),
    }
}

/// Calls that an assistant made earlier.
pub(super) fn parse_tool_calls(
    field: &Field<'_>,
    role: Role,
) -> Result<Vec<ToolCall>, RequestError> {
    let calls = field.list(MAX_TOOL_CALLS)?;
    if role != Role::Assistant && !calls.is_empty() {
        return Err(field.invalid("only assistant messages have tool calls"));
    }
    calls
        .iter()
        .map(|call| {
            let mut call = call.object()?;
            let id: String = call.get("id")?.unwrap_or_default();
            let mut function = call.required("function")?.object()?;
            let name = function.required("name")?.string()?;
            let arguments = function.required("arguments")?.string()?;
            Ok(ToolCall::new(id, name, &arguments))
        })
        .collect()
}
