//! Grammars, log probabilities of the prompt, tenants and priorities on their way to a decoder and back.

use serde_json::{Value, json};
use tessera_proto::ErrorReason;
use tessera_proto::common::v1::{FinishReason, grammar::Grammar};

use super::chat::{CHAT, post_later};
use super::client::{post_json, send};
use super::cluster::{Attempt, Cluster, ask, with};

fn hello(extra: Value) -> Value {
    with(ask("hello"), extra)
}

async fn end(mut attempt: Attempt) {
    attempt.say_text("x").await;
    attempt.finish(FinishReason::EndOfSequence).await;
}

#[tokio::test]
async fn the_form_of_the_answer_reaches_the_decoder() {
    let mut cluster = Cluster::start().await;
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {"type": "array"}}});
    let _asking = post_later(cluster.http, hello(json!({"response_format": schema})));
    let start = cluster.attempt().await.start;
    let grammar = start.sampling.expect("sampling").grammar.expect("a grammar").grammar;
    assert_eq!(grammar, Some(Grammar::JsonSchema(r#"{"type":"array"}"#.to_owned())));
}

/// The decoder compiles the grammar and knows nothing of where it stood in the request.
#[tokio::test]
async fn a_grammar_that_the_decoder_refuses_is_named_as_the_client_did() {
    let mut cluster = Cluster::start().await;
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}});
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let cases = [
        (json!({"response_format": schema}), "response_format.json_schema.schema"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs.regex"),
        (json!({"tools": [tool], "tool_choice": "required"}), "tools"),
    ];
    for (extra, param) in cases {
        let asking = post_later(cluster.http, hello(extra));
        let refusal = ErrorReason::InvalidArgument.status("does not compile").field("grammar");
        cluster.attempt().await.fail(refusal).await;
        let reply = asking.await.expect("joins");
        assert_eq!(reply.status, 400);
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param);
        assert_eq!(error["code"], "invalid_argument");
    }
}

#[tokio::test]
async fn grammars_are_bounded_and_exclude_what_moves_the_end() {
    let cluster = Cluster::start().await;
    let long = "a".repeat(300 << 10);
    let cases = [
        (json!({"structured_outputs": {"regex": long}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"regex": "a"}, "ignore_eos": true}), "ignore_eos"),
        (json!({"response_format": {"type": "json_object"}, "min_tokens": 3}), "min_tokens"),
    ];
    for (extra, param) in cases {
        let reply = post_json(cluster.http, CHAT, &hello(extra)).await;
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(param)));
    }
}

#[tokio::test]
async fn prompt_log_probabilities_come_once() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, hello(json!({"prompt_logprobs": 1, "n": 2})));
    let (mut first, mut second) = (cluster.attempt().await, cluster.attempt().await);
    if first.start.choice > second.start.choice {
        std::mem::swap(&mut first, &mut second);
    }
    let wanted = |attempt: &Attempt| attempt.start.sampling.clone().expect("set").prompt_logprobs;
    assert_eq!((wanted(&first), wanted(&second)), (Some(1), None), "choices share the prompt");
    let prompt = first.start.prompt.clone().expect("a prompt").token_ids;
    let last = prompt.len() as u32 - 1;
    first.accept().await;
    // After a move they come again from the start.
    for range in [1..4, 1..6, 6..last + 1] {
        first.say_prompt_logprobs(range).await;
    }
    end(first).await;
    second.accept().await;
    end(second).await;
    let reply = asking.await.expect("joins").json();
    let list = reply["prompt_logprobs"].as_array().expect("a list");
    assert_eq!((list.len(), &list[0]), (prompt.len(), &Value::Null));
    for (i, (entry, token)) in list.iter().zip(&prompt).enumerate().skip(1) {
        let own = entry[&token.to_string()]["logprob"].as_f64().expect("the prompt token's own");
        assert_eq!(own as f32, -(i as f32), "{entry}");
    }
}

#[tokio::test]
async fn tenant_and_priority_reach_the_decoder() {
    let mut cluster = Cluster::start().await;
    let body = hello(json!({"priority": -5})).to_string();
    let mut tenants = Vec::new();
    for header in ["", "x-tenant-id: blue\r\n", "x-tenant-id: green\r\n", "x-tenant-id: blue\r\n"] {
        let _open = send(cluster.http, CHAT, body.as_bytes(), header).await;
        let start = cluster.attempt().await.start;
        assert_eq!(start.priority, 5, "decoders count the other way");
        tenants.push(start.tenant);
    }
    assert_eq!((tenants[0], tenants[1]), (0, tenants[3]));
    assert!(tenants[1] != tenants[2] && tenants[1] != 0, "{tenants:?}");
}

#[tokio::test]
async fn a_bad_tenant_is_refused() {
    let cluster = Cluster::start().await;
    let header = format!("connection: close\r\nx-tenant-id: {}\r\n", "x".repeat(200));
    let body = ask("hello").to_string();
    let reply = super::client::read(send(cluster.http, CHAT, body.as_bytes(), &header).await).await;
    assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some("x-tenant-id")));
}
