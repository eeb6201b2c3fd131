//! What clients see when something ends early: they themselves, a group, a store, the router.

use std::time::Duration;

use serde_json::json;
use tessera_cluster::Record;
use tessera_proto::ErrorReason;
use tessera_proto::common::v1::FinishReason;
use tessera_proto::decoder::v1::GroupState;
use tokio::net::TcpListener;
use tonic::Status;

use super::chat::{CHAT, post_later};
use super::client::{Events, SseEvent, get, post_json, send, text_of};
use super::cluster::{Cluster, ask, model_identity, with};

async fn open_stream(cluster: &mut Cluster) -> (Events, super::cluster::Attempt) {
    let body = with(ask("hello"), json!({"stream": true}));
    let http = cluster.http;
    let opening = tokio::spawn(async move { Events::open(http, &body).await });
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    let mut events = opening.await.expect("joins");
    events.next().await.expect("the role");
    (events, attempt)
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_frees_its_sequence() {
    let mut cluster = Cluster::start().await;
    let (mut events, mut attempt) = open_stream(&mut cluster).await;
    attempt.say_text("some").await;
    events.next().await.expect("a delta");
    drop(events);
    attempt.cancelled().await;
    while !cluster.metrics().await.contains("tessera_router_running_requests 0") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let counted = "tessera_router_requests_total{call=\"chat\",code=\"499\",face=\"http\"} 1";
    assert!(cluster.metrics().await.contains(counted));
}

#[tokio::test]
async fn a_client_that_leaves_before_its_whole_reply_frees_its_sequence() {
    let mut cluster = Cluster::start().await;
    let stream = send(cluster.http, CHAT, ask("hello").to_string().as_bytes(), "").await;
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("some").await;
    drop(stream);
    attempt.cancelled().await;
}

#[tokio::test]
async fn a_client_that_leaves_before_acceptance_frees_its_sequence() {
    let mut cluster = Cluster::start().await;
    let stream = send(cluster.http, CHAT, ask("hello").to_string().as_bytes(), "").await;
    let attempt = cluster.attempt().await;
    drop(stream);
    attempt.cancelled().await;
}

#[tokio::test]
async fn a_group_lost_in_the_middle_ends_the_stream_with_a_typed_error() {
    let mut cluster = Cluster::start().await;
    for status in [
        Status::from(ErrorReason::GroupLost.status("rank 1 is gone")),
        Status::unavailable("connection reset"),
    ] {
        let (mut events, mut attempt) = open_stream(&mut cluster).await;
        attempt.say_text("so far").await;
        attempt.fail(status).await;
        let rest = events.rest().await;
        assert_eq!(text_of(&rest, 0), "so far");
        let last = rest.last().expect("an error").json();
        assert_eq!(last["error"]["code"], "group_lost");
        assert_eq!(last["error"]["type"], "server_error");
        assert!(!rest.contains(&SseEvent::Done), "the stream did not complete");
    }
}

#[tokio::test]
async fn a_group_lost_before_the_first_token_is_a_retryable_status() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.fail(ErrorReason::GroupLost.status("rank 1 is gone")).await;
    let reply = asking.await.expect("joins");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("group_lost")));
    assert_eq!(reply.header("retry-after"), Some("1"));
}

#[tokio::test]
async fn a_stream_that_ends_without_a_finish_is_a_loss() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("half").await;
    drop(attempt);
    assert_eq!(asking.await.expect("joins").status, 503);
}

#[tokio::test]
async fn stale_and_repeated_records_are_not_delivered() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("a").await;
    attempt.say_stale(1, 0, 98).await;
    attempt.say_stale(0, 1, 99).await;
    attempt.say_stale(2, 1, 99).await;
    attempt.say_text("b").await;
    attempt.finish(FinishReason::Length).await;
    let reply = asking.await.expect("joins").json();
    assert_eq!(reply["choices"][0]["message"]["content"], "ab");
}

#[tokio::test]
async fn a_gap_in_the_records_is_a_loss_not_a_shorter_text() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_stale(1, 3, 99).await;
    attempt.cancelled().await;
    assert_eq!(asking.await.expect("joins").status, 503);
}

#[tokio::test]
async fn a_refusal_by_the_only_group_is_a_retryable_status() {
    let mut cluster = Cluster::start().await;
    let cases = [
        (ErrorReason::StaleEpoch, 503),
        (ErrorReason::Draining, 503),
        (ErrorReason::Overloaded, 429),
        (ErrorReason::RequestTooLarge, 400),
    ];
    for (reason, status) in cases {
        let asking = post_later(cluster.http, ask("hello"));
        let attempt = cluster.attempt().await;
        attempt.fail(reason.status("no")).await;
        let reply = asking.await.expect("joins");
        assert_eq!(reply.status, status, "{reason:?}: {}", reply.json());
        assert_eq!(reply.header("retry-after").is_some(), status != 400);
    }
}

#[tokio::test]
async fn a_deadline_before_the_first_token_is_a_timeout() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, with(ask("hello"), json!({"timeout_ms": 30})));
    let attempt = cluster.attempt().await;
    assert!(attempt.start.remaining_ms <= 30);
    attempt.cancelled().await;
    let reply = asking.await.expect("joins");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (504, &json!("deadline_exceeded")));
}

#[tokio::test]
async fn serving_goes_on_while_the_store_is_away() {
    let mut cluster = Cluster::start().await;
    cluster.store.take().expect("runs").shutdown().await;
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("still here").await;
    attempt.finish(FinishReason::Length).await;
    assert_eq!(asking.await.expect("joins").status, 200);
    assert_eq!(get(cluster.http, "/health").await.status, 200);
}

#[tokio::test]
async fn health_follows_the_group() {
    let cluster = Cluster::start_empty(|_| {}).await;
    let health = get(cluster.http, "/health").await;
    assert_eq!((health.status, &health.json()["error"]["code"]), (503, &json!("not_ready")));
    assert_eq!(post_json(cluster.http, CHAT, &ask("hello")).await.status, 503);
    assert_eq!(get(cluster.admin, "/readyz").await.status, 503);
    cluster.register(super::cluster::MODEL).await;
    cluster.wait_ready().await;
    cluster.group_state.send(GroupState::Draining).expect("is watched");
    while get(cluster.http, "/health").await.status != 503 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(post_json(cluster.http, CHAT, &ask("hello")).await.status, 503);
    cluster.group_state.send(GroupState::Serving).expect("is watched");
    cluster.wait_ready().await;
}

#[tokio::test]
async fn a_group_with_another_model_and_an_encoder_with_other_weights_are_not_used() {
    let cluster = Cluster::start_empty(|_| {}).await;
    cluster.register("other").await;
    let wait_for = async |detail: &str| {
        while !get(cluster.http, "/health").await.json()["error"]["message"]
            .as_str()
            .is_some_and(|message| message.contains(detail))
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    wait_for("serves \"tiny\"").await;
    // The right group, but its vision weights are not those of the encoder.
    let mut active = cluster.active(super::cluster::MODEL);
    active.model = model_identity(super::cluster::MODEL);
    active.model.vision_fingerprint = tessera_types::ModelFingerprint(Default::default());
    let group = tessera_cluster::GroupName::new("g0").expect("a name");
    cluster.put(cluster.keys.active(&group), active.to_bytes()).await;
    wait_for("no encoder is ready").await;
}

#[tokio::test]
async fn shutting_down_lets_replies_end_then_fails_the_rest_and_frees_the_ports() {
    let mut cluster = Cluster::start_with(|config| config.limits.drain_ms = 1500).await;
    let (mut quick, quick_attempt) = open_stream(&mut cluster).await;
    let (mut slow, slow_attempt) = open_stream(&mut cluster).await;
    let (http, grpc, admin) = (cluster.http, cluster.grpc, cluster.admin);
    let finishing = tokio::spawn(async move {
        let mut attempt = quick_attempt;
        attempt.say_text("in time").await;
        attempt.finish(FinishReason::Length).await;
        (quick.rest().await, slow.rest().await)
    });
    cluster.shut_down().await.expect("ends cleanly");
    slow_attempt.cancelled().await;
    let (quick, slow) = finishing.await.expect("joins");
    assert_eq!(text_of(&quick, 0), "in time");
    assert_eq!(quick.last(), Some(&SseEvent::Done));
    assert_eq!(slow.last().expect("an error").json()["error"]["code"], "draining");
    for address in [http, grpc, admin] {
        TcpListener::bind(address).await.expect("the port is free");
    }
}
