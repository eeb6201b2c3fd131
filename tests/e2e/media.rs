//! Pictures on their way in: what is reported of them, uploads, large files, caches.

use tessera_proto::common::v1::MediaKind;
use tessera_proto::inference::v1::{MediaInfo, media_source::Source};
use tessera_tests::chat::{self, image_body};
use tessera_tests::golden::{Golden, GoldenMedia};
use tessera_tests::{fixtures, shared};
use tonic::Code;

fn as_golden(info: &MediaInfo) -> GoldenMedia {
    let grid = info.grid.expect("a grid");
    GoldenMedia {
        is_video: info.kind() == MediaKind::Video,
        original: [info.source_width, info.source_height],
        resized: [info.resized_width, info.resized_height],
        grid_thw: [grid.t, grid.h, grid.w],
        num_tokens: info.num_tokens,
    }
}

#[test]
fn every_item_reports_its_sizes() {
    let grpc = shared::tp2().grpc();
    for case in ["images", "multi_turn", "video"] {
        let golden = Golden::load("tiny", case);
        let answer = grpc.answer(chat::golden(&golden)).expect("is answered");
        let at_start: Vec<_> = answer.prompt().media.iter().map(as_golden).collect();
        let at_end: Vec<_> = answer.completion().media.iter().map(as_golden).collect();
        assert_eq!(at_start, golden.media, "{case}");
        assert_eq!(at_end, golden.media, "{case}");
    }
}

#[test]
fn the_source_size_is_that_after_orientation() {
    let request = |file| {
        let parts = vec![chat::image_bytes(&fixtures::media(file)), chat::text("What is this?")];
        chat::request(chat::user(parts), chat::greedy(1))
    };
    let grpc = shared::tp2().grpc();
    let size = |file| {
        let answer = grpc.answer(request(file)).expect("is answered");
        (answer.prompt().media[0].source_width, answer.prompt().media[0].source_height)
    };
    let upright = size("exif_1.jpg");
    assert_ne!(upright.0, upright.1, "a square shows nothing");
    assert_eq!(size("exif_6.jpg"), (upright.1, upright.0));
}

#[test]
fn a_picture_seen_before_is_not_encoded_again() {
    let grpc = shared::tp2().grpc();
    let picture = fixtures::bmp(120, 90, 5);
    let ask = |question: &str| {
        let parts = vec![chat::text(question), chat::image_bytes(&picture)];
        grpc.answer(chat::request(chat::user(parts), chat::greedy(4))).expect("is answered")
    };
    let first = ask("What is it?");
    assert!(!first.completion().media[0].cache_hit);
    // The question stands before the picture, so no prefix of the prompt can hold it.
    let second = ask("Which colours?");
    assert!(second.completion().media[0].cache_hit);
    assert_eq!(second.completion().media[0].media_id, first.completion().media[0].media_id);
    assert_eq!(ask("What is it?").choice().token_ids, first.choice().token_ids);
}

#[test]
fn an_upload_is_used_by_its_hash() {
    let cluster = shared::tp2();
    // Larger than any gRPC message may be.
    let file = fixtures::bmp(1400, 1001, 3);
    assert!(file.len() > 4 << 20);
    let uploaded = cluster.grpc().upload(&file).expect("is taken");
    assert_eq!((uploaded.width, uploaded.height), (1400, 1001));
    assert_eq!(uploaded.num_bytes, file.len() as u64);
    assert_eq!(uploaded.media_id.len(), 32);

    let parts =
        vec![chat::image(Source::MediaId(uploaded.media_id.clone())), chat::text("What is this?")];
    let request = chat::request(chat::user(parts), chat::greedy(8));
    let by_hash = cluster.grpc().answer(request).expect("is answered");
    let info = &by_hash.prompt().media[0];
    assert_eq!((info.source_width, info.source_height), (1400, 1001));
    assert!(info.resized_width * info.resized_height <= 200_704, "{info:?}");
    assert_eq!(info.media_id, uploaded.media_id);

    let body = image_body(&fixtures::data_url(&file), "What is this?", 8);
    let by_url = cluster.http().chat(&body).ok();
    assert_eq!(chat::ids(&by_url["choices"][0], "token_ids"), by_hash.choice().token_ids);
}

#[test]
fn a_message_beyond_its_limit_is_refused_by_type() {
    let grpc = shared::tp2().grpc();
    let parts = vec![chat::image_bytes(&fixtures::bmp(1400, 1001, 4))];
    let status =
        grpc.answer(chat::request(chat::user(parts), chat::greedy(1))).expect_err("is refused");
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert!(grpc.is_serving(""));
}

#[test]
fn every_format_is_understood() {
    let grpc = shared::tp2().grpc();
    let files = [
        "photo.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "grey.jpg",
        "grey16.png",
        "rgb16.png",
        "rgba.png",
        "palette.png",
        "one_bit.png",
        "lossy.webp",
        "lossless_alpha.webp",
        "animated.gif",
        "plain.bmp",
    ];
    for file in files {
        let parts = vec![chat::image_bytes(&fixtures::media(file)), chat::text("What is this?")];
        let answer = grpc.answer(chat::request(chat::user(parts), chat::greedy(2)));
        let answer = answer.unwrap_or_else(|status| panic!("{file}: {status:?}"));
        assert_eq!(answer.choice().token_ids.len(), 2, "{file}");
    }
}
