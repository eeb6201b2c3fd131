//! What can be wrong with a checkpoint's files and with a request.

use std::path::PathBuf;

use tessera_media::MediaError;
use tessera_types::{PromptError, SamplingError};

/// A checkpoint whose text and image files cannot be used. Found at start-up, before anything is served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not valid JSON", file.display())]
    Json {
        file: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{}: field {field} is missing", file.display())]
    MissingField { file: PathBuf, field: String },
    #[error("{}: field {field} {problem}", file.display())]
    InvalidField { file: PathBuf, field: String, problem: String },
    #[error(
        "no chat template: {} has none of chat_template.json, chat_template.jinja and a \
         chat_template in tokenizer_config.json",
        directory.display()
    )]
    MissingChatTemplate { directory: PathBuf },
    #[error("the chat template in {} does not compile", file.display())]
    ChatTemplate {
        file: PathBuf,
        #[source]
        source: minijinja::Error,
    },
    #[error("{} is not a usable tokenizer", file.display())]
    Tokenizer {
        file: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A request that cannot be served as it is.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    #[error("messages must not be empty")]
    EmptyMessages,
    #[error("unknown role {role:?}; system, user, assistant and tool are known")]
    UnknownRole { role: String },
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("the messages have {parts} media parts, but {items} media items were given")]
    MediaCount { parts: usize, items: usize },
    #[error("media part {part} and the media item given for it are not of one kind")]
    MediaKind { part: usize },
    #[error("the chat template placed {found} of {parts} media parts")]
    MediaNotPlaced { parts: usize, found: usize },
    #[error("media item {item} cannot be used")]
    Media {
        item: usize,
        #[source]
        source: MediaError,
    },
    #[error("frame {frame} of the video cannot be used")]
    Frame {
        frame: usize,
        #[source]
        source: MediaError,
    },
    #[error("fps must be between {min} and {max}, got {fps}")]
    Fps { fps: f64, min: f64, max: f64 },
    #[error(
        "min_pixels must be at least 1 and at most max_pixels, got {min_pixels} and {max_pixels}"
    )]
    PixelBounds { min_pixels: u64, max_pixels: u64 },
    #[error("max_pixels may be at most {limit} for this model, got {max_pixels}")]
    MaxPixels { max_pixels: u64, limit: u64 },
    #[error("the chat template of this model has no place for tools{}", if *with_media { " beside media" } else { "" })]
    ToolsUnsupported { with_media: bool },
    #[error("the vocabulary of this model has no tokens for tool calls")]
    NoToolTags,
    #[error("tool_choice {detail}")]
    ToolChoice { detail: String },
    #[error("{field} cannot be combined with output that is held to a grammar")]
    GrammarConflict { field: &'static str },
    #[error("the chat template refuses these messages: {reason}")]
    TemplateRefused { reason: String },
    #[error("the chat template failed on these messages")]
    Template {
        #[source]
        source: minijinja::Error,
    },
    #[error("the text uses every private-use character, none is left to mark it with")]
    PrivateUseExhausted,
    #[error("the text cannot be tokenized")]
    Tokenize {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the prompt has {tokens} tokens and leaves no room in the context of {context}")]
    PromptTooLong { tokens: u64, context: u32 },
    #[error("{}max_tokens is {max_tokens}, the context of this model holds {context}", prompt_part(*prompt_tokens))]
    OutputTooLong { prompt_tokens: u32, max_tokens: u32, context: u32 },
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken { field: &'static str, token: u32, vocab_size: u32 },
    #[error("stop takes at most {limit} strings, got {got}")]
    TooManyStops { got: usize, limit: usize },
    #[error("a stop string must have 1 to {limit} bytes, got {got}")]
    StopLength { got: usize, limit: usize },
    #[error("the prompt contradicts itself")]
    Prompt(#[from] PromptError),
}

/// A request is refused for `max_tokens` alone before its prompt is known.
fn prompt_part(prompt_tokens: u32) -> String {
    match prompt_tokens {
        0 => String::new(),
        tokens => format!("the prompt has {tokens} tokens and "),
    }
}

impl ProcessorError {
    /// The request field at fault, in the words of the OpenAI API where it has one.
    pub fn param(&self) -> &'static str {
        match self {
            Self::EmptyMessages
            | Self::UnknownRole { .. }
            | Self::EmptyPrompt
            | Self::MediaCount { .. }
            | Self::MediaKind { .. }
            | Self::MediaNotPlaced { .. }
            | Self::Media { .. }
            | Self::Frame { .. }
            | Self::TemplateRefused { .. }
            | Self::Template { .. }
            | Self::PrivateUseExhausted
            | Self::Tokenize { .. }
            | Self::PromptTooLong { .. }
            | Self::Prompt(_) => "messages",
            Self::Fps { .. } => "fps",
            Self::PixelBounds { .. } => "min_pixels",
            Self::MaxPixels { .. } => "max_pixels",
            Self::ToolsUnsupported { .. } | Self::NoToolTags => "tools",
            Self::ToolChoice { .. } => "tool_choice",
            Self::GrammarConflict { field } => field,
            Self::OutputTooLong { .. } => "max_tokens",
            Self::Sampling(source) => source.field(),
            Self::UnknownToken { field, .. } => field,
            Self::TooManyStops { .. } | Self::StopLength { .. } => "stop",
        }
    }

    /// A stable name for typed error details, in SCREAMING_SNAKE_CASE.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::EmptyMessages => "EMPTY_MESSAGES",
            Self::UnknownRole { .. } => "UNKNOWN_ROLE",
            Self::EmptyPrompt => "EMPTY_PROMPT",
            Self::MediaCount { .. } | Self::MediaKind { .. } => "MEDIA_MISMATCH",
            Self::MediaNotPlaced { .. } => "MEDIA_NOT_PLACED",
            Self::Media { source, .. } | Self::Frame { source, .. } if source.is_limit() => {
                "MEDIA_TOO_LARGE"
            }
            Self::Media { .. } | Self::Frame { .. } => "BAD_MEDIA",
            Self::Fps { .. } | Self::PixelBounds { .. } | Self::MaxPixels { .. } => {
                "BAD_MEDIA_OPTION"
            }
            Self::ToolsUnsupported { .. } | Self::NoToolTags => "TOOLS_UNSUPPORTED",
            Self::ToolChoice { .. } => "BAD_TOOL_CHOICE",
            Self::GrammarConflict { .. } => "GRAMMAR_CONFLICT",
            Self::TemplateRefused { .. } | Self::Template { .. } => "TEMPLATE_FAILED",
            Self::PrivateUseExhausted | Self::Tokenize { .. } => "BAD_TEXT",
            Self::PromptTooLong { .. } => "PROMPT_TOO_LONG",
            Self::OutputTooLong { .. } => "OUTPUT_TOO_LONG",
            Self::Sampling(_) | Self::UnknownToken { .. } => "BAD_SAMPLING",
            Self::TooManyStops { .. } | Self::StopLength { .. } => "BAD_STOP",
            Self::Prompt(_) => "BAD_PROMPT",
        }
    }
}
