//! Committed checkpoints and media, and media made on the spot.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Directory of a committed checkpoint.
pub fn model(name: &str) -> PathBuf {
    root().join(name)
}

/// Bytes of a committed picture.
///
/// # Panics
/// When there is none of that name.
pub fn media(name: &str) -> Vec<u8> {
    let path = media_path(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// File of a committed picture.
pub fn media_path(name: &str) -> PathBuf {
    root().join("media").join(name)
}

/// The bytes as a `data:` URL.
pub fn data_url(bytes: &[u8]) -> String {
    format!("data:application/octet-stream;base64,{}", STANDARD.encode(bytes))
}

/// A copy of a checkpoint to spoil; golden files stay behind.
pub fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(model(name)).expect("the checkpoint is there") {
        let entry = entry.expect("the checkpoint can be listed");
        if entry.path().is_file() {
            fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
        }
    }
    copy
}

/// A BMP file of `width` × `height` with a pattern that depends on `seed`; three bytes per pixel, so its
/// size is known.
pub fn bmp(width: u32, height: u32, seed: u32) -> Vec<u8> {
    let row = (width * 3).next_multiple_of(4);
    let size = 54 + row * height;
    let mut file = Vec::with_capacity(size as usize);
    file.extend(b"BM");
    for field in [size, 0, 54, 40, width, height] {
        file.extend(field.to_le_bytes());
    }
    // One plane, 24 bits per pixel, then six fields that may be zero.
    file.extend([1, 0, 24, 0]);
    file.resize(54, 0);
    for y in 0..height {
        for x in 0..width {
            let wave = (x / 16).wrapping_mul(seed) ^ (y / 16).wrapping_mul(seed + 7);
            file.extend([(x >> 2) as u8, (y >> 2) as u8, (wave * 37) as u8]);
        }
        file.resize(file.len() + (row - width * 3) as usize, 0);
    }
    file
}

/// A PNG whose header promises a size and which holds nothing else.
pub fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    // 8 bits per sample, RGB, no interlacing.
    header.extend([8, 2, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for chunk in [header, b"IDAT".to_vec(), b"IEND".to_vec()] {
        file.extend((chunk.len() as u32 - 4).to_be_bytes());
        file.extend(&chunk);
        file.extend(crc32(&chunk).to_be_bytes());
    }
    file
}

/// The checksum of PNG chunks (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { 0xEDB8_8320 ^ (crc >> 1) } else { crc >> 1 };
    let byte = |crc: u32, &byte: &u8| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc));
    !bytes.iter().fold(!0, byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_files_have_the_form_they_claim() {
        // The value that every description of the algorithm gives as its check.
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        let bmp = bmp(5, 3, 1);
        assert_eq!((bmp.len(), &bmp[..2]), (54 + 16 * 3, b"BM".as_slice()));
        let png = png_header(50_000, 40_000);
        assert_eq!(png[16..24], [0, 0, 0xC3, 0x50, 0, 0, 0x9C, 0x40]);
    }
}
