//! Bounds: requests, bytes, slow clients.

use std::time::Duration;

use serde_json::json;
use tessera_proto::common::v1::FinishReason;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use super::chat::{CHAT, post_later};
use super::client::{Events, post, post_json};
use super::cluster::{Cluster, ask, tokens, with};

#[tokio::test]
async fn a_full_router_refuses_with_a_hint_and_recovers() {
    let mut cluster = Cluster::start_with(|config| {
        config.limits.max_running_requests = 1;
        config.limits.max_waiting_requests = 0;
        config.limits.retry_after_ms = 2500;
    })
    .await;
    let first = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    let refused = post_json(cluster.http, CHAT, &ask("hello")).await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("3")));
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    attempt.finish(FinishReason::Length).await;
    assert_eq!(first.await.expect("joins").status, 200);
    let again = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.finish(FinishReason::Length).await;
    assert_eq!(again.await.expect("joins").status, 200);
}

#[tokio::test]
async fn a_waiting_request_gets_the_place_that_becomes_free() {
    let mut cluster = Cluster::start_with(|config| config.limits.max_running_requests = 1).await;
    let first = post_later(cluster.http, ask("one"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    let second = post_later(cluster.http, ask("two"));
    attempt.finish(FinishReason::Length).await;
    first.await.expect("joins");
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.finish(FinishReason::Length).await;
    assert_eq!(second.await.expect("joins").status, 200);
}

#[tokio::test]
async fn bodies_are_bounded_one_by_one_and_together() {
    let cluster = Cluster::start_with(|config| {
        config.http.max_body_bytes = 4096;
        config.limits.max_held_bytes = 8192;
    })
    .await;
    let refused = post(cluster.http, CHAT, &vec![b' '; 6000]).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (413, &json!("request_too_large"))
    );
    let cluster = Cluster::start_with(|config| {
        config.http.max_body_bytes = 4096;
        config.limits.max_held_bytes = 4096;
    })
    .await;
    let long = with(ask("hello"), json!({"user": "x".repeat(2000)}));
    let _first = post_later(cluster.http, long.clone());
    while !cluster.metrics().await.contains("tessera_router_held_bytes 3072") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(post_json(cluster.http, CHAT, &long).await.status, 429);
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    let cluster = Cluster::start_with(|config| config.http.body_timeout_ms = 20).await;
    let mut stream = tokio::net::TcpStream::connect(cluster.http).await.expect("connects");
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.expect("writes");
    assert_eq!(Events::read_from(stream).await.status, 408);
}

/// A client that never reads: its socket, the router's buffers and the decoder's window fill up, then the
/// decoder is not read any more. Other clients on the same connection to the decoder are not affected.
#[tokio::test]
async fn a_client_that_does_not_read_stops_its_own_sequence_only() {
    let mut cluster = Cluster::start().await;
    let extra = json!({"stream": true, "logprobs": true, "top_logprobs": 5});
    let body = with(ask("hello"), extra).to_string();
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("an option");
    let mut lazy = socket.connect(cluster.http).await.expect("connects");
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    lazy.write_all(head.as_bytes()).await.expect("writes");
    lazy.write_all(body.as_bytes()).await.expect("writes");
    let mut stuck = cluster.attempt().await;
    stuck.accept().await;
    let many = tokens("a").repeat(256);
    let mut sent = 0;
    while stuck.has_room(Duration::from_secs(1)).await {
        stuck.say(&many).await;
        sent += 1;
        assert!(sent < 2000, "half a million tokens are under way to a client that does not read");
    }
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("quick").await;
    attempt.finish(FinishReason::Length).await;
    assert_eq!(asking.await.expect("joins").status, 200);
    drop(lazy);
    stuck.cancelled().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_for_too_long_loses_its_request() {
    let mut cluster = Cluster::start_with(|config| {
        config.limits.client_stall_ms = 50;
        config.limits.max_buffered_events = 1;
    })
    .await;
    let extra = json!({"stream": true, "logprobs": true, "top_logprobs": 5});
    let body = with(ask("hello"), extra).to_string();
    let mut lazy = tokio::net::TcpStream::connect(cluster.http).await.expect("connects");
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    lazy.write_all(head.as_bytes()).await.expect("writes");
    lazy.write_all(body.as_bytes()).await.expect("writes");
    let mut stuck = cluster.attempt().await;
    stuck.accept().await;
    let many = tokens("a").repeat(256);
    while stuck.try_say(&many).await {}
    stuck.cancelled().await;
}
