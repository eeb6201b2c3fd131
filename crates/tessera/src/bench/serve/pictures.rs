//! Pictures made in memory: equal for equal seeds, about as large as photographs once compressed.

use bytes::Bytes;
use image::codecs::jpeg::JpegEncoder;
use image::{ImageError, Rgb, RgbImage};

use crate::bench::random::Random;

const JPEG_QUALITY: u8 = 85;
/// Side of the squares that a picture is made of.
const SQUARE: u32 = 48;

/// A JPEG of coloured squares with gradients and a little noise.
///
/// # Errors
/// A side beyond what JPEG can hold.
pub fn jpeg(width: u32, height: u32, seed: u64) -> Result<Bytes, ImageError> {
    let mut noise = Random::new(seed);
    let picture = RgbImage::from_fn(width, height, |x, y| {
        let square = u64::from(x / SQUARE) << 32 | u64::from(y / SQUARE);
        let colour = Random::new(seed ^ square).next().to_le_bytes();
        let grain = noise.next() as u8 & 7;
        let slope = ((x % SQUARE + y % SQUARE) / 2) as u8;
        Rgb([colour[0], colour[1], colour[2]]
            .map(|value| (value / 2).saturating_add(slope) + grain))
    });
    let mut file = Vec::new();
    JpegEncoder::new_with_quality(&mut file, JPEG_QUALITY).encode_image(&picture)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_follow_size_and_seed() {
        let file = jpeg(100, 60, 1).expect("a picture");
        let read = image::load_from_memory(&file).expect("a JPEG");
        assert_eq!((read.width(), read.height()), (100, 60));
        assert_eq!(jpeg(100, 60, 1).expect("a picture"), file);
        assert_ne!(jpeg(100, 60, 2).expect("a picture"), file);
    }
}
