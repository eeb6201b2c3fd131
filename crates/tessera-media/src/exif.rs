//! The orientation tag: where each container keeps its EXIF block, and the little of TIFF that is
//! needed to read one tag. Broken metadata never fails an image; it counts as absent.

use crate::header::{ImageFormat, Orientation, be_u32, le_u32};
use crate::jpeg::Segments;

const ORIENTATION_TAG: u16 = 0x0112;
/// Type code of a 16-bit unsigned TIFF value.
const SHORT: u16 = 3;
/// APP1 segments start with this; some writers repeat it in PNG and WebP.
const EXIF_PREFIX: &[u8] = b"Exif\0\0";

/// The orientation an image's metadata ask for, if they do.
pub(crate) fn orientation(format: ImageFormat, bytes: &[u8]) -> Option<Orientation> {
    let block = match format {
        ImageFormat::Jpeg => jpeg_block(bytes)?,
        ImageFormat::Png => png_block(bytes)?,
        ImageFormat::WebP => webp_block(bytes)?,
        ImageFormat::Gif | ImageFormat::Bmp => return None,
    };
    orientation_of_tiff(block.strip_prefix(EXIF_PREFIX).unwrap_or(block))
}

/// The first APP1 segment that carries EXIF, before the scan.
fn jpeg_block(bytes: &[u8]) -> Option<&[u8]> {
    Segments::new(bytes)
        .take_while(|segment| segment.marker != 0xda)
        .filter(|segment| segment.marker == 0xe1)
        .find(|segment| segment.payload.starts_with(EXIF_PREFIX))
        .map(|segment| segment.payload)
}

/// The eXIf chunk, which may stand on either side of the image data.
fn png_block(bytes: &[u8]) -> Option<&[u8]> {
    let mut at = 8usize;
    loop {
        let length = be_u32(bytes, at)? as usize;
        let kind = bytes.get(at + 4..at + 8)?;
        let body = at + 8..(at + 8).checked_add(length)?;
        match kind {
            b"eXIf" => return bytes.get(body),
            b"IEND" => return None,
            _ => at = body.end.checked_add(4)?,
        }
    }
}

/// The EXIF chunk of the RIFF container, which follows the image data.
fn webp_block(bytes: &[u8]) -> Option<&[u8]> {
    let mut at = 12usize;
    loop {
        let length = le_u32(bytes, at + 4)? as usize;
        let body = at + 8..(at + 8).checked_add(length)?;
        if bytes.get(at..at + 4)? == b"EXIF" {
            return bytes.get(body);
        }
        at = body.end.checked_add(length % 2)?;
    }
}

/// Reads the tag from the first directory of a TIFF block of either byte order.
fn orientation_of_tiff(tiff: &[u8]) -> Option<Orientation> {
    let big = match tiff.first_chunk()? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let bytes = *tiff.get(at..)?.first_chunk()?;
        Some(if big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let directory = if big { be_u32(tiff, 4)? } else { le_u32(tiff, 4)? } as usize;
    for entry in 0..usize::from(u16_at(directory)?) {
        let at = directory.checked_add(2 + 12 * entry)?;
        if u16_at(at)? == ORIENTATION_TAG && u16_at(at + 2)? == SHORT {
            return Orientation::from_exif(u16_at(at + 8)?);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiff(big: bool, value: u16) -> Vec<u8> {
        let u16s = |v: u16| {
            if big { v.to_be_bytes() } else { v.to_le_bytes() }
        };
        let u32s = |v: u32| {
            if big { v.to_be_bytes() } else { v.to_le_bytes() }
        };
        let mut out = if big { b"MM\0*".to_vec() } else { b"II*\0".to_vec() };
        out.extend(u32s(8));
        out.extend(u16s(2));
        for (tag, value) in [(0x0100, 99), (ORIENTATION_TAG, value)] {
            out.extend([u16s(tag), u16s(SHORT)].concat());
            out.extend(u32s(1));
            out.extend([u16s(value), u16s(0)].concat());
        }
        out
    }

    fn webp(block: &[u8]) -> Vec<u8> {
        let mut out = b"RIFF\0\0\0\0WEBPVP8 \x03\0\0\0abc\0EXIF".to_vec();
        out.extend((block.len() as u32).to_le_bytes());
        out.extend(block);
        out
    }

    #[test]
    fn both_byte_orders_are_read() {
        for big in [false, true] {
            for value in 1..=8 {
                assert_eq!(orientation_of_tiff(&tiff(big, value)), Orientation::from_exif(value));
            }
            assert_eq!(orientation_of_tiff(&tiff(big, 9)), None);
        }
    }

    #[test]
    fn a_prefix_before_the_block_is_skipped_in_any_container() {
        let block = tiff(true, 6);
        let expected = Orientation::from_exif(6);
        assert_eq!(orientation(ImageFormat::WebP, &webp(&block)), expected);
        let prefixed = [EXIF_PREFIX, &block].concat();
        assert_eq!(orientation(ImageFormat::WebP, &webp(&prefixed)), expected);
    }

    #[test]
    fn cut_metadata_counts_as_absent() {
        let block = tiff(false, 3);
        for length in 0..block.len() - 2 {
            assert_eq!(orientation_of_tiff(&block[..length]), None, "cut at {length}");
        }
        // A directory offset outside the block.
        let mut wild = block.clone();
        wild[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(orientation_of_tiff(&wild), None);
    }
}
