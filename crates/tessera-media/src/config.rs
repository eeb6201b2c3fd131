//! What one media item may cost.

use crate::error::MediaError;
use crate::header::ImageFormat;
use crate::size::Size;

/// Caps on one media item. Decoding needs at most about 12 bytes per pixel beside the compressed bytes
/// (16-bit RGBA or progressive JPEG coefficients, plus the RGB result).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaLimits {
    /// Compressed bytes of one image or frame.
    pub max_bytes: u64,
    /// Pixels of one image or frame before it is resized.
    pub max_pixels: u64,
    /// Frames of one video.
    pub max_frames: u32,
}

impl Default for MediaLimits {
    /// 64 MiB and 64 Mi pixels (8192 × 8192) per image, 768 frames per video.
    fn default() -> Self {
        Self { max_bytes: 64 << 20, max_pixels: 64 << 20, max_frames: 768 }
    }
}

impl MediaLimits {
    /// Refuses limits under which nothing could be decoded. The error names the field.
    pub fn validate(&self) -> Result<(), &'static str> {
        match self {
            Self { max_bytes: 0, .. } => Err("max_bytes must be at least 1"),
            Self { max_pixels: 0, .. } => Err("max_pixels must be at least 1"),
            Self { max_frames: 0, .. } => Err("max_frames must be at least 1"),
            _ => Ok(()),
        }
    }

    pub(crate) fn check_bytes(&self, bytes: &[u8]) -> Result<(), MediaError> {
        let got = bytes.len() as u64;
        match got {
            0 => Err(MediaError::Empty),
            _ if got > self.max_bytes => {
                Err(MediaError::TooManyBytes { bytes: got, limit: self.max_bytes })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check_size(&self, format: ImageFormat, size: Size) -> Result<(), MediaError> {
        let Size { width, height } = size;
        if width == 0 || height == 0 {
            return Err(MediaError::Malformed { format, reason: "width or height is zero" });
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(MediaError::TooManyPixels { width, height, limit: self.max_pixels });
        }
        Ok(())
    }

    /// Refuses an empty list of frames and one that is too long.
    pub fn check_frames(&self, frames: usize) -> Result<(), MediaError> {
        match frames {
            0 => Err(MediaError::NoFrames),
            _ if frames > self.max_frames as usize => {
                Err(MediaError::TooManyFrames { frames, limit: self.max_frames })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_admit_nothing_are_refused_by_field() {
        assert_eq!(MediaLimits::default().validate(), Ok(()));
        let zero_pixels = MediaLimits { max_pixels: 0, ..MediaLimits::default() };
        assert!(zero_pixels.validate().is_err_and(|reason| reason.starts_with("max_pixels")));
    }
}
