//! Chat over HTTP: whole replies, streams, text.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tessera_cluster::choice_seed;
use tessera_proto::common::v1::FinishReason;
use tokio::task::JoinHandle;

use super::client::{Events, Reply, SseEvent, finish_of, get, post_json, text_of};
use super::cluster::{Cluster, EPOCH, MAX_MODEL_LEN, MODEL, ask, tokens, with};

pub const CHAT: &str = "/v1/chat/completions";
/// `<|im_end|>` of the fixture.
const EOS: u32 = 2050;

/// Asks in the background.
pub fn post_later(address: SocketAddr, body: Value) -> JoinHandle<Reply> {
    tokio::spawn(async move { post_json(address, CHAT, &body).await })
}

#[tokio::test]
async fn a_whole_reply_has_text_usage_and_ids() {
    let mut cluster = Cluster::start().await;
    let extra = json!({"seed": 42, "max_tokens": 50, "return_token_ids": true});
    let asking = post_later(cluster.http, with(ask("hello"), extra));
    let mut attempt = cluster.attempt().await;
    let prompt = attempt.start.prompt.clone().expect("a prompt");
    attempt.accept().await;
    attempt.say_text("Good day").await;
    attempt.say(&[EOS]).await;
    attempt.finish(FinishReason::EndOfSequence).await;

    let reply = asking.await.expect("joins");
    assert_eq!(reply.status, 200);
    let id = reply.header("x-request-id").expect("an id").to_owned();
    let reply = reply.json();
    assert_eq!(reply["id"], format!("chatcmpl-{id}"));
    assert_eq!((&reply["object"], &reply["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert!(reply["system_fingerprint"].as_str().expect("text").starts_with("fp_0101010103"));
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "Good day");
    assert_eq!(choice["finish_reason"], "stop");
    let mut output = tokens("Good day");
    output.push(EOS);
    assert_eq!(choice["token_ids"], json!(output));
    assert_eq!(reply["prompt_token_ids"], json!(prompt.token_ids));
    let usage = &reply["usage"];
    assert_eq!(usage["prompt_tokens"], prompt.token_ids.len());
    assert_eq!(usage["completion_tokens"], output.len());
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
    assert_eq!(reply["tessera"]["effective_seed"], 42);
}

#[tokio::test]
async fn the_decoder_is_told_everything_that_was_decided() {
    let mut cluster = Cluster::start().await;
    let _asking = post_later(cluster.http, with(ask("hello"), json!({"seed": 42, "top_p": 0.5})));
    let start = cluster.attempt().await.start;
    let fence = start.fence.expect("a fence");
    assert_eq!(
        (fence.cluster.as_str(), fence.group.as_str(), fence.epoch),
        ("default", "g0", EPOCH)
    );
    assert_eq!((start.attempt, start.choice), (1, 0));
    assert_eq!(start.effective_seed, choice_seed(42, 0));
    assert!(start.remaining_ms > 0 && start.output_token_ids.is_empty());
    let prompt = start.prompt.expect("a prompt");
    let sampling = start.sampling.expect("sampling");
    // The checkpoint's defaults, the request's own, and the rest of the context.
    assert_eq!((sampling.repetition_penalty, sampling.temperature), (1.05, 1e-6));
    assert_eq!((sampling.top_p, sampling.logprobs), (0.5, None));
    assert_eq!(sampling.max_tokens as usize, MAX_MODEL_LEN as usize - prompt.token_ids.len());
}

#[tokio::test]
async fn a_stream_sends_deltas_as_they_come_and_usage_last() {
    let mut cluster = Cluster::start().await;
    let extra = json!({"stream": true, "stream_options": {"include_usage": true},
                       "return_token_ids": true});
    let body = with(ask("hello"), extra);
    let http = cluster.http;
    let opening = tokio::spawn(async move { Events::open(http, &body).await });
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    let mut events = opening.await.expect("joins");
    assert_eq!(events.status, 200);
    let first = events.next().await.expect("the role");
    assert_eq!(first.json()["choices"][0]["delta"]["role"], "assistant");
    assert!(first.json()["prompt_token_ids"].is_array());
    // Each delta arrives before the next token is drawn.
    for word in ["one", " two", " three"] {
        attempt.say_text(word).await;
        let event = events.next().await.expect("a delta");
        let choice = &event.json()["choices"][0];
        assert_eq!(choice["delta"]["content"], word);
        assert_eq!(choice["token_ids"], json!(tokens(word)));
        assert_eq!(event.json()["usage"], Value::Null);
    }
    attempt.finish(FinishReason::Length).await;
    let rest = events.rest().await;
    assert_eq!(finish_of(&rest, 0).as_deref(), Some("length"));
    assert_eq!(rest.last(), Some(&SseEvent::Done));
    let usage = &rest[rest.len() - 2].json()["usage"];
    let expected: usize = ["one", " two", " three"].iter().map(|word| tokens(word).len()).sum();
    assert_eq!(usage["completion_tokens"], expected);
}

#[tokio::test]
async fn a_character_of_many_tokens_arrives_whole() {
    let mut cluster = Cluster::start().await;
    let body = with(ask("hello"), json!({"stream": true}));
    let http = cluster.http;
    let opening = tokio::spawn(async move { Events::open(http, &body).await.rest().await });
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    let text = "a👋é漢";
    let ids = tokens(text);
    assert!(ids.len() > text.chars().count(), "the fixture splits characters");
    for id in ids {
        attempt.say(&[id]).await;
    }
    // An unfinished character ends as U+FFFD.
    attempt.say(&tokens("👋")[..1]).await;
    attempt.finish(FinishReason::Length).await;
    let events = opening.await.expect("joins");
    assert_eq!(text_of(&events, 0), format!("{text}\u{fffd}"));
    let broken_early = events[..events.len() - 3].iter().any(|event| match event {
        SseEvent::Json(json) => json.to_string().contains('\u{fffd}'),
        SseEvent::Done => false,
    });
    assert!(!broken_early);
}

#[tokio::test]
async fn a_stop_string_over_token_edges_ends_text_usage_and_sequence() {
    let mut cluster = Cluster::start().await;
    let extra = json!({"stream": true, "stop": ["STOP now"], "return_token_ids": true,
                       "logprobs": true, "stream_options": {"include_usage": true}});
    let body = with(ask("hello"), extra);
    let http = cluster.http;
    let opening = tokio::spawn(async move { Events::open(http, &body).await.rest().await });
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    for text in ["first ST", "OP", " later ", "ST", "OP no", "w and more"] {
        attempt.say_text(text).await;
    }
    // The router ends the sequence itself.
    attempt.cancelled().await;
    let events = opening.await.expect("joins");
    assert_eq!(text_of(&events, 0), "first STOP later ");
    assert_eq!(finish_of(&events, 0).as_deref(), Some("stop"));
    let chunks = || events.iter().filter(|e| **e != SseEvent::Done).map(SseEvent::json);
    assert!(chunks().any(|chunk| chunk["choices"][0]["stop_reason"] == "STOP now"));
    let count = |pointer: &str| -> usize {
        chunks().filter_map(|chunk| chunk.pointer(pointer)?.as_array()).map(Vec::len).sum()
    };
    let usage = chunks().next_back().expect("usage")["usage"]["completion_tokens"].as_u64();
    let reported = count("/choices/0/token_ids");
    assert_eq!(usage, Some(reported as u64));
    assert_eq!(count("/choices/0/logprobs/content"), reported);
    let before: usize = ["first ST", "OP", " later "].iter().map(|text| tokens(text).len()).sum();
    assert_eq!(reported, before, "tokens of the stop string and after it do not count");
}

#[tokio::test]
async fn what_may_begin_a_stop_string_is_given_out_at_the_end() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, with(ask("hello"), json!({"stop": "###"})));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("text ##").await;
    attempt.finish(FinishReason::Length).await;
    let reply = asking.await.expect("joins").json();
    assert_eq!(reply["choices"][0]["message"]["content"], "text ##");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_stop_token_has_no_text() {
    let mut cluster = Cluster::start().await;
    let stop = tokens("!")[0];
    let extra = json!({"stop_token_ids": [stop], "return_token_ids": true});
    let asking = post_later(cluster.http, with(ask("hello"), extra));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say_text("done").await;
    attempt.say(&[stop]).await;
    attempt.finish(FinishReason::StopToken).await;
    let reply = asking.await.expect("joins").json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "done");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
    assert_eq!(choice["token_ids"].as_array().and_then(|ids| ids.last()), Some(&json!(stop)));
}

#[tokio::test]
async fn choices_are_streams_of_their_own_with_seeds_of_their_own() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, with(ask("hello"), json!({"n": 3, "seed": 9})));
    let mut attempts = Vec::new();
    for _ in 0..3 {
        attempts.push(cluster.attempt().await);
    }
    attempts.sort_by_key(|attempt| attempt.start.choice);
    for attempt in attempts.iter_mut().rev() {
        let choice = attempt.start.choice;
        assert_eq!(attempt.start.effective_seed, choice_seed(9, choice));
        attempt.accept().await;
        attempt.say_text(["zero", "one", "two"][choice as usize]).await;
    }
    for attempt in attempts {
        attempt.finish(FinishReason::Length).await;
    }
    let reply = asking.await.expect("joins").json();
    for (i, text) in ["zero", "one", "two"].iter().enumerate() {
        assert_eq!(reply["choices"][i]["index"], i);
        assert_eq!(reply["choices"][i]["message"]["content"], *text);
    }
}

#[tokio::test]
async fn logprobs_name_tokens_and_their_alternatives() {
    let mut cluster = Cluster::start().await;
    let extra = json!({"logprobs": true, "top_logprobs": 5});
    let asking = post_later(cluster.http, with(ask("hello"), extra));
    let mut attempt = cluster.attempt().await;
    assert_eq!(attempt.start.sampling.as_ref().expect("sampling").logprobs, Some(5));
    attempt.accept().await;
    attempt.say_text("ab").await;
    attempt.finish(FinishReason::Length).await;
    let reply = asking.await.expect("joins").json();
    let content = reply["choices"][0]["logprobs"]["content"].as_array().expect("entries").clone();
    let joined: String = content.iter().filter_map(|entry| entry["token"].as_str()).collect();
    assert_eq!(joined, "ab");
    assert_eq!(content[0]["logprob"], -0.25);
    assert_eq!(content[0]["bytes"][0], 97);
    assert_eq!(content[0]["top_logprobs"].as_array().map(Vec::len), Some(5));
}

#[tokio::test]
async fn models_health_tokens_and_metrics_are_told() {
    let mut cluster = Cluster::start().await;
    let list = get(cluster.http, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["max_model_len"], MAX_MODEL_LEN);
    assert_eq!(get(cluster.http, "/v1/models/tiny").await.status, 200);
    assert_eq!(get(cluster.http, "/v1/models/other").await.status, 404);
    let text = post_json(cluster.http, "/tokenize", &json!({"prompt": "hello"})).await.json();
    assert_eq!(text["tokens"], json!(tokens("hello")));
    let chat = post_json(cluster.http, "/tokenize", &ask("hello")).await.json();
    let asking = post_later(cluster.http, ask("hello"));
    let mut attempt = cluster.attempt().await;
    let prompt = attempt.start.prompt.clone().expect("a prompt");
    assert_eq!(chat["tokens"], json!(prompt.token_ids));
    assert_eq!(chat["count"], prompt.token_ids.len());
    attempt.accept().await;
    attempt.say_text("x").await;
    attempt.finish(FinishReason::Length).await;
    asking.await.expect("joins");
    let metrics = cluster.metrics().await;
    for line in [
        "tessera_router_requests_total{call=\"chat\",code=\"200\",face=\"http\"} 1",
        "tessera_router_output_tokens_total 1",
        "tessera_router_attempts_total{outcome=\"finished\"} 1",
        "tessera_router_first_token_seconds_count 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    assert_eq!(get(cluster.admin, "/readyz").await.status, 200);
}
