//! From compressed bytes to patch rows in one call, as an encoder worker does it.

use crate::config::MediaLimits;
use crate::decode::decode;
use crate::error::MediaError;
use crate::patch::{PatchConfig, Patches, patchify};
use crate::resize::{ResizeRecipe, resize};
use crate::size::Size;

/// Everything that decides the pixel values of an image of given bytes and resized size. Part of the
/// embedding key.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PixelRecipe {
    pub resize: ResizeRecipe,
    pub patch: PatchConfig,
}

impl PixelRecipe {
    /// Version of the decoding conventions and of this crate's arithmetic; raised when pixels change.
    pub const VERSION: u32 = 1;

    /// Appends a canonical encoding to `out`, for hashing.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let PatchConfig { patch_size, merge_size, temporal_patch_size, image_mean, image_std } =
            self.patch;
        let name = self.resize.name();
        out.extend((name.len() as u32).to_le_bytes());
        out.extend(name.as_bytes());
        for value in [Self::VERSION, patch_size, merge_size, temporal_patch_size] {
            out.extend(value.to_le_bytes());
        }
        for value in image_mean.iter().chain(&image_std) {
            out.extend(value.to_bits().to_le_bytes());
        }
    }
}

/// Decodes the frames of one media item (one for an image), resizes each to `resized` and lays out the
/// patches. One decoded frame is held at its full size at a time.
///
/// # Errors
/// The first frame that is refused, by its own error; frame counts beyond `limits`.
pub fn prepare<F: AsRef<[u8]>>(
    frames: &[F],
    resized: Size,
    recipe: &PixelRecipe,
    limits: &MediaLimits,
) -> Result<Patches, MediaError> {
    limits.check_frames(frames.len())?;
    let factor = recipe.patch.size_factor();
    let Size { width, height } = resized;
    if width == 0 || height == 0 || width % factor != 0 || height % factor != 0 {
        return Err(MediaError::NotPatchAligned { width, height });
    }
    let frames = frames
        .iter()
        .map(|frame| Ok(resize(&decode(frame.as_ref(), limits)?, width, height, recipe.resize)))
        .collect::<Result<Vec<_>, MediaError>>()?;
    patchify(&frames, &recipe.patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_recipe_changes_its_encoding() {
        let base = PixelRecipe::default();
        type Edit = fn(&mut PixelRecipe);
        let edits: [Edit; 6] = [
            |r| r.resize = ResizeRecipe::Pillow,
            |r| r.patch.patch_size = 16,
            |r| r.patch.merge_size = 1,
            |r| r.patch.temporal_patch_size = 1,
            |r| r.patch.image_mean[1] += 0.1,
            |r| r.patch.image_std[2] += 0.1,
        ];
        let encode = |recipe: &PixelRecipe| {
            let mut out = Vec::new();
            recipe.encode_into(&mut out);
            out
        };
        let mut seen = std::collections::HashSet::from([encode(&base)]);
        for edit in edits {
            let mut recipe = base;
            edit(&mut recipe);
            assert!(seen.insert(encode(&recipe)), "{recipe:?} encodes like another recipe");
        }
    }

    #[test]
    fn frame_counts_and_sizes_are_checked_before_decoding() {
        let limits = MediaLimits { max_frames: 2, ..MediaLimits::default() };
        let recipe = PixelRecipe::default();
        let nothing: [&[u8]; 0] = [];
        let good = Size::new(56, 56);
        assert!(matches!(prepare(&nothing, good, &recipe, &limits), Err(MediaError::NoFrames)));
        let many: [&[u8]; 3] = [b"", b"", b""];
        assert!(matches!(
            prepare(&many, good, &recipe, &limits),
            Err(MediaError::TooManyFrames { frames: 3, limit: 2 })
        ));
        let one: [&[u8]; 1] = [b""];
        for size in [Size::new(0, 28), Size::new(28, 30)] {
            assert!(matches!(
                prepare(&one, size, &recipe, &limits),
                Err(MediaError::NotPatchAligned { .. })
            ));
        }
        assert!(matches!(prepare(&one, good, &recipe, &limits), Err(MediaError::Empty)));
    }
}
