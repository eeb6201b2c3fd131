//! From a parsed request to what decoder and encoder are told: media described by header and hash, the
//! conversation rendered and tokenized, sampling settled. No pixel is decoded here.

use std::sync::Arc;

use bytes::Bytes;
use tessera_media::{media_id, probe};
use tessera_processor::{
    ChatPrompt, MediaDescription, ProcessorError, SamplingOverrides, ToolCallReader, ToolChoice,
    VisionIdentity, tool_grammar,
};
use tessera_types::{Prompt, SamplingParams};
use tokio::time::Instant;

use crate::error::RequestError;
use crate::events::MediaInfo;
use crate::model::ServedModel;
use crate::request::{ChatRequest, MediaContent, MediaPart, MediaSource};
use crate::uploads::Uploads;
use crate::upstream::Identity;

/// A request ready to be placed.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub prompt: Arc<Prompt>,
    pub sampling: Arc<SamplingParams>,
    pub media: Vec<PreparedMedia>,
    /// Where the grammar of `sampling` came from in the request, for errors.
    pub grammar_field: String,
    /// For each choice, if replies may hold tool calls.
    pub tool_reader: Option<ToolCallReader>,
}

/// A media item, described, with its compressed bytes.
#[derive(Debug, Clone)]
pub struct PreparedMedia {
    /// Where the item stands in the request, for errors.
    pub field: String,
    pub description: MediaDescription,
    /// The image, or the frames of a video in order.
    pub frames: Vec<Bytes>,
    /// Pixels after resizing, over all frames.
    pub num_pixels: u64,
}

impl Prepared {
    /// What is known of the media before anything was encoded.
    pub fn media_info(&self) -> Vec<MediaInfo> {
        self.media.iter().map(|media| media_info(&media.description)).collect()
    }

    /// Visual tokens in the prompt.
    pub fn num_media_tokens(&self) -> u32 {
        self.prompt.media.iter().map(|span| span.num_tokens).sum()
    }
}

fn media_info(description: &MediaDescription) -> MediaInfo {
    MediaInfo {
        kind: description.kind,
        media_id: description.media_id,
        source_width: description.source.width,
        source_height: description.source.height,
        resized_width: description.resized.width,
        resized_height: description.resized.height,
        grid: description.grid,
        num_tokens: description.num_tokens,
        cache_hit: false,
    }
}

/// Fetches uploaded bytes into the request, so that they live as long as it does.
///
/// # Errors
/// [`RequestError::MediaNotFound`].
pub(crate) fn resolve_uploads(
    request: &mut ChatRequest,
    uploads: &Uploads,
    now: Instant,
) -> Result<(), RequestError> {
    for part in &mut request.media {
        let sources = match &mut part.content {
            MediaContent::Image(image) => std::slice::from_mut(image),
            MediaContent::Video { frames, .. } => frames.as_mut_slice(),
        };
        for source in sources {
            if let MediaSource::Uploaded(id) = *source {
                let bytes = uploads.get(id, now).ok_or_else(|| RequestError::MediaNotFound {
                    field: part.field.clone(),
                    media_id: id,
                })?;
                *source = MediaSource::Bytes(bytes);
            }
        }
    }
    Ok(())
}

/// Prepares a request whose uploads are resolved. Work grows with bytes of text and media: call it on
/// the blocking pool when there are many.
///
/// # Errors
/// Whatever is wrong with media, conversation or sampling, by field.
pub(crate) fn prepare(
    request: &ChatRequest,
    model: &ServedModel,
    identity: &Identity,
) -> Result<Prepared, RequestError> {
    let processor = model.processor();
    let config = processor.config();
    let context = config.max_context_len.min(identity.max_model_len);
    let tools = Tools::of(request, model)?;
    let resolve = |prompt_tokens| {
        let (defaults, vocab_size) = (&config.generation, config.vocab_size);
        let resolved = tools.sampling.resolve(defaults, prompt_tokens, context, vocab_size);
        resolved.map_err(|error| named(error, &tools.grammar_field))
    };
    // What is wrong whatever the prompt is found before anything is hashed.
    resolve(0)?;
    let parts = request.media.iter().enumerate();
    let media =
        parts.map(|(item, part)| describe(item, part, model)).collect::<Result<Vec<_>, _>>()?;
    let descriptions: Vec<_> = media.iter().map(|media| media.description.clone()).collect();
    let vision = VisionIdentity {
        weights: identity.model.vision_fingerprint,
        numerics: identity.model.vision_numerics,
    };
    let prompt = match processor.prompt(&request.chat, &descriptions, &vision) {
        // Tools that may not be used need no place in the template.
        Err(ProcessorError::ToolsUnsupported { .. })
            if request.tool_use.choice == ToolChoice::None =>
        {
            let chat = ChatPrompt { tools: Vec::new(), ..request.chat.clone() };
            processor.prompt(&chat, &descriptions, &vision)?
        }
        prompt => prompt?,
    };
    let sampling = Arc::new(resolve(prompt.tokens.len() as u32)?);
    let Tools { grammar_field, reader: tool_reader, .. } = tools;
    Ok(Prepared { prompt: Arc::new(prompt), sampling, media, grammar_field, tool_reader })
}

/// What a request's tools come to.
struct Tools {
    /// The request's, with the grammar that tools and answer make together.
    sampling: SamplingOverrides,
    grammar_field: String,
    reader: Option<ToolCallReader>,
}

impl Tools {
    fn of(request: &ChatRequest, model: &ServedModel) -> Result<Self, RequestError> {
        let (tools, tool_use) = (&request.chat.tools, &request.tool_use);
        let tags = model.processor().tool_tags();
        let mut sampling = request.sampling.clone();
        let grammar_field = match &sampling.grammar {
            Some(answer) => {
                // Its bounds are the client's business, those of what it becomes part of are not.
                answer.validate().map_err(|error| named(error.into(), &request.grammar_field))?;
                request.grammar_field.clone()
            }
            None => "tools".to_owned(),
        };
        sampling.grammar = tool_grammar(tools, tool_use, sampling.grammar.as_ref(), tags)?;
        let is_used = !tools.is_empty() && tool_use.choice != ToolChoice::None;
        let reader =
            tags.filter(|_| is_used).map(|tags| ToolCallReader::new(tags, tool_use.is_parallel()));
        Ok(Self { sampling, grammar_field, reader })
    }
}

/// Gives an error about the grammar the name of the field that it stands in.
fn named(error: ProcessorError, grammar_field: &str) -> RequestError {
    match error.param() {
        "grammar" => RequestError::invalid(grammar_field, error.to_string()),
        _ => error.into(),
    }
}

fn describe(
    item: usize,
    part: &MediaPart,
    model: &ServedModel,
) -> Result<PreparedMedia, RequestError> {
    let frames = part.sources().iter().map(|source| match source {
        MediaSource::Bytes(bytes) => Ok(bytes.clone()),
        MediaSource::Uploaded(id) => {
            Err(RequestError::MediaNotFound { field: part.field.clone(), media_id: *id })
        }
    });
    let frames = frames.collect::<Result<Vec<_>, _>>()?;
    let description = describe_frames(item, part, &frames, model)
        .map_err(|source| RequestError::Media { field: part.field.clone(), source })?;
    let temporal = model.processor().config().recipe.patch.temporal_patch_size;
    let num_pixels = description.num_pixels(temporal);
    Ok(PreparedMedia { field: part.field.clone(), description, frames, num_pixels })
}

fn describe_frames(
    item: usize,
    part: &MediaPart,
    frames: &[Bytes],
    model: &ServedModel,
) -> Result<MediaDescription, ProcessorError> {
    let (config, limits) = (model.processor().config(), model.media_limits());
    let bounds = config.pixel_bounds(part.min_pixels, part.max_pixels)?;
    match &part.content {
        MediaContent::Image(_) => {
            let at_fault = |source| ProcessorError::Media { item, source };
            let info = probe(&frames[0], limits).map_err(at_fault)?;
            config.describe_image(&info, media_id(&frames[0]), bounds).map_err(at_fault)
        }
        MediaContent::Video { fps, .. } => {
            let headers = frames.iter().enumerate().map(|(frame, bytes)| {
                let info = probe(bytes, limits)
                    .map_err(|source| ProcessorError::Frame { frame, source })?;
                Ok((info, media_id(bytes)))
            });
            let headers = headers.collect::<Result<Vec<_>, ProcessorError>>()?;
            config.describe_frames(&headers, *fps, bounds)
        }
    }
}
