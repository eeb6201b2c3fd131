//! What a media item will be, known from its headers before anything is decoded or encoded: resized
//! size, patch grid, number of visual tokens.

use tessera_media::{ImageInfo, MediaError, Size, frame_list_id, smart_resize};
use tessera_types::{GridThw, MediaId, MediaKind};

use crate::config::ProcessorConfig;
use crate::error::ProcessorError;

/// Frames per second of a frame list that does not say.
pub const DEFAULT_FPS: f64 = 2.0;
/// Outside these the time positions of a long video leave the range of any context.
const FPS_RANGE: std::ops::RangeInclusive<f64> = 0.001..=1000.0;

/// Bounds on height × width of a resized image or frame, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelBounds {
    pub min_pixels: u64,
    pub max_pixels: u64,
}

/// A media item of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaDescription {
    pub kind: MediaKind,
    pub media_id: MediaId,
    /// Indices of the frames used, in order; empty for an image.
    pub frame_indices: Vec<u32>,
    /// Size as sent, after EXIF orientation; of the first frame of a video.
    pub source: Size,
    /// Size the model sees. Boxes and points in replies are in its pixels.
    pub resized: Size,
    /// Patches before merging.
    pub grid: GridThw,
    /// Visual tokens, the rows of the embedding.
    pub num_tokens: u32,
    /// Seconds per temporal patch; 0 for images.
    pub seconds_per_grid: f64,
}

impl MediaDescription {
    /// Pixels that an encoder has to work through, over all frames.
    pub fn num_pixels(&self, temporal_patch_size: u32) -> u64 {
        self.resized.num_pixels() * u64::from(self.grid.t) * u64::from(temporal_patch_size)
    }
}

impl ProcessorConfig {
    /// The checkpoint's pixel bounds with a request's own in their place.
    ///
    /// # Errors
    /// Bounds that leave nothing, or more pixels than the checkpoint allows.
    pub fn pixel_bounds(
        &self,
        min_pixels: Option<u64>,
        max_pixels: Option<u64>,
    ) -> Result<PixelBounds, ProcessorError> {
        let limit = self.pixel_bounds.max_pixels;
        let max_pixels = max_pixels.unwrap_or(limit);
        let min_pixels = min_pixels.unwrap_or(self.pixel_bounds.min_pixels.min(max_pixels));
        if max_pixels > limit {
            return Err(ProcessorError::MaxPixels { max_pixels, limit });
        }
        if min_pixels == 0 || min_pixels > max_pixels {
            return Err(ProcessorError::PixelBounds { min_pixels, max_pixels });
        }
        Ok(PixelBounds { min_pixels, max_pixels })
    }

    /// Describes a still image.
    ///
    /// # Errors
    /// An aspect ratio beyond what the model accepts.
    pub fn describe_image(
        &self,
        info: &ImageInfo,
        media_id: MediaId,
        bounds: PixelBounds,
    ) -> Result<MediaDescription, MediaError> {
        self.describe(MediaKind::Image, media_id, info.size(), 1, 0.0, bounds)
    }

    /// Describes a video given as a list of frames, each by header and hash. All frames are resized to
    /// the size that the first one gets under the bounds of images (specification §12).
    ///
    /// # Errors
    /// An empty list, an fps that is no positive number, or the first frame's aspect ratio.
    pub fn describe_frames(
        &self,
        frames: &[(ImageInfo, MediaId)],
        fps: f64,
        bounds: PixelBounds,
    ) -> Result<MediaDescription, ProcessorError> {
        if !FPS_RANGE.contains(&fps) {
            let (min, max) = (*FPS_RANGE.start(), *FPS_RANGE.end());
            return Err(ProcessorError::Fps { fps, min, max });
        }
        let failed = |source| ProcessorError::Frame { frame: 0, source };
        let (first, _) = frames.first().ok_or(failed(MediaError::NoFrames))?;
        let ids: Vec<MediaId> = frames.iter().map(|(_, id)| *id).collect();
        let seconds_per_grid = f64::from(self.recipe.patch.temporal_patch_size) / fps;
        let (media_id, count) = (frame_list_id(&ids), frames.len() as u32);
        self.describe(MediaKind::Video, media_id, first.size(), count, seconds_per_grid, bounds)
            .map_err(failed)
    }

    fn describe(
        &self,
        kind: MediaKind,
        media_id: MediaId,
        source: Size,
        num_frames: u32,
        seconds_per_grid: f64,
        bounds: PixelBounds,
    ) -> Result<MediaDescription, MediaError> {
        let patch = &self.recipe.patch;
        let PixelBounds { min_pixels, max_pixels } = bounds;
        let factor = patch.size_factor();
        let resized = smart_resize(source.height, source.width, factor, min_pixels, max_pixels)?;
        let grid = patch.grid(num_frames, resized);
        let num_tokens = u32::try_from(grid.num_visual_tokens(patch.merge_size))
            .map_err(|_| MediaError::PixelRange { min_pixels, max_pixels })?;
        let frame_indices = match kind {
            MediaKind::Image => Vec::new(),
            MediaKind::Video => (0..num_frames).collect(),
        };
        Ok(MediaDescription {
            kind,
            media_id,
            frame_indices,
            source,
            resized,
            grid,
            num_tokens,
            seconds_per_grid,
        })
    }
}
