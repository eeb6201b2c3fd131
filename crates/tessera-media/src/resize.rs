//! Separable bicubic resampling on bytes, bit for bit as the reference stacks do it (specification §5):
//! Keys' kernel with a = −0.5, support widened when shrinking, horizontal pass first, the result of each
//! pass rounded and clamped to bytes, a pass skipped when its side does not change.

use std::borrow::Cow;

use crate::rgb::RgbImage8;

/// Whose rounding is reproduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ResizeRecipe {
    /// torchvision on uint8 tensors (the "fast" processors of `transformers`, and vLLM): weights in 16
    /// bits, with as many fraction bits as the largest weight of the axis leaves room for.
    #[default]
    Torchvision,
    /// Pillow up to version 12 (the "slow" processors, `qwen-vl-utils`): weights with 22 fraction bits.
    Pillow,
}

impl ResizeRecipe {
    /// Stable name, part of the embedding key.
    pub fn name(self) -> &'static str {
        match self {
            Self::Torchvision => "torchvision",
            Self::Pillow => "pillow",
        }
    }
}

/// Resizes to `width × height`.
///
/// # Panics
/// If a side of the result is zero: sizes come from [`crate::smart_resize`], which never gives one.
pub fn resize(image: &RgbImage8, width: u32, height: u32, recipe: ResizeRecipe) -> RgbImage8 {
    assert!(width > 0 && height > 0, "a resized image has pixels");
    let mut resized = Cow::Borrowed(image);
    if resized.width() != width {
        resized = Cow::Owned(along_rows(&resized, width, recipe));
    }
    if resized.height() != height {
        resized = Cow::Owned(along_columns(&resized, height, recipe));
    }
    resized.into_owned()
}

/// Source samples and their weights for each output sample of one axis.
struct Axis<W> {
    /// First source index, and where its weights start and end.
    windows: Vec<(usize, std::ops::Range<usize>)>,
    weights: Vec<W>,
    /// Fraction bits of the weights.
    precision: u32,
}

impl Axis<f64> {
    fn new(n_in: usize, n_out: usize) -> Self {
        let scale = n_in as f64 / n_out as f64;
        let filter_scale = scale.max(1.0);
        let support = 2.0 * filter_scale;
        let inverse = 1.0 / filter_scale;
        let mut axis =
            Self { windows: Vec::with_capacity(n_out), weights: Vec::new(), precision: 0 };
        for out in 0..n_out {
            let center = (out as f64 + 0.5) * scale;
            // Casting truncates toward zero and takes negative values to 0, as the recipe asks.
            let low = (center - support + 0.5) as usize;
            let high = ((center + support + 0.5) as usize).min(n_in);
            let start = axis.weights.len();
            axis.weights
                .extend((low..high).map(|i| keys_kernel((i as f64 - center + 0.5) * inverse)));
            let sum: f64 = axis.weights[start..].iter().sum();
            if sum != 0.0 {
                axis.weights[start..].iter_mut().for_each(|weight| *weight /= sum);
            }
            axis.windows.push((low, start..axis.weights.len()));
        }
        axis
    }

    /// Fraction bits with which every weight fits 15 bits and a sign, at most 22.
    fn precision_for_16_bits(&self) -> u32 {
        let largest = self.weights.iter().copied().fold(0.0, f64::max);
        let fits =
            |bits: u32| (0.5 + largest * f64::from(1u32 << bits)) as i64 <= i64::from(i16::MAX);
        (1..=22).take_while(|&bits| fits(bits)).last().unwrap_or(0)
    }

    fn quantise<W: Weight>(self, precision: u32) -> Axis<W> {
        let one = f64::from(1u32 << precision);
        let weights = self.weights.iter().map(|&weight| W::from_scaled(weight * one)).collect();
        Axis { windows: self.windows, weights, precision }
    }
}

/// Keys, "Cubic convolution interpolation for digital image processing" (1981), a = −0.5.
fn keys_kernel(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// A quantised weight; 16-bit ones let the compiler use the narrow multiply.
trait Weight: Copy + Into<i32> {
    /// Rounds half away from zero. The value is in range by the choice of the precision.
    fn from_scaled(value: f64) -> Self;
}

impl Weight for i16 {
    fn from_scaled(value: f64) -> Self {
        (value + 0.5f64.copysign(value)) as i16
    }
}

impl Weight for i32 {
    fn from_scaled(value: f64) -> Self {
        (value + 0.5f64.copysign(value)) as i32
    }
}

impl<W: Weight> Axis<W> {
    fn windows(&self) -> impl Iterator<Item = (usize, &[W])> {
        self.windows.iter().map(|(low, range)| (*low, &self.weights[range.clone()]))
    }

    /// Sums `weights[k] · samples[k]` lane by lane and rounds to bytes.
    #[inline(always)]
    fn weigh<const N: usize, S: Copy + Into<i16>>(
        &self,
        weights: &[W],
        samples: impl Iterator<Item = [S; N]>,
    ) -> [u8; N] {
        let mut sums = [1i32 << (self.precision - 1); N];
        for (&weight, lanes) in weights.iter().zip(samples) {
            let weight: i32 = weight.into();
            for (sum, lane) in sums.iter_mut().zip(lanes) {
                let lane: i16 = lane.into();
                *sum += i32::from(lane) * weight;
            }
        }
        sums.map(|sum| (sum >> self.precision).clamp(0, 255) as u8)
    }
}

fn along_rows(image: &RgbImage8, width: u32, recipe: ResizeRecipe) -> RgbImage8 {
    let axis = Axis::new(image.width() as usize, width as usize);
    match recipe {
        ResizeRecipe::Torchvision => {
            let precision = axis.precision_for_16_bits();
            weigh_rows(image, width, &axis.quantise::<i16>(precision))
        }
        ResizeRecipe::Pillow => weigh_rows(image, width, &axis.quantise::<i32>(22)),
    }
}

fn along_columns(image: &RgbImage8, height: u32, recipe: ResizeRecipe) -> RgbImage8 {
    let axis = Axis::new(image.height() as usize, height as usize);
    match recipe {
        ResizeRecipe::Torchvision => {
            let precision = axis.precision_for_16_bits();
            weigh_columns(image, height, &axis.quantise::<i16>(precision))
        }
        ResizeRecipe::Pillow => weigh_columns(image, height, &axis.quantise::<i32>(22)),
    }
}

/// Rows handled at once by the horizontal pass, and their samples per column.
const BAND_ROWS: usize = 8;
const BAND_LANES: usize = 3 * BAND_ROWS;

/// Horizontal pass. A band of rows is turned so that the samples of one column lie side by side; each
/// weight then multiplies a contiguous run of lanes instead of samples three bytes apart.
fn weigh_rows<W: Weight>(image: &RgbImage8, width: u32, axis: &Axis<W>) -> RgbImage8 {
    let mut out = RgbImage8::black(width, image.height());
    let (in_stride, out_stride) = (image.width() as usize * 3, width as usize * 3);
    let mut band = vec![[0i16; BAND_LANES]; image.width() as usize];
    let bands = image.pixels().chunks(in_stride * BAND_ROWS);
    let out_bands = out.pixels_mut().chunks_mut(out_stride * BAND_ROWS);
    for (rows, out_rows) in bands.zip(out_bands) {
        for (r, row) in rows.chunks_exact(in_stride).enumerate() {
            for (lanes, pixel) in band.iter_mut().zip(row.chunks_exact(3)) {
                for (c, &sample) in pixel.iter().enumerate() {
                    lanes[c * BAND_ROWS + r] = sample.into();
                }
            }
        }
        for (x, (low, weights)) in axis.windows().enumerate() {
            let lanes = axis.weigh(weights, band[low..].iter().copied());
            for (r, out_row) in out_rows.chunks_exact_mut(out_stride).enumerate() {
                for (c, sample) in out_row[3 * x..3 * x + 3].iter_mut().enumerate() {
                    *sample = lanes[c * BAND_ROWS + r];
                }
            }
        }
    }
    out
}

/// Samples of a row handled at once by the vertical pass.
const COLUMN_LANES: usize = 64;

/// Vertical pass: each output row is a weighted sum of whole source rows.
fn weigh_columns<W: Weight>(image: &RgbImage8, height: u32, axis: &Axis<W>) -> RgbImage8 {
    let mut out = RgbImage8::black(image.width(), height);
    let stride = image.width() as usize * 3;
    for (out_row, (low, weights)) in out.pixels_mut().chunks_exact_mut(stride).zip(axis.windows()) {
        let rows = || image.pixels()[low * stride..].chunks_exact(stride);
        let (blocks, rest) = out_row.as_chunks_mut::<COLUMN_LANES>();
        let done = blocks.len() * COLUMN_LANES;
        for (b, block) in blocks.iter_mut().enumerate() {
            let columns = rows().map(|row| {
                *row[b * COLUMN_LANES..].first_chunk::<COLUMN_LANES>().expect("a whole block")
            });
            *block = axis.weigh(weights, columns);
        }
        for (i, sample) in rest.iter_mut().enumerate() {
            [*sample] = axis.weigh(weights, rows().map(|row| [row[done + i]]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RECIPES: [ResizeRecipe; 2] = [ResizeRecipe::Torchvision, ResizeRecipe::Pillow];

    fn noise(width: u32, height: u32, seed: u64) -> RgbImage8 {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let pixels = (0..width as usize * height as usize * 3)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        RgbImage8::new(width, height, pixels).expect("a whole picture")
    }

    /// The recipe written the plain way, one output sample at a time.
    fn plainly(image: &RgbImage8, n_out: usize, rows: bool, recipe: ResizeRecipe) -> RgbImage8 {
        let (w, h) = (image.width() as usize, image.height() as usize);
        let n_in = if rows { w } else { h };
        let axis = Axis::new(n_in, n_out);
        let precision = match recipe {
            ResizeRecipe::Torchvision => axis.precision_for_16_bits(),
            ResizeRecipe::Pillow => 22,
        };
        let axis = axis.quantise::<i32>(precision);
        let (out_w, out_h) = if rows { (n_out, h) } else { (w, n_out) };
        let mut out = RgbImage8::black(out_w as u32, out_h as u32);
        for y in 0..out_h {
            for x in 0..out_w {
                let (low, range) = &axis.windows[if rows { x } else { y }];
                for c in 0..3 {
                    let mut sum = 1i64 << (precision - 1);
                    for (k, &weight) in axis.weights[range.clone()].iter().enumerate() {
                        let (sx, sy) = if rows { (low + k, y) } else { (x, low + k) };
                        sum += i64::from(weight) * i64::from(image.pixels()[(sy * w + sx) * 3 + c]);
                    }
                    out.pixels_mut()[(y * out_w + x) * 3 + c] =
                        (sum >> precision).clamp(0, 255) as u8;
                }
            }
        }
        out
    }

    #[test]
    fn a_flat_image_stays_flat_and_an_equal_size_stays_equal() {
        for recipe in RECIPES {
            let flat = RgbImage8::new(31, 17, [9, 120, 250].repeat(31 * 17)).expect("a picture");
            let resized = resize(&flat, 56, 28, recipe);
            assert!(resized.pixels().chunks_exact(3).all(|pixel| pixel == [9, 120, 250]));
            let image = noise(20, 11, 3);
            assert_eq!(resize(&image, 20, 11, recipe), image);
        }
    }

    #[test]
    fn sixteen_bit_weights_have_as_many_bits_as_fit() {
        for (n_in, n_out) in [(97, 84), (50, 28), (10, 560), (4000, 28), (7, 56)] {
            let axis = Axis::new(n_in, n_out);
            let largest = axis.weights.iter().copied().fold(0.0, f64::max);
            let precision = axis.precision_for_16_bits();
            let scaled = |bits: u32| (0.5 + largest * f64::from(1u32 << bits)).trunc();
            assert!(scaled(precision) < 32768.0, "{n_in} to {n_out}");
            assert!(precision == 22 || scaled(precision + 1) >= 32768.0, "{n_in} to {n_out}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn both_passes_equal_the_plain_sum(
            width in 1u32..70, height in 1u32..40, out_w in 1u32..90, out_h in 1u32..90, seed in 0u64..99,
        ) {
            let image = noise(width, height, seed);
            for recipe in RECIPES {
                let mut expected = image.clone();
                if out_w != width {
                    expected = plainly(&expected, out_w as usize, true, recipe);
                }
                if out_h != height {
                    expected = plainly(&expected, out_h as usize, false, recipe);
                }
                prop_assert!(resize(&image, out_w, out_h, recipe) == expected, "{:?}", recipe);
            }
        }
    }
}
