//! Sizes of images.

use std::str::FromStr;

use serde::Serialize;

/// Size of an image, `WIDTHxHEIGHT` in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ImageSize {
    pub width: u32,
    pub height: u32,
}

impl FromStr for ImageSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sides = text.split_once('x').map(|(width, height)| (width.parse(), height.parse()));
        match sides {
            Some((Ok(width), Ok(height))) if width > 0 && height > 0 => Ok(Self { width, height }),
            _ => Err("expected WIDTHxHEIGHT in pixels, for example 1008x1008".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_are_needed() {
        assert_eq!("56x28".parse(), Ok(ImageSize { width: 56, height: 28 }));
        for wrong in ["56", "56x", "0x28", "56X28", "-1x3"] {
            assert!(wrong.parse::<ImageSize>().is_err(), "{wrong}");
        }
    }
}
