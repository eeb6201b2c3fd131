//! The size an image is resized to before it is cut into patches.

use crate::error::MediaError;

/// Longest side over shortest side that the model accepts (exactly this passes).
pub const MAX_ASPECT_RATIO: u32 = 200;

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Size {
    pub width: u32,
    pub height: u32,
}

impl Size {
    pub fn new(width: u32, height: u32) -> Self {
        Self { width, height }
    }

    /// Number of pixels.
    pub fn num_pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }
}

/// Rounds both sides to multiples of `factor` (patch size times merge size), scaled so that the pixel
/// count lies in `min_pixels..=max_pixels`, keeping the aspect ratio as well as that allows.
///
/// The arithmetic is that of `smart_resize` in `transformers` (f64, in this order, round half to even;
/// a side may round to 0, which the "too small" branch then repairs). `qwen-vl-utils` differs for sides
/// of up to half a factor.
///
/// # Errors
/// [`MediaError::AspectRatio`] beyond 200 : 1, [`MediaError::PixelRange`] for bounds under which a side is zero or
/// does not fit 32 bits.
pub fn smart_resize(
    height: u32,
    width: u32,
    factor: u32,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<Size, MediaError> {
    let (h, w, f) = (f64::from(height), f64::from(width), f64::from(factor));
    let ratio = h.max(w) / h.min(w);
    if ratio.is_nan() || ratio > f64::from(MAX_ASPECT_RATIO) {
        return Err(MediaError::AspectRatio { width, height, max_ratio: MAX_ASPECT_RATIO });
    }
    let (min, max) = (min_pixels as f64, max_pixels as f64);
    let mut rows = (h / f).round_ties_even() * f;
    let mut cols = (w / f).round_ties_even() * f;
    if rows * cols > max {
        let beta = ((h * w) / max).sqrt();
        rows = f.max((h / beta / f).floor() * f);
        cols = f.max((w / beta / f).floor() * f);
    } else if rows * cols < min {
        let beta = (min / (h * w)).sqrt();
        rows = (h * beta / f).ceil() * f;
        cols = (w * beta / f).ceil() * f;
    }
    let representable = f..=f64::from(u32::MAX);
    if factor == 0 || !representable.contains(&rows) || !representable.contains(&cols) {
        return Err(MediaError::PixelRange { min_pixels, max_pixels });
    }
    Ok(Size { width: cols as u32, height: rows as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(width: u32, height: u32) -> (u32, u32) {
        let size = smart_resize(height, width, 28, 3136, 12_845_056).expect("a size");
        (size.width, size.height)
    }

    #[test]
    fn the_specification_examples_hold() {
        let cases = [
            ((501, 333), (504, 336)),
            ((640, 480), (644, 476)),
            ((70, 42), (56, 56)),
            ((98, 126), (112, 112)),
            ((9, 7), (84, 56)),
            ((60, 900), (56, 896)),
            ((1400, 50), (1400, 56)),
            ((97, 131), (84, 140)),
            ((1000, 10), (560, 28)),
            ((300, 14), (280, 28)),
            ((1, 200), (28, 812)),
        ];
        for ((width, height), expected) in cases {
            assert_eq!(published(width, height), expected, "{width} x {height}");
        }
    }

    #[test]
    fn an_aspect_ratio_of_200_passes_and_more_does_not() {
        assert!(smart_resize(1, 200, 28, 3136, 12_845_056).is_ok());
        for (height, width) in [(1, 201), (201, 1), (0, 5), (0, 0)] {
            let refused = smart_resize(height, width, 28, 3136, 12_845_056);
            assert!(matches!(refused, Err(MediaError::AspectRatio { .. })), "{height} x {width}");
        }
    }

    #[test]
    fn bounds_that_leave_no_size_are_refused() {
        for (min, max) in [(0, 100), (1 << 62, u64::MAX)] {
            let refused = smart_resize(5, 90, 28, min, max);
            assert!(matches!(refused, Err(MediaError::PixelRange { .. })), "{min}..={max}");
        }
    }

    proptest::proptest! {
        #[test]
        fn sides_are_multiples_and_pixels_in_range(
            height in 1u32..6000, width in 1u32..6000, min in 1u64..200_000, extra in 1u64..2_000_000,
        ) {
            // A range narrower than one unit may be missed by the rounding; a real one is not.
            let max = min * 4 + extra + 784 * 4;
            if let Ok(size) = smart_resize(height, width, 28, min, max) {
                proptest::prop_assert_eq!((size.width % 28, size.height % 28), (0, 0));
                proptest::prop_assert!(size.width >= 28 && size.height >= 28);
                let single_unit = size.width == 28 || size.height == 28;
                proptest::prop_assert!(size.num_pixels() >= min);
                proptest::prop_assert!(size.num_pixels() <= max || single_unit);
            }
        }
    }
}
