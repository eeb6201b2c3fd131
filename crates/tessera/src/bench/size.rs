//! Sizes of images.

use std::str::FromStr;

use serde::Serialize;
use tessera_model::VisionConfig;
use tessera_types::GridThw;

/// Size of an image, `WIDTHxHEIGHT` in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ImageSize {
    pub width: u32,
    pub height: u32,
}

impl ImageSize {
    /// The grid of such an image, its sides rounded to whole merge units.
    pub fn grid(self, vision: &VisionConfig) -> GridThw {
        let merge = vision.spatial_merge_size as u32;
        let unit = vision.patch_size as u32 * merge;
        let patches = |side: u32| ((side + unit / 2) / unit).max(1) * merge;
        GridThw { t: 1, h: patches(self.height), w: patches(self.width) }
    }
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
    fn grids_are_whole_merge_units() {
        let vision = crate::bench::shape::Shape::load("3b", None).expect("a shape").config.vision;
        let grid = |width, height| ImageSize { width, height }.grid(&vision);
        assert_eq!(grid(1008, 1008), GridThw { t: 1, h: 72, w: 72 });
        assert_eq!(grid(1, 45), GridThw { t: 1, h: 4, w: 2 });
    }

    #[test]
    fn both_sides_are_needed() {
        assert_eq!("56x28".parse(), Ok(ImageSize { width: 56, height: 28 }));
        for wrong in ["56", "56x", "0x28", "56X28", "-1x3"] {
            assert!(wrong.parse::<ImageSize>().is_err(), "{wrong}");
        }
    }
}
