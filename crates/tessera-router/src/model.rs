//! The text and media side of the served model: what the checkpoint's files say, under the name that
//! clients use.

use std::path::Path;

use tessera_media::MediaLimits;
use tessera_processor::{CheckpointError, Processor};
use tessera_types::TokenId;

use crate::config::LimitsConfig;
use crate::error::RequestError;

/// The one model of this router.
pub struct ServedModel {
    name: String,
    processor: Processor,
    media_limits: MediaLimits,
}

impl std::fmt::Debug for ServedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServedModel").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ServedModel {
    /// Loads the processor's files of `directory`.
    ///
    /// # Errors
    /// The first file or field that is at fault, by name.
    pub fn load(
        name: String,
        directory: &Path,
        limits: &LimitsConfig,
    ) -> Result<Self, CheckpointError> {
        let media_limits = MediaLimits {
            max_bytes: limits.max_media_bytes,
            max_pixels: limits.max_media_pixels,
            max_frames: limits.max_video_frames,
        };
        Ok(Self { name, processor: Processor::load(directory)?, media_limits })
    }

    /// Name that clients use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Templates, tokens, sizes, keys.
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// Caps on one media item.
    pub fn media_limits(&self) -> &MediaLimits {
        &self.media_limits
    }

    /// Bytes of a token's text; empty for ids without a token.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        self.processor.tokenizer().token_bytes(id).to_vec()
    }

    /// Accepts the served name; empty means "whatever is served".
    ///
    /// # Errors
    /// [`RequestError::ModelNotFound`].
    pub fn check_name(&self, requested: &str) -> Result<(), RequestError> {
        match requested.is_empty() || requested == self.name {
            true => Ok(()),
            false => Err(RequestError::ModelNotFound {
                requested: requested.chars().take(100).collect(),
                served: self.name.clone(),
            }),
        }
    }
}
