//! Compressed bytes to 8-bit RGB. The conventions are those of the reference stacks (specification §3):
//! EXIF orientation applied, alpha (also of tRNS and grey-alpha pictures) composited on white, grey on
//! three channels, 16-bit samples cut to their high byte, the first frame of an animation.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::codecs::{bmp::BmpDecoder, gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{ColorType, ImageDecoder, Limits};

use crate::config::MediaLimits;
use crate::error::MediaError;
use crate::header::{ImageFormat, ImageInfo, probe};
use crate::jpeg;
use crate::rgb::RgbImage8;
use crate::size::Size;

/// Room for palettes, profiles and other side data that a decoder keeps beside the pixels.
const SIDE_DATA_BYTES: u64 = 16 << 20;
/// 16-bit RGBA, the widest pixel a decoder produces.
const MAX_BYTES_PER_PIXEL: u64 = 8;

/// Decodes one image upright. Its size is what [`probe`] says.
///
/// # Errors
/// Everything [`probe`] refuses, and data that are cut or broken.
pub fn decode(bytes: &[u8], limits: &MediaLimits) -> Result<RgbImage8, MediaError> {
    let info = probe(bytes, limits)?;
    // The decoders are not ours and their input is hostile: a panic in one fails this item only.
    let stored = catch_unwind(AssertUnwindSafe(|| decode_stored(bytes, &info))).unwrap_or(Err(
        MediaError::Malformed { format: info.format, reason: "the decoder gave up" },
    ))?;
    Ok(stored.oriented(info.orientation))
}

fn decode_stored(bytes: &[u8], info: &ImageInfo) -> Result<RgbImage8, MediaError> {
    let (format, size) = (info.format, info.stored_size());
    let from = |error| MediaError::from_image(format, error);
    let mut limits = Limits::no_limits();
    limits.max_image_width = Some(size.width);
    limits.max_image_height = Some(size.height);
    limits.max_alloc = Some(size.num_pixels() * MAX_BYTES_PER_PIXEL + SIDE_DATA_BYTES);
    let reader = Cursor::new(bytes);
    match format {
        ImageFormat::Jpeg => jpeg::decode(bytes, size),
        ImageFormat::Png => {
            let decoder = PngDecoder::with_limits(reader, limits.clone()).map_err(from)?;
            read(decoder, format, size, limits)
        }
        ImageFormat::WebP => read(WebPDecoder::new(reader).map_err(from)?, format, size, limits),
        ImageFormat::Gif => read(GifDecoder::new(reader).map_err(from)?, format, size, limits),
        ImageFormat::Bmp => read(BmpDecoder::new(reader).map_err(from)?, format, size, limits),
    }
}

fn read<D: ImageDecoder>(
    mut decoder: D,
    format: ImageFormat,
    size: Size,
    limits: Limits,
) -> Result<RgbImage8, MediaError> {
    let from = |error| MediaError::from_image(format, error);
    decoder.set_limits(limits).map_err(from)?;
    if decoder.dimensions() != (size.width, size.height) {
        return Err(MediaError::Malformed { format, reason: "two sizes in one file" });
    }
    let color = decoder.color_type();
    let mut pixels = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut pixels).map_err(from)?;
    let rgb = to_rgb(color, pixels)
        .ok_or_else(|| MediaError::Unsupported { format, reason: format!("{color:?} samples") })?;
    RgbImage8::new(size.width, size.height, rgb)
        .ok_or(MediaError::Malformed { format, reason: "unexpected number of samples" })
}

/// Converts interleaved samples (16-bit ones in native byte order) to RGB; `None` for float samples.
fn to_rgb(color: ColorType, samples: Vec<u8>) -> Option<Vec<u8>> {
    let bytes = match color {
        ColorType::L8 | ColorType::La8 | ColorType::Rgb8 | ColorType::Rgba8 => samples,
        ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16 => {
            let (pairs, _) = samples.as_chunks::<2>();
            pairs.iter().map(|pair| (u16::from_ne_bytes(*pair) >> 8) as u8).collect()
        }
        _ => return None,
    };
    let white = |pixel: &[u8], alpha: u8| -> [u8; 3] {
        std::array::from_fn(|c| over_white(pixel[c.min(pixel.len() - 1)], alpha))
    };
    Some(match color.channel_count() {
        1 => bytes.iter().flat_map(|&grey| [grey; 3]).collect(),
        2 => bytes.chunks_exact(2).flat_map(|p| white(&p[..1], p[1])).collect(),
        3 => bytes,
        _ => bytes.chunks_exact(4).flat_map(|p| white(&p[..3], p[3])).collect(),
    })
}

/// A sample of the given alpha over opaque white, rounded as Pillow's `alpha_composite` does (7 extra
/// bits, then an approximate division by 255 · 128).
fn over_white(value: u8, alpha: u8) -> u8 {
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    let sum = (value * alpha + 255 * (255 - alpha) + 128) << 7;
    (((sum >> 8) + sum) >> 15) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compositing_keeps_opaque_drops_transparent_and_rounds_between() {
        for value in 0..=255u8 {
            assert_eq!(over_white(value, 255), value);
            assert_eq!(over_white(value, 0), 255);
            for alpha in 0..=255u8 {
                let (v, a) = (f64::from(value), f64::from(alpha));
                let exact = (v * a + 255.0 * (255.0 - a)) / 255.0;
                let off = (f64::from(over_white(value, alpha)) - exact).abs();
                assert!(off <= 0.5, "{value} at {alpha}: off by {off}");
            }
        }
    }

    #[test]
    fn every_sample_layout_becomes_rgb() {
        let wide =
            |values: &[u16]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>();
        let cases = [
            (ColorType::L8, vec![7], [7, 7, 7]),
            (ColorType::La8, vec![7, 0], [255, 255, 255]),
            (ColorType::Rgb8, vec![1, 2, 3], [1, 2, 3]),
            (ColorType::Rgba8, vec![1, 2, 3, 255], [1, 2, 3]),
            (ColorType::L16, wide(&[0x12ff]), [0x12; 3]),
            (ColorType::La16, wide(&[0x1200, 0xffff]), [0x12; 3]),
            (ColorType::Rgb16, wide(&[0x01ff, 0x0200, 0xffff]), [1, 2, 255]),
            (ColorType::Rgba16, wide(&[0x0100, 0x0200, 0x0300, 0x00ff]), [255, 255, 255]),
        ];
        for (color, samples, expected) in cases {
            assert_eq!(to_rgb(color, samples).as_deref(), Some(&expected[..]), "{color:?}");
        }
        assert_eq!(to_rgb(ColorType::Rgb32F, vec![0; 12]), None);
    }
}
