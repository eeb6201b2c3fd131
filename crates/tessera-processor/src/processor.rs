//! The processor of one checkpoint: loads its files once, then answers for every request.

use std::path::Path;
use std::sync::Arc;

use tessera_types::{Prompt, SamplingParams, TokenId};

use crate::chat::{ChatPrompt, ContentPart};
use crate::config::ProcessorConfig;
use crate::describe::MediaDescription;
use crate::detokenizer::Detokenizer;
use crate::error::{CheckpointError, ProcessorError};
use crate::keys::VisionIdentity;
use crate::prompt::{expand, tokenize};
use crate::sampling::SamplingOverrides;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::tools::ToolTags;

/// Text and media side of one checkpoint. Shared by reference between requests.
pub struct Processor {
    config: ProcessorConfig,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
}

impl Processor {
    /// Loads `config.json`, `preprocessor_config.json`, `generation_config.json`, `tokenizer.json` and
    /// the chat template of a checkpoint directory.
    ///
    /// # Errors
    /// The first file or field that is missing, malformed or contradicts another, by name.
    pub fn load(directory: &Path) -> Result<Self, CheckpointError> {
        let config = ProcessorConfig::load(directory)?;
        let tokenizer = Tokenizer::load(&directory.join("tokenizer.json"))?;
        check_ids(directory, &config, &tokenizer)?;
        let template = ChatTemplate::load(directory, tokenizer.first_chars().to_vec())?;
        Ok(Self { config, tokenizer: Arc::new(tokenizer), template })
    }

    /// Serves a shorter context than the checkpoint allows; a longer one is not possible.
    #[must_use]
    pub fn with_max_context_len(mut self, max_context_len: u32) -> Self {
        self.config.max_context_len = self.config.max_context_len.min(max_context_len.max(1));
        self
    }

    pub fn config(&self) -> &ProcessorConfig {
        &self.config
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens that end a reply unless the request ignores them.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.config.generation.eos_token_ids
    }

    /// The tokens around tool calls; none if the vocabulary has none.
    pub fn tool_tags(&self) -> Option<ToolTags> {
        ToolTags::of(&self.tokenizer)
    }

    /// The rendered conversation as text, for logs and tests.
    pub fn render(&self, chat: &ChatPrompt) -> Result<String, ProcessorError> {
        Ok(self.template.render(chat)?.plain_text())
    }

    /// Renders, tokenizes and expands a conversation. `media` describe its media parts in order of
    /// appearance; `vision` is the tower that will encode them.
    ///
    /// # Errors
    /// See [`ProcessorError`]; [`ProcessorError::param`] names the field.
    pub fn prompt(
        &self,
        chat: &ChatPrompt,
        media: &[MediaDescription],
        vision: &VisionIdentity,
    ) -> Result<Prompt, ProcessorError> {
        check_media(chat, media)?;
        let rendered = self.template.render(chat)?;
        let short = tokenize(&rendered, &self.tokenizer, &self.config)?;
        expand(&short, media, vision, &self.config)
    }

    /// Sampling parameters of a request whose prompt has `prompt_tokens` tokens.
    pub fn sampling(
        &self,
        overrides: &SamplingOverrides,
        prompt_tokens: u32,
    ) -> Result<SamplingParams, ProcessorError> {
        let ProcessorConfig { generation, max_context_len, vocab_size, .. } = &self.config;
        overrides.resolve(generation, prompt_tokens, *max_context_len, *vocab_size)
    }

    /// A detokenizer for one choice.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.tokenizer))
    }
}

/// Config and tokenizer state token ids independently of each other.
fn check_ids(
    directory: &Path,
    config: &ProcessorConfig,
    tokenizer: &Tokenizer,
) -> Result<(), CheckpointError> {
    let invalid = |field: &str, problem: String| CheckpointError::InvalidField {
        file: directory.join("config.json"),
        field: field.to_owned(),
        problem,
    };
    if tokenizer.num_tokens() > config.vocab_size {
        let problem =
            format!("is {}, tokenizer.json has {}", config.vocab_size, tokenizer.num_tokens());
        return Err(invalid("vocab_size", problem));
    }
    let special = &config.special;
    let named = [
        ("image_token_id", special.image_pad),
        ("video_token_id", special.video_pad),
        ("vision_start_token_id", special.vision_start),
        ("vision_end_token_id", special.vision_end),
    ];
    for (field, id) in named {
        if !tokenizer.added_tokens().iter().any(|token| token.id == id) {
            return Err(invalid(field, format!("is {id}, no added token of tokenizer.json")));
        }
    }
    match config.generation.eos_token_ids.iter().find(|&&id| id >= config.vocab_size) {
        Some(id) => Err(invalid("eos_token_id", format!("is {id}, beyond vocab_size"))),
        None => Ok(()),
    }
}

fn check_media(chat: &ChatPrompt, media: &[MediaDescription]) -> Result<(), ProcessorError> {
    let parts = chat.media_parts().count();
    if parts != media.len() {
        return Err(ProcessorError::MediaCount { parts, items: media.len() });
    }
    let kinds = chat.media_parts().zip(media).map(|(part, item)| match part {
        ContentPart::Video => item.kind == tessera_types::MediaKind::Video,
        _ => item.kind == tessera_types::MediaKind::Image,
    });
    match kinds.into_iter().position(|same| !same) {
        Some(part) => Err(ProcessorError::MediaKind { part }),
        None => Ok(()),
    }
}
