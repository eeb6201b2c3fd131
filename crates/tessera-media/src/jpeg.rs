//! JPEG: a walk over its markers (ITU T.81, annex B) and the decoder call.

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;

use crate::error::MediaError;
use crate::header::ImageFormat;
use crate::rgb::RgbImage8;
use crate::size::Size;

const FORMAT: ImageFormat = ImageFormat::Jpeg;
const END_OF_IMAGE: u8 = 0xd9;
/// A marker segment can state sides of up to 16 bits.
const MAX_SIDE: usize = u16::MAX as usize;

/// One marker and, if it has any, its parameters.
pub(crate) struct Segment<'a> {
    pub marker: u8,
    pub payload: &'a [u8],
}

/// Iterates over the segments up to and including the end-of-image marker. Entropy-coded data and stray
/// bytes between segments are stepped over; a cut ends the iteration early.
pub(crate) struct Segments<'a> {
    rest: &'a [u8],
}

impl<'a> Segments<'a> {
    /// `bytes` start with the start-of-image marker.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes.get(2..).unwrap_or_default() }
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    fn next(&mut self) -> Option<Segment<'a>> {
        loop {
            let at = self.rest.iter().position(|&byte| byte == 0xff)?;
            let fill = self.rest[at..].iter().take_while(|&&byte| byte == 0xff).count();
            let (&marker, rest) = self.rest[at + fill..].split_first()?;
            self.rest = rest;
            match marker {
                // A stuffed zero, a restart marker, a nested start or the temporary marker: no parameters.
                0x00 | 0x01 | 0xd0..=0xd8 => {}
                END_OF_IMAGE => {
                    self.rest = &[];
                    return Some(Segment { marker, payload: &[] });
                }
                _ => {
                    let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
                    let payload = rest.get(2..length)?;
                    self.rest = &rest[length..];
                    return Some(Segment { marker, payload });
                }
            }
        }
    }
}

/// The sides in the first frame header (SOF).
pub(crate) fn frame_size(bytes: &[u8]) -> Result<Size, MediaError> {
    for Segment { marker, payload } in Segments::new(bytes) {
        match marker {
            0xc4 | 0xc8 | 0xcc => {}
            0xc0..=0xc2 => {
                let [precision, h0, h1, w0, w1, ..] = *payload else {
                    return Err(MediaError::Malformed {
                        format: FORMAT,
                        reason: "short frame header",
                    });
                };
                if precision != 8 {
                    let reason = format!("{precision} bits per sample");
                    return Err(MediaError::Unsupported { format: FORMAT, reason });
                }
                let (height, width) = (u16::from_be_bytes([h0, h1]), u16::from_be_bytes([w0, w1]));
                return Ok(Size::new(width.into(), height.into()));
            }
            0xc3 | 0xc5..=0xcf => {
                let reason = "lossless, hierarchical or arithmetic coding".to_owned();
                return Err(MediaError::Unsupported { format: FORMAT, reason });
            }
            END_OF_IMAGE => {
                return Err(MediaError::Malformed { format: FORMAT, reason: "no frame header" });
            }
            _ => {}
        }
    }
    Err(MediaError::Truncated { format: FORMAT })
}

/// Decodes to RGB. Grey, YCbCr, RGB, CMYK and YCCK (four-component files are taken as Adobe-inverted, as
/// Pillow does: R = (255 − C)(255 − K) / 255 of the true inks).
///
/// The decoder fills what is missing with grey, so a file without an end-of-image marker is refused
/// first, and the decoder runs in its strict mode.
pub(crate) fn decode(bytes: &[u8], expected: Size) -> Result<RgbImage8, MediaError> {
    if !Segments::new(bytes).any(|segment| segment.marker == END_OF_IMAGE) {
        return Err(MediaError::Truncated { format: FORMAT });
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let failed = |source| MediaError::Decode { format: FORMAT, source: Box::new(source) };
    decoder.decode_headers().map_err(failed)?;
    let size = decoder.info().map(|info| Size::new(info.width.into(), info.height.into()));
    if size != Some(expected) {
        return Err(MediaError::Malformed { format: FORMAT, reason: "two sizes in one file" });
    }
    let pixels = decoder.decode().map_err(failed)?;
    RgbImage8::new(expected.width, expected.height, pixels)
        .ok_or(MediaError::Malformed { format: FORMAT, reason: "unexpected number of components" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &[u8] = &[
        0xff, 0xd8, // start
        0xff, 0xe0, 0, 4, 1, 2, // an application segment
        7, 7, 0xff, 0xff, 0xc0, 0, 8, 8, 0, 5, 0, 9,
        3, // stray bytes, fill, a frame header: 9 × 5
        0xff, 0xda, 0, 3, 0, 1, 2, 0xff, 0x00, 3, 0xff, 0xd1,
        4, // a scan with stuffing and a restart
        0xff, 0xd9, 0xff, 0xe1, // end, and something after it
    ];

    #[test]
    fn the_walk_finds_segments_and_stops_at_the_end_of_the_image() {
        let markers: Vec<u8> = Segments::new(TINY).map(|segment| segment.marker).collect();
        assert_eq!(markers, [0xe0, 0xc0, 0xda, 0xd9]);
        assert_eq!(frame_size(TINY).expect("a frame header"), Size::new(9, 5));
    }

    #[test]
    fn every_cut_before_the_end_marker_is_truncated() {
        let end = TINY.len() - 4;
        for length in 2..end + 1 {
            let found =
                Segments::new(&TINY[..length]).any(|segment| segment.marker == END_OF_IMAGE);
            assert!(!found, "cut at {length}");
            let refused = decode(&TINY[..length], Size::new(9, 5));
            assert!(matches!(refused, Err(MediaError::Truncated { .. })), "cut at {length}");
        }
    }

    #[test]
    fn kinds_of_jpeg_without_a_decoder_are_named() {
        let mut lossless = TINY.to_vec();
        lossless[12] = 0xc3;
        assert!(matches!(frame_size(&lossless), Err(MediaError::Unsupported { .. })));
        let mut deep = TINY.to_vec();
        deep[15] = 12;
        assert!(matches!(frame_size(&deep), Err(MediaError::Unsupported { .. })));
    }
}
