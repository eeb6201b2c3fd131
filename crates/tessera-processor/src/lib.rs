//! Everything that router, encoder and decoder must agree on about a request: the rendered chat
//! template, token ids, media sizes and placeholders, M-RoPE positions, content keys, sampling defaults,
//! and the way back from token ids to text and from boxes to source pixels.
//!
//! Invariants
//! - One owner: sizes and keys are computed here and nowhere else, so services can never disagree.
//! - Special tokens come from the template, placeholder tokens from media parts; what a client wrote is
//!   plain text, whatever it spells.
//! - A request at fault gets a [`ProcessorError`] that names its field; a checkpoint at fault gets a
//!   [`CheckpointError`] that names its file.
//! - Pure functions of their arguments: no clock, no environment, no sockets. Files are read once, when a
//!   checkpoint is loaded.
//!
//! Modules: [`processor`] (the whole of it for one checkpoint), [`config`] (what a checkpoint's JSON
//! files say), [`chat`] (messages), [`template`] (rendering, with [`python`] for Jinja's dialect and
//! [`standin`] to tell client text from template text), [`tokenizer`], [`describe`] (sizes and token
//! counts before anything is encoded), [`prompt`] (expansion and positions), [`keys`], [`sampling`],
//! [`detokenizer`], [`stop`], [`tools`] (their choice and grammar), [`tool_calls`] (read from a reply),
//! [`grounding`], [`error`].

pub mod chat;
mod checkpoint_file;
pub mod config;
pub mod describe;
pub mod detokenizer;
pub mod error;
pub mod grounding;
pub mod keys;
pub mod processor;
pub mod prompt;
mod python;
pub mod sampling;
mod standin;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod tool_calls;
pub mod tools;

pub use chat::{ChatPrompt, Content, ContentPart, Message, Role, ToolCall};
pub use config::{ProcessorConfig, SpecialTokenIds};
pub use describe::{MediaDescription, PixelBounds};
pub use detokenizer::Detokenizer;
pub use error::{CheckpointError, ProcessorError};
pub use grounding::{Box2d, map_box, map_point};
pub use keys::{BlockKeyChain, VisionIdentity, embedding_key};
pub use processor::Processor;
pub use sampling::{GenerationDefaults, SamplingOverrides};
pub use stop::{StopMatcher, StopProgress};
pub use tokenizer::Tokenizer;
pub use tool_calls::{ToolCallReader, ToolEvent};
pub use tools::{ToolChoice, ToolTags, ToolUse, tool_grammar};
