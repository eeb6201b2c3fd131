//! Images and frame lists through router, encoder and decoder.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tessera_proto::ErrorReason;
use tessera_proto::common::v1::FinishReason;
use tonic::Status;

use super::chat::post_later;
use super::cluster::{Attempt, Cluster, MODEL, image};

fn data_url(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes))
}

fn show(parts: Value) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": parts}]})
}

fn show_image(bytes: &[u8]) -> Value {
    let url = data_url(bytes);
    show(json!([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]))
}

async fn answer(mut attempt: Attempt) {
    attempt.say_text("yes").await;
    attempt.finish(FinishReason::Length).await;
}

#[tokio::test]
async fn an_image_goes_to_the_encoder_when_the_decoder_asks() {
    let mut cluster = Cluster::start().await;
    let bytes = image("odd_97x131.png");
    let asking = post_later(cluster.http, show_image(&bytes));
    let mut attempt = cluster.attempt().await;
    let span = attempt.start.prompt.as_ref().expect("a prompt").media[0].clone();
    // 97 x 131 becomes 84 x 140: 6 x 10 patches, 15 visual tokens.
    let grid = span.grid.expect("a grid");
    assert_eq!((grid.t, grid.h, grid.w, span.num_tokens), (1, 10, 6, 15));
    attempt.accept().await;
    assert!(cluster.encoded_keys().is_empty(), "nothing is encoded before it is asked for");
    attempt.need_media(&[0]).await;
    let media_at = attempt.media_at().await;
    assert_eq!(media_at.endpoint, cluster.encoder_address);
    assert_eq!(media_at.embedding_key, span.embedding_key);
    answer(attempt).await;
    let reply = asking.await.expect("joins").json();
    let media = &reply["tessera"]["media"][0];
    assert_eq!((&media["source_width"], &media["source_height"]), (&json!(97), &json!(131)));
    assert_eq!((&media["resized_width"], &media["resized_height"]), (&json!(84), &json!(140)));
    assert_eq!((&media["num_tokens"], &media["cache_hit"]), (&json!(15), &json!(false)));
    let script = cluster.encoder.lock().expect("not poisoned");
    let (header, received) = &script.received[0];
    assert_eq!(received, &bytes);
    assert_eq!((header.resized_width, header.resized_height), (84, 140));
    assert_eq!((header.num_bytes, header.num_frames), (bytes.len() as u64, 1));
}

#[tokio::test]
async fn an_image_that_a_prefix_holds_is_never_sent() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, show_image(&image("tiny_9x7.png")));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    answer(attempt).await;
    let reply = asking.await.expect("joins").json();
    assert_eq!(reply["tessera"]["media"][0]["cache_hit"], true);
    assert!(cluster.encoded_keys().is_empty());
}

#[tokio::test]
async fn frames_are_one_item_with_a_time_step() {
    let mut cluster = Cluster::start().await;
    let frames: Vec<_> = (0..4).map(|i| data_url(&image(&format!("walk_{i}.png")))).collect();
    let body = show(json!([{"type": "video", "video": frames, "fps": 4.0},
                           {"type": "text", "text": "?"}]));
    let asking = post_later(cluster.http, body);
    let mut attempt = cluster.attempt().await;
    let prompt = attempt.start.prompt.clone().expect("a prompt");
    assert_eq!(prompt.media.len(), 1);
    assert_eq!(prompt.media[0].grid.expect("a grid").t, 2);
    assert_eq!(prompt.media[0].seconds_per_grid, 0.5);
    attempt.accept().await;
    attempt.need_media(&[0]).await;
    attempt.media_at().await;
    answer(attempt).await;
    assert_eq!(asking.await.expect("joins").status, 200);
    let script = cluster.encoder.lock().expect("not poisoned");
    let expected: Vec<u8> = (0..4).flat_map(|i| image(&format!("walk_{i}.png"))).collect();
    assert_eq!(script.received[0].1, expected);
    assert_eq!(script.received[0].0.num_frames, 4);
}

#[tokio::test]
async fn two_choices_share_one_encode() {
    let mut cluster = Cluster::start().await;
    let mut body = show_image(&image("tiny_9x7.png"));
    body["n"] = json!(2);
    let asking = post_later(cluster.http, body);
    let mut attempts = [cluster.attempt().await, cluster.attempt().await];
    for attempt in &mut attempts {
        attempt.accept().await;
        attempt.need_media(&[0]).await;
    }
    for attempt in &mut attempts {
        attempt.media_at().await;
    }
    for attempt in attempts {
        answer(attempt).await;
    }
    assert_eq!(asking.await.expect("joins").status, 200);
    assert_eq!(cluster.encoded_keys().len(), 1);
}

#[tokio::test]
async fn a_lost_embedding_is_encoded_again() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, show_image(&image("tiny_9x7.png")));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    for _ in 0..2 {
        // Asking again for what was told means that the pull failed.
        attempt.need_media(&[0]).await;
        attempt.media_at().await;
    }
    answer(attempt).await;
    assert_eq!(asking.await.expect("joins").status, 200);
    assert_eq!(cluster.encoded_keys().len(), 2);
}

#[tokio::test]
async fn a_failing_encoder_is_tried_again_and_then_given_up_with_a_hint() {
    let mut cluster = Cluster::start().await;
    let fail = |num: usize| vec![Status::internal("out of memory"); num];
    cluster.encoder.lock().expect("not poisoned").failures = fail(1);
    let asking = post_later(cluster.http, show_image(&image("tiny_9x7.png")));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.need_media(&[0]).await;
    attempt.media_at().await;
    answer(attempt).await;
    assert_eq!(asking.await.expect("joins").status, 200);

    cluster.encoder.lock().expect("not poisoned").failures = fail(10);
    let asking = post_later(cluster.http, show_image(&image("tiny_9x7.png")));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.need_media(&[0]).await;
    attempt.cancelled().await;
    let reply = asking.await.expect("joins");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("encoder_failed")));
    assert!(reply.header("retry-after").is_some());
}

#[tokio::test]
async fn an_image_that_does_not_decode_is_the_clients_fault() {
    let mut cluster = Cluster::start().await;
    let broken: Status = ErrorReason::InvalidMedia.status("the PNG data end early").into();
    cluster.encoder.lock().expect("not poisoned").failures = vec![broken];
    let asking = post_later(cluster.http, show_image(&image("tiny_9x7.png")));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.need_media(&[0]).await;
    attempt.cancelled().await;
    let reply = asking.await.expect("joins");
    let error = &reply.json()["error"];
    assert_eq!((reply.status, &error["code"]), (400, &json!("invalid_media")));
    assert_eq!(error["param"], "messages[0].content[0].image_url.url");
    assert_eq!(cluster.encoded_keys().len(), 1, "the same bytes do not decode elsewhere");
}
