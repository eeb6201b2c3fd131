//! The one pixel format of this crate: 8-bit RGB, rows from the top, no padding.

use crate::header::Orientation;

/// An image of `height` rows of `width` RGB pixels.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage8 {
    width: u32,
    height: u32,
    /// `[height, width, 3]`, row-major.
    pixels: Vec<u8>,
}

impl std::fmt::Debug for RgbImage8 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbImage8({} x {})", self.width, self.height)
    }
}

impl RgbImage8 {
    /// Wraps `pixels` of shape `[height, width, 3]`; `None` if their number is another.
    pub fn new(width: u32, height: u32, pixels: Vec<u8>) -> Option<Self> {
        let expected = (width as usize).checked_mul(height as usize)?.checked_mul(3)?;
        (pixels.len() == expected && expected > 0).then_some(Self { width, height, pixels })
    }

    /// A black image. Sizes come from limits that were checked before.
    pub(crate) fn black(width: u32, height: u32) -> Self {
        Self { width, height, pixels: vec![0; width as usize * height as usize * 3] }
    }

    pub fn width(&self) -> u32 {
        self.width
    }

    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[height, width, 3]`, row-major.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Row `y`: `[width, 3]`.
    pub fn row(&self, y: usize) -> &[u8] {
        let stride = self.width as usize * 3;
        &self.pixels[y * stride..(y + 1) * stride]
    }

    pub(crate) fn pixels_mut(&mut self) -> &mut [u8] {
        &mut self.pixels
    }

    /// Turns the stored picture the way it is meant to be seen (EXIF 2.3, tag 0x0112).
    #[must_use]
    pub fn oriented(self, orientation: Orientation) -> Self {
        let (w, h) = (self.width as isize, self.height as isize);
        // Source index, in pixels, of the upper left output pixel and the steps to its right and down.
        let (start, right, down) = match orientation.exif_value() {
            2 => (w - 1, -1, w),
            3 => (w * h - 1, -1, -w),
            4 => (w * (h - 1), 1, -w),
            5 => (0, w, 1),
            6 => (w * (h - 1), -w, 1),
            7 => (w * h - 1, -w, -1),
            8 => (w - 1, w, -1),
            _ => return self,
        };
        let (width, height) = match orientation.swaps_sides() {
            true => (self.height, self.width),
            false => (self.width, self.height),
        };
        let mut out = Self::black(width, height);
        let rows = out.pixels.chunks_exact_mut(width as usize * 3);
        for (y, row) in rows.enumerate() {
            let mut index = start + y as isize * down;
            for pixel in row.chunks_exact_mut(3) {
                let at = index as usize * 3;
                pixel.copy_from_slice(&self.pixels[at..at + 3]);
                index += right;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 × 2 pixels named by a digit each.
    fn picture(rows: &[&str]) -> RgbImage8 {
        let pixels = rows.iter().flat_map(|row| row.bytes().flat_map(|c| [c, c, c])).collect();
        RgbImage8::new(rows[0].len() as u32, rows.len() as u32, pixels).expect("a whole picture")
    }

    #[test]
    fn every_orientation_turns_the_picture_as_exif_says() {
        // How the stored rows "123" / "456" must be shown, by orientation value.
        let shown: [(u16, &[&str]); 8] = [
            (1, &["123", "456"]),
            (2, &["321", "654"]),
            (3, &["654", "321"]),
            (4, &["456", "123"]),
            (5, &["14", "25", "36"]),
            (6, &["41", "52", "63"]),
            (7, &["63", "52", "41"]),
            (8, &["36", "25", "14"]),
        ];
        for (value, expected) in shown {
            let orientation = Orientation::from_exif(value).expect("a value of 1 to 8");
            let turned = picture(&["123", "456"]).oriented(orientation);
            assert!(turned == picture(expected), "orientation {value}");
        }
    }

    #[test]
    fn a_buffer_of_the_wrong_size_is_no_image() {
        assert!(RgbImage8::new(2, 2, vec![0; 11]).is_none());
        assert!(RgbImage8::new(0, 2, vec![]).is_none());
        assert!(RgbImage8::new(u32::MAX, u32::MAX, vec![]).is_none());
    }
}
