//! Boxes and points. The model answers in pixels of the resized image (specification §13); clients want
//! pixels of the image they sent.

use tessera_media::Size;

/// A box by two corners, in pixels from the upper left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Box2d {
    pub x1: f64,
    pub y1: f64,
    pub x2: f64,
    pub y2: f64,
}

/// A point of the resized image in pixels of the source image: x · w_source / w_resized, and y alike.
pub fn map_point((x, y): (f64, f64), resized: Size, source: Size) -> (f64, f64) {
    let scale = |value: f64, to: u32, from: u32| value * f64::from(to) / f64::from(from);
    (scale(x, source.width, resized.width), scale(y, source.height, resized.height))
}

/// A box of the resized image in pixels of the source image.
pub fn map_box(shape: Box2d, resized: Size, source: Size) -> Box2d {
    let (x1, y1) = map_point((shape.x1, shape.y1), resized, source);
    let (x2, y2) = map_point((shape.x2, shape.y2), resized, source);
    Box2d { x1, y1, x2, y2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_coordinates() {
        let (resized, source) = (Size::new(504, 336), Size::new(501, 333));
        assert_eq!(map_point((0.0, 0.0), resized, source), (0.0, 0.0));
        assert_eq!(map_point((504.0, 336.0), resized, source), (501.0, 333.0));
        assert_eq!(map_point((252.0, 84.0), resized, source), (250.5, 83.25));
        let whole = Box2d { x1: 0.0, y1: 168.0, x2: 504.0, y2: 336.0 };
        let expected = Box2d { x1: 0.0, y1: 166.5, x2: 501.0, y2: 333.0 };
        assert_eq!(map_box(whole, resized, source), expected);
    }
}
