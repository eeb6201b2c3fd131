//! Format, size and orientation from the first bytes of an image, without decoding and without
//! allocating. What is found here bounds everything that follows.

use std::fmt;

use crate::config::MediaLimits;
use crate::error::MediaError;
use crate::exif;
use crate::jpeg;
use crate::size::Size;

/// Still image formats that are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    Png,
    Jpeg,
    WebP,
    Gif,
    Bmp,
}

impl ImageFormat {
    /// Recognises a format by its signature; names and content types of a request are not trusted.
    pub fn detect(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a, ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'B', b'M', ..] => Some(Self::Bmp),
            _ => None,
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
        })
    }
}

/// How a stored picture must be turned to be seen upright: an EXIF orientation, 1 to 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Orientation(u8);

impl Orientation {
    /// Stored as it is seen.
    pub const UPRIGHT: Self = Self(1);

    /// The values of EXIF tag 0x0112; `None` outside 1..=8.
    pub fn from_exif(value: u16) -> Option<Self> {
        (1..=8).contains(&value).then_some(Self(value as u8))
    }

    /// 1 to 8.
    pub fn exif_value(self) -> u8 {
        self.0
    }

    /// Whether width and height change places.
    pub fn swaps_sides(self) -> bool {
        self.0 >= 5
    }
}

/// What a header says about an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageInfo {
    pub format: ImageFormat,
    /// Pixels across after `orientation` was applied.
    pub width: u32,
    /// Pixels down after `orientation` was applied.
    pub height: u32,
    pub orientation: Orientation,
}

impl ImageInfo {
    /// Width and height as seen.
    pub fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }

    /// Width and height as stored.
    pub(crate) fn stored_size(&self) -> Size {
        match self.orientation.swaps_sides() {
            true => Size::new(self.height, self.width),
            false => self.size(),
        }
    }
}

/// Reads format, size and orientation. Cost: a walk over chunk headers, no pixel is decoded.
///
/// # Errors
/// Unknown or broken headers, and everything beyond `limits`.
pub fn probe(bytes: &[u8], limits: &MediaLimits) -> Result<ImageInfo, MediaError> {
    limits.check_bytes(bytes)?;
    let format = ImageFormat::detect(bytes).ok_or(MediaError::UnknownFormat)?;
    let stored = match format {
        ImageFormat::Png => png_size(bytes),
        ImageFormat::Jpeg => Some(jpeg::frame_size(bytes)?),
        ImageFormat::WebP => webp_size(bytes),
        ImageFormat::Gif => gif_size(bytes),
        ImageFormat::Bmp => bmp_size(bytes),
    }
    .ok_or(MediaError::Truncated { format })?;
    limits.check_size(format, stored)?;
    let orientation = exif::orientation(format, bytes).unwrap_or(Orientation::UPRIGHT);
    let seen = match orientation.swaps_sides() {
        true => Size::new(stored.height, stored.width),
        false => stored,
    };
    Ok(ImageInfo { format, width: seen.width, height: seen.height, orientation })
}

/// IHDR is the first chunk: signature 8, length 4, type 4, then width and height, big-endian.
fn png_size(bytes: &[u8]) -> Option<Size> {
    let header = bytes.get(8..24)?;
    if &header[4..8] != b"IHDR" {
        return Some(Size::new(0, 0));
    }
    Some(Size::new(be_u32(header, 8)?, be_u32(header, 12)?))
}

/// The logical screen of a GIF: signature 6, width and height as u16 little-endian.
fn gif_size(bytes: &[u8]) -> Option<Size> {
    Some(Size::new(le_u16(bytes, 6)?.into(), le_u16(bytes, 8)?.into()))
}

/// The DIB header follows the 14-byte file header and starts with its own length; 12 bytes is the old
/// OS/2 form with 16-bit sides. A negative height means rows from the top.
fn bmp_size(bytes: &[u8]) -> Option<Size> {
    if le_u32(bytes, 14)? == 12 {
        return Some(Size::new(le_u16(bytes, 18)?.into(), le_u16(bytes, 20)?.into()));
    }
    let (width, height) = (le_u32(bytes, 18)? as i32, le_u32(bytes, 22)? as i32);
    Some(Size::new(width.max(0) as u32, height.unsigned_abs()))
}

/// The first chunk of the RIFF container says which of three headers follows (RFC 9649).
fn webp_size(bytes: &[u8]) -> Option<Size> {
    let body = bytes.get(20..)?;
    match bytes.get(12..16)? {
        // Frame tag 3, start code 3, then 14-bit sides.
        b"VP8 " => {
            let (width, height) = (le_u16(body, 6)?, le_u16(body, 8)?);
            Some(Size::new(u32::from(width & 0x3fff), u32::from(height & 0x3fff)))
        }
        // Signature 1, then 14 bits of width - 1 and 14 bits of height - 1.
        b"VP8L" => {
            let packed = le_u32(body, 1)?;
            Some(Size::new((packed & 0x3fff) + 1, (packed >> 14 & 0x3fff) + 1))
        }
        // Flags 4, then 24 bits of width - 1 and 24 bits of height - 1.
        b"VP8X" => {
            let side = |at: usize| Some(le_u32(&[body.get(at..at + 3)?, &[0]].concat(), 0)? + 1);
            Some(Size::new(side(4)?, side(7)?))
        }
        _ => Some(Size::new(0, 0)),
    }
}

pub(crate) fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

pub(crate) fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn le_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn png_header(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        bytes.extend(width.to_be_bytes());
        bytes.extend(height.to_be_bytes());
        bytes.extend([8, 2, 0, 0, 0]);
        bytes
    }

    #[test]
    fn a_huge_header_is_refused_at_once() {
        let refused = probe(&png_header(50_000, 50_000), &MediaLimits::default());
        assert!(
            matches!(refused, Err(MediaError::TooManyPixels { width: 50_000, height: 50_000, .. })),
            "{refused:?}"
        );
        let allowed =
            probe(&png_header(8192, 8192), &MediaLimits::default()).expect("at the limit");
        assert_eq!((allowed.width, allowed.height), (8192, 8192));
    }

    #[test]
    fn empty_unknown_cut_and_zero_sized_headers_are_typed_errors() {
        let limits = MediaLimits::default();
        assert!(matches!(probe(b"", &limits), Err(MediaError::Empty)));
        assert!(matches!(probe(b"<svg></svg>", &limits), Err(MediaError::UnknownFormat)));
        for length in 8..23 {
            let cut = probe(&png_header(5, 5)[..length], &limits);
            assert!(matches!(cut, Err(MediaError::Truncated { .. })), "{length}: {cut:?}");
        }
        let flat = probe(&png_header(0, 5), &limits);
        assert!(matches!(flat, Err(MediaError::Malformed { .. })), "{flat:?}");
        let small = MediaLimits { max_bytes: 20, ..limits };
        assert!(matches!(
            probe(&png_header(5, 5), &small),
            Err(MediaError::TooManyBytes { bytes: 29, limit: 20 })
        ));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_probe_panic(
            signature in 0usize..6, body in proptest::collection::vec(0u8..=255, 0..200),
        ) {
            let starts: [&[u8]; 6] = [
                b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X", b"GIF89a", b"BM", b"",
            ];
            let bytes = [starts[signature], &body].concat();
            if let Ok(info) = probe(&bytes, &MediaLimits::default()) {
                proptest::prop_assert!(info.width > 0 && info.height > 0);
            }
        }
    }
}
