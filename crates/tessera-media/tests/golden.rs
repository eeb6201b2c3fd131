//! Comparison with the files that `tests/golden` wrote from Pillow, torchvision and transformers.

#![allow(clippy::unwrap_used)]

mod support;

use safetensors::SafeTensors;
use serde_json::Value;
use support::{bytes, json, rows, sha256_hex};
use tessera_media::{
    MediaError, MediaLimits, PixelRecipe, ResizeRecipe, RgbImage8, Size, decode, prepare, probe,
    resize, smart_resize,
};

fn number(value: &Value) -> u32 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no size")) as u32
}

fn size(pair: &Value) -> Size {
    Size::new(number(&pair[0]), number(&pair[1]))
}

#[test]
fn sha256_equals_the_published_vectors() {
    let cases = [
        ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
    ];
    for (message, digest) in cases {
        assert_eq!(sha256_hex(message.as_bytes()), digest);
    }
}

/// Mean colour of the whole image and of its quadrants, the way the fixture states them.
fn means(image: &RgbImage8) -> Vec<[f64; 3]> {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let mean = |x0: usize, y0: usize, nx: usize, ny: usize| {
        let mut sum = [0.0; 3];
        for y in y0..y0 + ny {
            for pixel in image.row(y)[3 * x0..3 * (x0 + nx)].chunks_exact(3) {
                for c in 0..3 {
                    sum[c] += f64::from(pixel[c]);
                }
            }
        }
        sum.map(|s| s / (nx * ny) as f64)
    };
    let (a, b) = (w / 2, h / 2);
    let quadrants = [(0, 0), (w - a, 0), (0, h - b), (w - a, h - b)].map(|(x, y)| mean(x, y, a, b));
    [vec![mean(0, 0, w, h)], quadrants.to_vec()].concat()
}

fn assert_pixels(case: &Value, image: &RgbImage8) {
    let file = case["file"].as_str().unwrap();
    if let Some(digest) = case["sha256"].as_str() {
        assert_eq!(sha256_hex(image.pixels()), digest, "{file}");
    } else if let Some(path) = case["expected_png"].as_str() {
        let expected = decode(&bytes(&format!("media/{path}")), &MediaLimits::default()).unwrap();
        let allowed = case["max_difference"].as_u64().unwrap();
        let largest = image.pixels().iter().zip(expected.pixels()).map(|(a, b)| a.abs_diff(*b));
        assert!(u64::from(largest.max().unwrap()) <= allowed, "{file}");
    } else {
        let tolerance = case["tolerance"].as_f64().unwrap();
        let expected =
            std::iter::once(&case["mean_rgb"]).chain(case["quadrants"].as_array().unwrap());
        for (got, expected) in means(image).iter().zip(expected) {
            for c in 0..3 {
                let off = (got[c] - expected[c].as_f64().unwrap()).abs();
                assert!(off <= tolerance, "{file}: {got:?} against {expected}");
            }
        }
    }
}

#[test]
fn every_format_and_mode_decodes_to_the_reference_pixels() {
    let limits = MediaLimits::default();
    for case in rows("media/decoding.json") {
        let file = case["file"].as_str().unwrap();
        let data = bytes(&format!("media/{file}"));
        match case["error"].as_str() {
            Some("truncated") => {
                let refused = decode(&data, &limits);
                assert!(
                    matches!(refused, Err(MediaError::Truncated { .. })),
                    "{file}: {refused:?}"
                );
            }
            Some("too_large") => {
                let refused = probe(&data, &limits);
                assert!(matches!(refused, Err(MediaError::TooManyPixels { .. })), "{file}");
            }
            Some(other) => panic!("{file}: no such error as {other}"),
            None => {
                let expected = (number(&case["width"]), number(&case["height"]));
                let info = probe(&data, &limits).unwrap_or_else(|e| panic!("{file}: {e}"));
                assert_eq!((info.width, info.height), expected, "{file}: probe");
                let image = decode(&data, &limits).unwrap_or_else(|e| panic!("{file}: {e}: {e:?}"));
                assert_eq!((image.width(), image.height()), expected, "{file}: decode");
                assert_pixels(&case, &image);
            }
        }
    }
}

#[test]
fn every_cut_of_every_file_is_a_typed_error() {
    let limits = MediaLimits::default();
    for case in rows("media/decoding.json") {
        let file = case["file"].as_str().unwrap();
        let data = bytes(&format!("media/{file}"));
        if case["error"].is_string() || data.len() > 20_000 {
            continue;
        }
        // PNG, BMP and WebP of these files end in data that matter; a GIF may lack only its trailer and
        // later frames, so it is cut inside the first frame.
        let end = if file.ends_with(".gif") { data.len() / 4 } else { data.len() - 13 };
        for length in (0..end).step_by(37) {
            let result = decode(&data[..length], &limits);
            assert!(result.is_err(), "{file} cut at {length} of {} decodes", data.len());
        }
    }
}

#[test]
fn smart_resize_equals_the_reference() {
    for case in rows("smart_resize.json") {
        let bound = |key: &str| case[key].as_u64().unwrap();
        let got = smart_resize(
            number(&case["height"]),
            number(&case["width"]),
            28,
            bound("min_pixels"),
            bound("max_pixels"),
        );
        if case["error"] == "aspect_ratio" {
            assert!(matches!(got, Err(MediaError::AspectRatio { .. })), "{case}: {got:?}");
        } else {
            let expected = &case["resized"];
            let expected = Size::new(number(&expected["width"]), number(&expected["height"]));
            assert_eq!(got.unwrap(), expected, "{case}");
        }
    }
}

#[test]
fn resampling_equals_torchvision_bit_for_bit() {
    let data = bytes("resize/cases.safetensors");
    let tensors = SafeTensors::deserialize(&data).unwrap();
    for case in rows("resize/cases.json") {
        let name = case["case"].as_str().unwrap();
        let (source, target) = (size(&case["source"]), size(&case["target"]));
        let pixels = |key: &str| tensors.tensor(&format!("{name}.{key}")).unwrap().data().to_vec();
        let image = RgbImage8::new(source.width, source.height, pixels("source")).unwrap();
        let got = resize(&image, target.width, target.height, ResizeRecipe::Torchvision);
        assert!(got.pixels() == pixels("target"), "case {name}: {case}");
    }
}

/// Noise that Python draws alike: the high byte of a 64-bit linear congruential generator.
fn noise(width: u32, height: u32) -> RgbImage8 {
    let mut state = u64::from(width + height) * 2 + 1;
    let pixels = (0..width * height * 3)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    RgbImage8::new(width, height, pixels).unwrap()
}

#[test]
fn resampling_equals_pillow_bit_for_bit() {
    // SHA-256 of `Image.resize(target, BICUBIC)` of Pillow 12.3 on the noise above.
    let cases = [
        ((97, 131), (84, 140), "6aadc64b3ff0c410f4b7e5b6a9c232422fd6d4eb62c574511fdb2f40ac6e4d9c"),
        ((131, 97), (140, 84), "2cd2629c7c2820847319c49decdd32c30c65a6e5a98a9d05d5851de926bbc8b3"),
        ((9, 7), (84, 56), "34a722bd05b0a63b6163ce27ad553e94058fd1208fa0d343371cf4e1aead6d4d"),
        ((300, 20), (280, 28), "9fa85172a5a19268ad1efc56b2dc2a5a47a0e896740031d491451ff3579be44f"),
        ((160, 100), (28, 28), "a9ea79604d39f8b5538ac18869728355b4b99dd8282a143b3d1ce63c85ec731c"),
        ((61, 90), (56, 84), "7039a09a724047175741127c976403c52fa9bd62e689693eb8d986f0c5daabd1"),
        ((50, 40), (50, 56), "6eeaadb4d6b85e0197859b84d9df990d37ae5da7d5036e55a1ab9b0258b51726"),
        ((50, 40), (56, 40), "0a609513408de06f4293a0f3d7d08469d63e1ea4869259285ecb73182120152a"),
    ];
    for ((width, height), (to_width, to_height), digest) in cases {
        let image = noise(width, height);
        let got = resize(&image, to_width, to_height, ResizeRecipe::Pillow);
        assert_eq!(
            sha256_hex(got.pixels()),
            digest,
            "{width} x {height} to {to_width} x {to_height}"
        );
    }
}

#[test]
fn patches_of_png_files_equal_the_reference_bit_for_bit() {
    for case in ["image_odd", "images", "video", "video_slow", "multi_turn"] {
        let data = bytes(&format!("tiny/golden/{case}.safetensors"));
        let tensors = SafeTensors::deserialize(&data).unwrap();
        let golden = json(&format!("tiny/golden/{case}.json"));
        let media = golden["media"].as_array().unwrap();
        assert!(!media.is_empty());
        for (i, item) in media.iter().enumerate() {
            let files = item["files"].as_array().unwrap().iter();
            let frames: Vec<Vec<u8>> =
                files.map(|file| bytes(&format!("media/{}", file.as_str().unwrap()))).collect();
            let original = size(&item["original"]);
            let resized = smart_resize(original.height, original.width, 28, 3136, 200_704).unwrap();
            assert_eq!(resized, size(&item["resized"]), "{case} item {i}");
            let limits = MediaLimits::default();
            let patches = prepare(&frames, resized, &PixelRecipe::default(), &limits).unwrap();
            let grid = [patches.grid.t, patches.grid.h, patches.grid.w];
            assert_eq!(item["grid_thw"], serde_json::json!(grid), "{case} item {i}");
            let got: Vec<u8> = patches.pixel_values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let expected = tensors.tensor(&format!("pixel_values.{i}")).unwrap();
            assert!(got == expected.data(), "{case} item {i}: pixel values differ");
        }
    }
}
