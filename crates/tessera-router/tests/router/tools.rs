//! Tool calls, from the request's choice to calls in the reply.

use serde_json::{Value, json};
use tessera_proto::common::v1::{FinishReason, grammar::Grammar};
use tessera_proto::inference::v1 as pb;
use tessera_proto::inference::v1::inference_client::InferenceClient;

use super::chat::post_later;
use super::client::{Events, SseEvent, finish_of, text_of};
use super::cluster::{Attempt, Cluster, ask, tokens, with};

/// The tag tokens of the fixture.
const OPEN: u32 = 2062;
const CLOSE: u32 = 2063;
/// `<|im_end|>` of the fixture.
const EOS: u32 = 2050;

fn tool() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    json!({"type": "function", "function": {"name": "weather", "parameters": parameters}})
}

fn body(extra: Value) -> Value {
    with(with(ask("Rain?"), json!({"tools": [tool()]})), extra)
}

async fn call(attempt: &mut Attempt, inside: &str) {
    attempt.say(&[OPEN]).await;
    attempt.say_text(inside).await;
    attempt.say(&[CLOSE]).await;
}

/// Text and two calls, ended by the model.
async fn answer(mut attempt: Attempt) {
    attempt.accept().await;
    attempt.say_text("Let me see.\n").await;
    call(&mut attempt, "\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n").await;
    attempt.say_text("\n").await;
    call(&mut attempt, "\n{\"name\": \"weather\", \"arguments\": {}}\n").await;
    attempt.say(&[EOS]).await;
    attempt.finish(FinishReason::EndOfSequence).await;
}

#[tokio::test]
async fn a_whole_reply_has_text_and_calls() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, body(json!({})));
    answer(cluster.attempt().await).await;
    let reply = asking.await.expect("joins").json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "Let me see.");
    let calls = choice["message"]["tool_calls"].as_array().expect("calls");
    let arguments = [r#"{"city": "Köln"}"#, "{}"];
    assert_eq!(calls.len(), 2);
    for (call, arguments) in calls.iter().zip(arguments) {
        assert_eq!(call["type"], "function");
        assert_eq!(call["function"], json!({"name": "weather", "arguments": arguments}));
    }
    assert_ne!(calls[0]["id"], calls[1]["id"]);
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole_reply() {
    let mut cluster = Cluster::start().await;
    let body = body(json!({"stream": true}));
    let http = cluster.http;
    let opening = tokio::spawn(async move { Events::open(http, &body).await });
    answer(cluster.attempt().await).await;
    let events = opening.await.expect("joins").rest().await;
    assert_eq!(text_of(&events, 0), "Let me see.");
    assert_eq!(finish_of(&events, 0).as_deref(), Some("tool_calls"));
    let mut calls: Vec<(String, String)> = Vec::new();
    for event in &events {
        let SseEvent::Json(json) = event else { continue };
        let deltas = json["choices"][0]["delta"]["tool_calls"].as_array();
        for delta in deltas.into_iter().flatten() {
            let index = delta["index"].as_u64().expect("an index") as usize;
            if let Some(name) = delta["function"]["name"].as_str() {
                assert!(index == calls.len() && delta["id"].is_string(), "{delta}");
                calls.push((name.to_owned(), String::new()));
            }
            calls[index].1 += delta["function"]["arguments"].as_str().expect("text");
        }
    }
    let weather = |arguments: &str| ("weather".to_owned(), arguments.to_owned());
    assert_eq!(calls, [weather(r#"{"city": "Köln"}"#), weather("{}")]);
}

#[tokio::test]
async fn grpc_carries_calls_too() {
    let mut cluster = Cluster::start().await;
    let url = format!("http://{}", cluster.grpc);
    let mut client = InferenceClient::connect(url).await.expect("connects");
    let part = pb::content_part::Part::Text("Rain?".to_owned());
    let message = pb::Message {
        role: "user".to_owned(),
        parts: vec![pb::ContentPart { part: Some(part) }],
        ..Default::default()
    };
    let choice = pb::tool_choice::Choice::Function("weather".to_owned());
    let request = pb::GenerateRequest {
        messages: vec![message],
        tools: vec![pb::Tool { json: tool().to_string() }],
        tool_choice: Some(pb::ToolChoice { choice: Some(choice) }),
        ..Default::default()
    };
    let asking = tokio::spawn(async move { client.generate_once(request).await });
    let attempt = cluster.attempt().await;
    assert!(grammar_of(&attempt).is_some());
    answer(attempt).await;
    let reply = asking.await.expect("joins").expect("succeeds").into_inner();
    let choice = &reply.choices[0];
    assert_eq!(choice.reason(), FinishReason::ToolCalls);
    // One function was named, so the reply ended with its call.
    assert_eq!(choice.tool_calls.len(), 1);
    let call = &choice.tool_calls[0];
    assert_eq!((call.name.as_str(), call.arguments.as_str()), ("weather", r#"{"city": "Köln"}"#));
    assert!(!call.id.is_empty());
}

fn grammar_of(attempt: &Attempt) -> Option<Grammar> {
    attempt.start.sampling.as_ref().expect("sampling").grammar.clone()?.grammar
}

#[tokio::test]
async fn a_choice_of_tools_becomes_a_grammar() {
    let mut cluster = Cluster::start().await;
    let strict = json!({"type": "function", "function": {"name": "s", "strict": true}});
    let json_answer = json!({"type": "json_schema", "json_schema": {"schema": {"type": "array"}}});
    let cases = [
        (json!({}), None),
        (json!({"tool_choice": "none"}), None),
        (json!({"tool_choice": "required"}), Some("start: calls\n")),
        (json!({"tools": [strict]}), Some("start: calls | TEXT calls | TEXT?\n")),
        (json!({"response_format": json_answer}), Some("start: calls | answer\n")),
    ];
    for (extra, start) in cases {
        let asking = post_later(cluster.http, body(extra.clone()));
        let mut attempt = cluster.attempt().await;
        match (grammar_of(&attempt), start) {
            (None, None) => {}
            (Some(Grammar::Lark(lark)), Some(start)) => {
                assert!(lark.starts_with(start), "{extra}: {lark}");
                assert!(lark.contains("call: <tool_call> "), "{extra}: {lark}");
            }
            (grammar, _) => panic!("{extra}: {grammar:?}"),
        }
        // The tools stand in the prompt, whatever may be done with them.
        let prompt = attempt.start.prompt.clone().expect("a prompt").token_ids;
        assert!(prompt.len() > 100, "{extra}: {} tokens", prompt.len());
        attempt.accept().await;
        attempt.say_text("no").await;
        attempt.finish(FinishReason::EndOfSequence).await;
        let reply = asking.await.expect("joins").json();
        assert_eq!(reply["choices"][0]["message"]["content"], "no", "{extra}");
        assert_eq!(reply["choices"][0]["finish_reason"], "stop", "{extra}");
    }
}

#[tokio::test]
async fn without_a_choice_tags_are_text() {
    let mut cluster = Cluster::start().await;
    for body in [ask("Rain?"), body(json!({"tool_choice": "none"}))] {
        let asking = post_later(cluster.http, body);
        let mut attempt = cluster.attempt().await;
        attempt.accept().await;
        call(&mut attempt, "{\"name\": \"weather\"}").await;
        attempt.finish(FinishReason::EndOfSequence).await;
        let reply = asking.await.expect("joins").json();
        let content = &reply["choices"][0]["message"]["content"];
        assert_eq!(content, "<tool_call>{\"name\": \"weather\"}</tool_call>");
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    }
}

/// What follows the calls is cut, and the sequence ended.
#[tokio::test]
async fn text_behind_calls_ends_the_reply() {
    let mut cluster = Cluster::start().await;
    for extra in [json!({}), json!({"parallel_tool_calls": false})] {
        let asking = post_later(cluster.http, body(extra.clone()));
        let mut attempt = cluster.attempt().await;
        attempt.accept().await;
        call(&mut attempt, "{\"name\": \"weather\", \"arguments\": {}}").await;
        if extra == json!({}) {
            attempt.try_say(&tokens("\nIt rains.")).await;
        }
        attempt.cancelled().await;
        let choice = asking.await.expect("joins").json()["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "tool_calls", "{extra}");
        assert_eq!(choice["message"]["content"], Value::Null, "{extra}");
        assert_eq!(choice["message"]["tool_calls"].as_array().map(Vec::len), Some(1), "{extra}");
    }
}

#[tokio::test]
async fn a_stop_string_inside_a_call_ends_it() {
    let mut cluster = Cluster::start().await;
    let asking = post_later(cluster.http, body(json!({"stop": ["Köln"]})));
    let mut attempt = cluster.attempt().await;
    attempt.accept().await;
    attempt.say(&[OPEN]).await;
    attempt.say_text("{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln").await;
    attempt.cancelled().await;
    let choice = asking.await.expect("joins").json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], "{\"city\": \"");
}

#[tokio::test]
async fn impossible_choices_are_refused() {
    let cluster = Cluster::start().await;
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let cases = [
        (with(ask("hi"), json!({"tool_choice": "required"})), "tool_choice"),
        (body(json!({"tool_choice": named("other")})), "tool_choice"),
        (
            body(json!({"tool_choice": "required", "response_format": {"type": "json_object"}})),
            "tool_choice",
        ),
        (body(json!({"structured_outputs": {"regex": "a"}})), "tools"),
        (body(json!({"tool_choice": "required", "ignore_eos": true})), "ignore_eos"),
        (body(json!({"tool_choice": "required", "min_tokens": 1})), "min_tokens"),
    ];
    for (body, param) in cases {
        let reply = post_later(cluster.http, body.clone()).await.expect("joins");
        assert_eq!(reply.status, 400, "{body}");
        assert_eq!(reply.json()["error"]["param"], param, "{body}");
    }
}
