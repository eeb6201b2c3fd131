//! Chat templates of a checkpoint, rendered as `transformers` renders them (`trim_blocks` and
//! `lstrip_blocks` on), with client text kept apart from template text.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment};
use serde_json::Value;

use crate::chat::ChatPrompt;
use crate::checkpoint_file::{CheckpointFile, read_bytes};
use crate::error::{CheckpointError, ProcessorError};
use crate::python::{self, Raised};
use crate::standin::{StandIns, strings_of};

/// Names under which the templates are compiled.
const CHAT: &str = "chat_template";
const TOOL_CHAT: &str = "tool_chat_template";

/// Rendered text in which client text is still hidden behind stand-ins.
pub(crate) struct Rendered {
    pub text: String,
    pub stand_ins: StandIns,
}

impl Rendered {
    /// The text as `transformers` would render it.
    pub fn plain_text(&self) -> String {
        self.stand_ins.reveal(&self.text)
    }
}

/// The templates of one checkpoint.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens by name (`eos_token`), which some templates print.
    special_tokens: serde_json::Map<String, Value>,
    /// Which template serves requests with tools.
    tools: ToolSupport,
    /// Characters that begin an added token.
    guarded: Vec<char>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToolSupport {
    /// The chat template itself takes tools.
    InChat,
    /// A second template does, for messages of text only.
    TextOnly,
    No,
}

impl ChatTemplate {
    /// Finds the template: `chat_template.json`, else `chat_template.jinja`, else the one in
    /// `tokenizer_config.json`, which also serves requests with tools where the first cannot.
    /// `guarded` are the first characters of all added tokens.
    pub fn load(directory: &Path, guarded: Vec<char>) -> Result<Self, CheckpointError> {
        let tokenizer = CheckpointFile::read_if_present(directory, "tokenizer_config.json")?;
        let [text, tool_text] = text_templates(&tokenizer)?;
        let (file, source) = multimodal_template(directory)?
            .or_else(|| Some((tokenizer.path().to_owned(), text?)))
            .ok_or_else(|| CheckpointError::MissingChatTemplate {
                directory: directory.to_owned(),
            })?;

        let mut environment = environment();
        add(&mut environment, CHAT, source, file)?;
        let takes_tools = |environment: &Environment<'_>, name| {
            let template = environment.get_template(name).expect("the template was just added");
            template.undeclared_variables(false).contains("tools")
        };
        let mut tools = ToolSupport::No;
        if takes_tools(&environment, CHAT) {
            tools = ToolSupport::InChat;
        } else if let Some(source) = tool_text {
            add(&mut environment, TOOL_CHAT, source, tokenizer.path().to_owned())?;
            if takes_tools(&environment, TOOL_CHAT) {
                tools = ToolSupport::TextOnly;
            }
        }
        Ok(Self { environment, special_tokens: special_tokens(&tokenizer), tools, guarded })
    }

    /// Renders a conversation.
    pub(crate) fn render(&self, prompt: &ChatPrompt) -> Result<Rendered, ProcessorError> {
        if prompt.messages.is_empty() {
            return Err(ProcessorError::EmptyMessages);
        }
        let name = self.choose(prompt)?;
        let template = self.environment.get_template(name).expect("the template was compiled");
        let flat = name == TOOL_CHAT;
        let messages: Value = prompt.messages.iter().map(|message| message.to_json(flat)).collect();
        let tools = Value::Array(prompt.tools.clone());

        let client = strings_of(&messages).into_iter().chain(strings_of(&tools));
        let client: Vec<&str> = client.collect();
        let stand_ins = StandIns::choose(&self.guarded, client.iter().copied(), template.source())?;
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), stand_ins.hide_json(&messages));
        context.insert(
            "tools".into(),
            match prompt.tools.is_empty() {
                true => Value::Null,
                false => stand_ins.hide_json(&tools),
            },
        );
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), prompt.add_generation_prompt.into());
        context.insert("add_vision_id".into(), prompt.add_vision_id.into());
        let text = template.render(python::from_json(&Value::Object(context))).map_err(refusal)?;
        Ok(Rendered { text, stand_ins })
    }

    fn choose(&self, prompt: &ChatPrompt) -> Result<&'static str, ProcessorError> {
        let with_media = prompt.media_parts().next().is_some();
        match self.tools {
            _ if prompt.tools.is_empty() => Ok(CHAT),
            ToolSupport::InChat => Ok(CHAT),
            ToolSupport::TextOnly if !with_media => Ok(TOOL_CHAT),
            ToolSupport::TextOnly => Err(ProcessorError::ToolsUnsupported { with_media: true }),
            ToolSupport::No => Err(ProcessorError::ToolsUnsupported { with_media: false }),
        }
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    python::install(&mut environment);
    environment
}

fn add(
    environment: &mut Environment<'static>,
    name: &'static str,
    source: String,
    file: PathBuf,
) -> Result<(), CheckpointError> {
    environment
        .add_template_owned(name, source)
        .map_err(|source| CheckpointError::ChatTemplate { file, source })
}

/// The processor's own template files.
fn multimodal_template(directory: &Path) -> Result<Option<(PathBuf, String)>, CheckpointError> {
    let json = CheckpointFile::read_if_present(directory, "chat_template.json")?;
    if json.path().exists() {
        let template = json.get("chat_template").ok_or_else(|| json.missing("chat_template"))?;
        let text = template.as_str();
        let text = text.ok_or_else(|| json.invalid("chat_template", "must be a string"))?;
        return Ok(Some((json.path().to_owned(), text.to_owned())));
    }
    let jinja = directory.join("chat_template.jinja");
    if !jinja.exists() {
        return Ok(None);
    }
    let source = String::from_utf8(read_bytes(&jinja)?).map_err(|error| CheckpointError::Read {
        file: jinja.clone(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
    })?;
    Ok(Some((jinja, source)))
}

/// The templates in the tokenizer's file, without and with tools: one string for both, or a list of
/// named ones.
fn text_templates(tokenizer: &CheckpointFile) -> Result<[Option<String>; 2], CheckpointError> {
    let Some(template) = tokenizer.get("chat_template") else { return Ok([None, None]) };
    let named = |name: &str| {
        let entry = template.as_array()?.iter().find(|entry| entry["name"] == name)?;
        entry["template"].as_str()
    };
    let text = template.as_str().or_else(|| named("default"));
    let tool_text = named("tool_use").or(text);
    if tool_text.is_none() {
        return Err(tokenizer.invalid("chat_template", "must be a string or a list of templates"));
    }
    Ok([text, tool_text].map(|text| text.map(str::to_owned)))
}

fn special_tokens(tokenizer: &CheckpointFile) -> serde_json::Map<String, Value> {
    ["bos_token", "eos_token", "pad_token", "unk_token"]
        .into_iter()
        .filter_map(|name| {
            let token = tokenizer.get(name)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some((name.to_owned(), Value::String(text.to_owned())))
        })
        .collect()
}

/// A template that raises refuses its input; anything else is a failure of the template.
fn refusal(error: minijinja::Error) -> ProcessorError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(source) = cause {
        if let Some(Raised(reason)) = source.downcast_ref() {
            return ProcessorError::TemplateRefused { reason: reason.clone() };
        }
        cause = source.source();
    }
    ProcessorError::Template { source: error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{ContentPart, Message, Role};
    use serde_json::json;

    fn load(files: &[(&str, String)]) -> Result<ChatTemplate, CheckpointError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).expect("a written file");
        }
        ChatTemplate::load(directory.path(), vec!['<'])
    }

    fn rendered(template: &ChatTemplate, prompt: &ChatPrompt) -> String {
        template.render(prompt).expect("a rendered prompt").plain_text()
    }

    fn hello() -> ChatPrompt {
        ChatPrompt::new(vec![Message::text(Role::User, " hi ")])
    }

    #[test]
    fn the_first_of_three_places_wins() {
        let json = ("chat_template.json", json!({"chat_template": "json"}).to_string());
        let jinja = ("chat_template.jinja", "jinja".to_owned());
        let config = ("tokenizer_config.json", json!({"chat_template": "config"}).to_string());
        let all = [json, jinja, config];
        for (first, expected) in ["json", "jinja", "config"].into_iter().enumerate() {
            let template = load(&all[first..]).expect("a template");
            assert_eq!(rendered(&template, &hello()), expected);
        }
        let none = load(&[]).err().expect("no template");
        assert!(matches!(none, CheckpointError::MissingChatTemplate { .. }));
        let broken = load(&[("chat_template.jinja", "{% if %}".to_owned())]).err();
        assert!(matches!(broken, Some(CheckpointError::ChatTemplate { .. })));
    }

    #[test]
    fn blocks_are_trimmed_and_python_is_understood() {
        let source = "{% for m in messages %}\n  {% if true %}\n{{ m.content.strip() }}\n  {% endif %}\n\
                      {% endfor %}\n{{ eos_token }}\n";
        let config =
            json!({"eos_token": {"content": "<end>"}, "chat_template": source}).to_string();
        let template = load(&[("tokenizer_config.json", config)]).expect("a template");
        assert_eq!(rendered(&template, &hello()), "hi\n<end>");
    }

    #[test]
    fn tools_go_to_the_template_that_knows_them() {
        let plain = ("chat_template.json", json!({"chat_template": "chat"}).to_string());
        let source = "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}";
        let text = ("tokenizer_config.json", json!({"chat_template": source}).to_string());
        let mut prompt = hello();
        prompt.tools = vec![json!({"b": 1, "a": [2]})];
        prompt.messages[0].content =
            crate::chat::Content::Parts(vec![ContentPart::Text("x".into())]);

        let both = load(&[plain.clone(), text]).expect("two templates");
        assert_eq!(rendered(&both, &prompt), "{\"b\": 1, \"a\": [2]}x");
        assert_eq!(rendered(&both, &hello()), "chat");
        let only_plain = load(&[plain]).expect("one template");
        let refused = only_plain.render(&prompt).err().expect("no place for tools");
        assert!(matches!(refused, ProcessorError::ToolsUnsupported { with_media: false }));
        prompt.messages.push(Message::parts(Role::User, vec![ContentPart::Image]));
        let refused = both.render(&prompt).err().expect("no place for tools beside media");
        assert_eq!((refused.param(), refused.reason()), ("tools", "TOOLS_UNSUPPORTED"));
    }

    #[test]
    fn refusals_and_failures_are_told_apart() {
        let refusing = json!({"chat_template": "{{ raise_exception('no ' ~ messages[0].role) }}"});
        let template = load(&[("chat_template.json", refusing.to_string())]).expect("a template");
        let refused = template.render(&hello()).err().expect("a refusal");
        assert!(
            matches!(refused, ProcessorError::TemplateRefused { reason } if reason == "no user")
        );
        let failing = json!({"chat_template": "{{ messages[0].nothing.deeper }}"});
        let template = load(&[("chat_template.json", failing.to_string())]).expect("a template");
        let failed = template.render(&hello()).err().expect("a failure");
        assert!(matches!(failed, ProcessorError::Template { .. }));
        let empty = template.render(&ChatPrompt::new(Vec::new())).err().expect("no messages");
        assert!(matches!(empty, ProcessorError::EmptyMessages));
    }
}
