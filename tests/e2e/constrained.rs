//! Output held to a grammar, tool calls, log probabilities of the prompt. The fixture's answers are noise,
//! so whatever is valid about them is the grammar's doing.

use serde_json::{Value, json};
use tessera_proto::common::v1::{FinishReason, Grammar, SamplingOptions, grammar};
use tessera_proto::inference::v1::{Tool, ToolChoice, tool_choice};
use tessera_tests::chat::{self, text_body, with};
use tessera_tests::golden::Golden;
use tessera_tests::shared;
use tessera_tests::sse::Collected;

const QUESTION: &str = "Name 3 things.";

/// A drawn answer that may end.
fn body(extra: Value) -> Value {
    let free = json!({"temperature": 1, "seed": 3, "ignore_eos": false});
    with(with(text_body(QUESTION, 400), free), extra)
}

/// Only values of bounded length, since noise seldom ends by itself.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
            "is_big": {"type": "boolean"},
        },
        "required": ["kind", "count", "is_big"],
        "additionalProperties": false,
        "x-guidance": {"whitespace_flexible": false},
    })
}

/// Whether a value is what [`schema`] says.
fn assert_valid(value: &Value) {
    assert!(value["kind"] == "cat" || value["kind"] == "dog", "{value}");
    assert!(value["count"].as_u64().is_some_and(|count| (1..=9).contains(&count)), "{value}");
    assert!(value["is_big"].is_boolean(), "{value}");
    assert_eq!(value.as_object().map(serde_json::Map::len), Some(3), "{value}");
}

fn tools() -> Value {
    let function = |name| json!({"name": name, "parameters": schema()});
    json!([
        {"type": "function", "function": function("count_animals")},
        {"type": "function", "function": function("sell_animals")},
    ])
}

#[test]
fn json_is_valid_under_its_schema_in_every_choice() {
    let format = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema()}});
    for seed in 0..3 {
        let body = body(json!({"response_format": format, "n": 2, "seed": seed}));
        let answer = shared::tp2().http().chat(&body).ok();
        for choice in answer["choices"].as_array().expect("choices") {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            let text = choice["message"]["content"].as_str().expect("a text");
            assert_valid(&serde_json::from_str(text).expect(text));
        }
    }
}

#[test]
fn choices_and_patterns_are_kept_to_on_both_faces() {
    let cluster = shared::tp2();
    let choice = json!({"structured_outputs": {"choice": ["yes", "no"]}});
    let regex = json!({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}});
    let text = |extra: &Value| {
        let answer = cluster.http().chat(&body(extra.clone())).ok();
        answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
    };
    assert!(["yes", "no"].contains(&text(&choice).as_str()));
    let matched = text(&regex);
    let (letters, digits) = matched.split_once('-').expect("a dash");
    assert!(letters.len() == 3 && letters.bytes().all(|b| (b'a'..=b'f').contains(&b)), "{matched}");
    assert!(digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit()), "{matched}");

    let lark = grammar::Grammar::Lark("start: \"a\" (\"b\" | \"c\") <|im_end|>?\n".to_owned());
    let sampling = SamplingOptions {
        max_tokens: Some(20),
        grammar: Some(Grammar { grammar: Some(lark) }),
        ..SamplingOptions::default()
    };
    let request = chat::request(chat::user(vec![chat::text(QUESTION)]), sampling);
    let answer = cluster.grpc().answer(request).expect("is answered");
    assert!(["ab", "ac"].contains(&answer.choice().text.as_str()), "{answer:?}");
}

#[test]
fn a_grammar_that_does_not_compile_is_refused_by_field() {
    let http = shared::tp2().http();
    let broken = json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}});
    let cases = [
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"grammar": "start: ("}}), "structured_outputs.grammar"),
        (json!({"response_format": broken}), "response_format.json_schema.schema"),
    ];
    for (extra, param) in cases {
        let response = http.chat(&body(extra));
        assert_eq!(response.status, 400, "{response}");
        assert_eq!(response.json()["error"]["param"], param, "{response}");
    }
}

/// Joined tool calls of a stream: name and arguments.
fn streamed_calls(events: &[Value]) -> Vec<(String, String)> {
    let mut calls: Vec<(String, String)> = Vec::new();
    let deltas = events.iter().filter_map(|e| e["choices"][0]["delta"]["tool_calls"].as_array());
    for delta in deltas.flatten() {
        if let Some(name) = delta["function"]["name"].as_str() {
            calls.push((name.to_owned(), String::new()));
        }
        let index = delta["index"].as_u64().expect("an index") as usize;
        calls[index].1 += delta["function"]["arguments"].as_str().expect("a text");
    }
    calls
}

#[test]
fn a_required_call_is_valid_whole_streamed_and_over_grpc() {
    let cluster = shared::tp2();
    let extra = json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false});
    let whole = cluster.http().chat(&body(extra.clone())).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0]["function"];
    let name = call["name"].as_str().expect("a name");
    assert!(["count_animals", "sell_animals"].contains(&name), "{call}");
    let arguments = call["arguments"].as_str().expect("a text");
    assert_valid(&serde_json::from_str(arguments).expect(arguments));

    let events: Vec<Value> = cluster.http().chat_stream(&body(extra)).collect();
    assert_eq!(streamed_calls(&events), [(name.to_owned(), arguments.to_owned())]);
    let collected: Collected = events.iter().collect();
    assert_eq!(collected.finish_reason.as_deref(), Some("tool_calls"));

    let sampling = SamplingOptions { max_tokens: Some(400), ..SamplingOptions::default() };
    let mut request = chat::request(chat::user(vec![chat::text(QUESTION)]), sampling);
    let list = tools();
    let list = list.as_array().expect("a list").iter();
    request.tools = list.map(|tool| Tool { json: tool.to_string() }).collect();
    let function = tool_choice::Choice::Function("sell_animals".to_owned());
    request.tool_choice = Some(ToolChoice { choice: Some(function) });
    let answer = cluster.grpc().answer(request).expect("is answered");
    let choice = answer.choice();
    assert_eq!(choice.reason, FinishReason::ToolCalls);
    assert_eq!((choice.tool_calls.len(), choice.text.as_str()), (1, ""));
    assert_eq!(choice.tool_calls[0].name, "sell_animals");
    let arguments = choice.tool_calls[0].arguments.as_str();
    assert_valid(&serde_json::from_str(arguments).expect(arguments));
}

#[test]
fn prompt_log_probabilities_cover_the_prompt_on_both_faces() {
    let cluster = shared::tp2();
    let golden = Golden::load("tiny", "text");
    let http = with(golden.http_body(), json!({"prompt_logprobs": 2, "max_tokens": 1}));
    let answer = cluster.http().chat(&http).ok();
    let list = answer["prompt_logprobs"].as_array().expect("a list");
    assert_eq!((list.len(), &list[0]), (golden.prompt_ids.len(), &Value::Null));
    let mut request = chat::golden(&golden);
    let sampling = request.sampling.as_mut().expect("set");
    (sampling.prompt_logprobs, sampling.max_tokens) = (Some(2), Some(1));
    let streamed = cluster.grpc().answer(request).expect("is answered").prompt_logprobs;
    assert_eq!(streamed.len() + 1, list.len());
    let pairs = list.iter().zip(&golden.prompt_ids).skip(1).zip(&streamed);
    for ((entry, token), position) in pairs {
        let own = entry[&token.to_string()]["logprob"].as_f64().expect("the token's own");
        assert_eq!(own as f32, position.logprob, "{entry}");
        assert!(own <= 0.0 && position.top.len() == 2, "{entry}");
    }
}
