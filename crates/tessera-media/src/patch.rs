//! Normalised patch rows in the order the vision tower expects (specification §5 and §6).

use tessera_types::GridThw;

use crate::error::MediaError;
use crate::rgb::RgbImage8;
use crate::size::Size;

/// Geometry and normalisation of the vision tower's input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PatchConfig {
    /// Side of a square patch in pixels.
    pub patch_size: u32,
    /// Side of the square of patches that one visual token merges.
    pub merge_size: u32,
    /// Frames per patch.
    pub temporal_patch_size: u32,
    /// Mean of each colour, of values in 0..1.
    pub image_mean: [f32; 3],
    /// Standard deviation of each colour, of values in 0..1.
    pub image_std: [f32; 3],
}

impl Default for PatchConfig {
    /// Every published size of Qwen2.5-VL.
    fn default() -> Self {
        Self {
            patch_size: 14,
            merge_size: 2,
            temporal_patch_size: 2,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl PatchConfig {
    /// Both sides of a resized image are multiples of this.
    pub fn size_factor(&self) -> u32 {
        self.patch_size * self.merge_size
    }

    /// Values of one patch row: 3 · temporal_patch_size · patch_size².
    pub fn row_len(&self) -> usize {
        (3 * self.temporal_patch_size * self.patch_size * self.patch_size) as usize
    }

    /// The grid of `num_frames` frames of the given (resized) size.
    pub fn grid(&self, num_frames: u32, resized: Size) -> GridThw {
        GridThw {
            t: num_frames.div_ceil(self.temporal_patch_size),
            h: resized.height / self.patch_size,
            w: resized.width / self.patch_size,
        }
    }

    /// Normalised value of every byte of every colour: (px − m·255) / (s·255) in f32, as the fast
    /// processors fold the rescaling into the normalisation.
    fn tables(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|c| {
            let (mean, std) = (self.image_mean[c] * 255.0, self.image_std[c] * 255.0);
            std::array::from_fn(|px| (px as f32 - mean) / std)
        })
    }
}

/// Patch rows of one media item.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// `[num_patches, 3 · temporal_patch_size · patch_size²]`; a row is colour, frame, y, x.
    pub pixel_values: Vec<f32>,
    pub grid: GridThw,
}

/// Normalises frames of one size and cuts them into rows. A still image is a list of one frame; a list
/// that does not fill the last time slot repeats its last frame, so an image stands in both slots.
///
/// Row order: frame group, block row, block column, then the patches of one merge unit row by row.
///
/// # Errors
/// No frame, frames of different sizes, or sides that are not multiples of [`PatchConfig::size_factor`].
pub fn patchify(frames: &[RgbImage8], config: &PatchConfig) -> Result<Patches, MediaError> {
    let first = frames.first().ok_or(MediaError::NoFrames)?;
    let (width, height) = (first.width(), first.height());
    for (frame, image) in frames.iter().enumerate() {
        if (image.width(), image.height()) != (width, height) {
            let (width, height) = (image.width(), image.height());
            return Err(MediaError::FrameSizesDiffer { frame, width, height });
        }
    }
    if width % config.size_factor() != 0 || height % config.size_factor() != 0 {
        return Err(MediaError::NotPatchAligned { width, height });
    }
    let grid = config.grid(frames.len() as u32, Size::new(width, height));
    let tables = config.tables();
    let merge = config.merge_size as usize;
    let mut pixel_values = Vec::with_capacity(grid.num_patches() as usize * config.row_len());
    for group in 0..grid.t as usize {
        for block_row in 0..grid.h as usize / merge {
            for block_col in 0..grid.w as usize / merge {
                for unit in 0..merge * merge {
                    let row = block_row * merge + unit / merge;
                    let col = block_col * merge + unit % merge;
                    push_patch(&mut pixel_values, frames, group, (row, col), config, &tables);
                }
            }
        }
    }
    Ok(Patches { pixel_values, grid })
}

/// Appends the row of the patch at `(row, col)` of one frame group.
fn push_patch(
    out: &mut Vec<f32>,
    frames: &[RgbImage8],
    group: usize,
    (row, col): (usize, usize),
    config: &PatchConfig,
    tables: &[[f32; 256]; 3],
) {
    let side = config.patch_size as usize;
    let slots = config.temporal_patch_size as usize;
    for (c, table) in tables.iter().enumerate() {
        for slot in 0..slots {
            let frame = &frames[(group * slots + slot).min(frames.len() - 1)];
            for y in 0..side {
                let pixels = &frame.row(row * side + y)[3 * col * side..3 * (col + 1) * side];
                out.extend(pixels.chunks_exact(3).map(|pixel| table[usize::from(pixel[c])]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame whose bytes name their place.
    fn frame(width: u32, height: u32, offset: usize) -> RgbImage8 {
        let pixels = (0..(width * height * 3) as usize).map(|i| (i * 7 + offset) as u8).collect();
        RgbImage8::new(width, height, pixels).expect("a whole frame")
    }

    /// The definition, index by index, as an independent check of the loops above.
    fn expected(frames: &[RgbImage8], config: &PatchConfig, patch: usize, value: usize) -> f32 {
        let (w, side) = (frames[0].width() as usize / 14, 14);
        let h = frames[0].height() as usize / 14;
        let (group, in_group) = (patch / (h * w), patch % (h * w));
        let (block, unit) = (in_group / 4, in_group % 4);
        let row = block / (w / 2) * 2 + unit / 2;
        let col = block % (w / 2) * 2 + unit % 2;
        let (c, rest) = (value / (2 * side * side), value % (2 * side * side));
        let (slot, rest) = (rest / (side * side), rest % (side * side));
        let frame = &frames[(2 * group + slot).min(frames.len() - 1)];
        let pixel = frame.row(row * side + rest / side)[3 * (col * side + rest % side) + c];
        (f32::from(pixel) - config.image_mean[c] * 255.0) / (config.image_std[c] * 255.0)
    }

    #[test]
    fn rows_follow_merge_units_colours_slots_and_lines() {
        let config = PatchConfig::default();
        for count in [1, 2, 3] {
            let frames: Vec<_> = (0..count).map(|i| frame(84, 56, 31 * i)).collect();
            let patches = patchify(&frames, &config).expect("patches");
            assert_eq!(patches.grid, GridThw { t: count.div_ceil(2) as u32, h: 4, w: 6 });
            assert_eq!(patches.pixel_values.len(), patches.grid.num_patches() as usize * 1176);
            for (i, &value) in patches.pixel_values.iter().enumerate() {
                let wanted = expected(&frames, &config, i / 1176, i % 1176);
                assert_eq!(value.to_bits(), wanted.to_bits(), "{count} frames, value {i}");
            }
        }
    }

    #[test]
    fn frames_that_do_not_fit_together_or_the_grid_are_refused() {
        let config = PatchConfig::default();
        assert!(matches!(patchify(&[], &config), Err(MediaError::NoFrames)));
        let unequal = patchify(&[frame(28, 28, 0), frame(56, 28, 0)], &config);
        assert!(matches!(unequal, Err(MediaError::FrameSizesDiffer { frame: 1, .. })));
        let ragged = patchify(&[frame(28, 42, 0)], &config);
        assert!(matches!(ragged, Err(MediaError::NotPatchAligned { width: 28, height: 42 })));
    }
}
