//! Why a media item was refused. Every variant is the sender's fault: the item fails, the server goes on.

use crate::header::ImageFormat;

/// A media item that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    #[error("the media item is empty")]
    Empty,
    #[error("the media item has {bytes} bytes, at most {limit} are allowed")]
    TooManyBytes { bytes: u64, limit: u64 },
    #[error("the image is {width} x {height} pixels, at most {limit} pixels are allowed")]
    TooManyPixels { width: u32, height: u32, limit: u64 },
    #[error("unknown image format; PNG, JPEG, WebP, GIF and BMP are supported")]
    UnknownFormat,
    #[error("this kind of {format} is not supported: {reason}")]
    Unsupported { format: ImageFormat, reason: String },
    #[error("the {format} data end early")]
    Truncated { format: ImageFormat },
    #[error("the {format} data are malformed: {reason}")]
    Malformed { format: ImageFormat, reason: &'static str },
    #[error("the {format} data cannot be decoded")]
    Decode {
        format: ImageFormat,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(
        "the image is {width} x {height} pixels; one side may be at most {max_ratio} times the other"
    )]
    AspectRatio { width: u32, height: u32, max_ratio: u32 },
    #[error("min_pixels {min_pixels} and max_pixels {max_pixels} leave no size")]
    PixelRange { min_pixels: u64, max_pixels: u64 },
    #[error("the video has no frames")]
    NoFrames,
    #[error("the video has {frames} frames, at most {limit} are allowed")]
    TooManyFrames { frames: usize, limit: u32 },
    #[error("frame {frame} is {width} x {height} pixels, the first frame is not")]
    FrameSizesDiffer { frame: usize, width: u32, height: u32 },
    #[error("{width} x {height} pixels are not a whole number of merged patches")]
    NotPatchAligned { width: u32, height: u32 },
}

impl MediaError {
    /// Whether a limit was exceeded (as opposed to bad data), which some protocols report differently.
    pub fn is_limit(&self) -> bool {
        matches!(
            self,
            Self::TooManyBytes { .. } | Self::TooManyPixels { .. } | Self::TooManyFrames { .. }
        )
    }

    /// Wraps what a decoder of the `image` crate said.
    pub(crate) fn from_image(format: ImageFormat, error: image::ImageError) -> Self {
        match error {
            image::ImageError::IoError(source)
                if source.kind() == std::io::ErrorKind::UnexpectedEof =>
            {
                Self::Truncated { format }
            }
            image::ImageError::Unsupported(source) => {
                Self::Unsupported { format, reason: source.to_string() }
            }
            source => Self::Decode { format, source: Box::new(source) },
        }
    }
}
