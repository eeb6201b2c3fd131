use std::sync::Arc;

use serde_json::{Value, json};
use tessera_types::{Prompt, TokenLogprobs};

use super::*;
use crate::events::ToolCallStart;

fn prompt() -> PromptInfo {
    PromptInfo {
        request_id: "r".into(),
        model: "m".into(),
        system_fingerprint: "fp_1".into(),
        created: 17,
        prompt: Arc::new(Prompt { tokens: vec![1, 2, 3], ..Prompt::default() }),
        media: vec![],
        effective_seed: 5,
    }
}

fn completion() -> Completion {
    Completion {
        usage: Usage {
            num_prompt_tokens: 3,
            num_cached_tokens: 2,
            num_output_tokens: 4,
            num_media_tokens: 0,
        },
        timings: Timings::default(),
        media: vec![],
    }
}

fn bytes_of(id: TokenId) -> Vec<u8> {
    match id {
        7 => "é".as_bytes().to_vec(),
        8 => vec![0xc3],
        _ => vec![],
    }
}

fn token(id: TokenId) -> OutputToken {
    OutputToken {
        id,
        logprobs: Some(TokenLogprobs {
            logprob: -0.5,
            top: vec![(7, -0.5), (8, f32::NEG_INFINITY)],
        }),
    }
}

fn finish(reason: FinishReason) -> ChoiceFinish {
    ChoiceFinish { choice: 0, reason, matched_stop: None, stop_token: None }
}

/// JSON of every event; the end mark is null.
fn events(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).expect("is text");
    assert!(text.ends_with("\n\n"));
    text.split_terminator("\n\n")
        .map(|event| match event.strip_prefix("data: ").expect("is a data event") {
            "[DONE]" => Value::Null,
            json => serde_json::from_str(json).expect("is JSON"),
        })
        .collect()
}

#[test]
fn a_reply_has_the_shape_of_the_api() {
    let choice = GatheredChoice {
        text: "é!".into(),
        tokens: vec![token(7)],
        finish: Some(ChoiceFinish {
            matched_stop: Some("END".into()),
            ..finish(FinishReason::StopString)
        }),
        ..GatheredChoice::default()
    };
    let gathered = Gathered { choices: vec![choice], ..Gathered::default() };
    let bytes = reply_json("chatcmpl-1", &prompt(), &gathered, &completion(), true, &bytes_of);
    let reply: Value = serde_json::from_slice(&bytes).expect("is JSON");
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["created"], 17);
    assert_eq!(reply["prompt_token_ids"], json!([1, 2, 3]));
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
               "prompt_tokens_details": {"cached_tokens": 2}})
    );
    assert_eq!(
        reply["choices"],
        json!([{
            "index": 0,
            "message": {"role": "assistant", "content": "é!", "refusal": null},
            "logprobs": {"content": [{
                "token": "é", "logprob": -0.5, "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "\u{fffd}", "logprob": -9999.0, "bytes": [195]}
                ]
            }], "refusal": null},
            "finish_reason": "stop",
            "stop_reason": "END",
            "token_ids": [7]
        }])
    );
    assert_eq!(reply["tessera"]["effective_seed"], 5);
}

#[test]
fn extras_are_left_out_unless_asked_for() {
    let choice =
        GatheredChoice { finish: Some(finish(FinishReason::Length)), ..GatheredChoice::default() };
    let gathered = Gathered { choices: vec![choice], ..Gathered::default() };
    let bytes = reply_json("c", &prompt(), &gathered, &completion(), false, &bytes_of);
    let reply: Value = serde_json::from_slice(&bytes).expect("is JSON");
    assert!(reply.get("prompt_token_ids").is_none());
    assert!(reply.get("prompt_logprobs").is_none());
    assert!(reply["choices"][0]["message"].get("tool_calls").is_none());
    assert_eq!(reply["choices"][0]["message"]["content"], "");
    assert!(reply["choices"][0].get("token_ids").is_none());
    assert_eq!(reply["choices"][0]["logprobs"], Value::Null);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_stream_is_framed_as_events_and_ends_with_the_mark() {
    let writer = ChunkWriter::new("c", &prompt(), true, true);
    let mut out = Vec::new();
    writer.write_start(&prompt(), 2, &mut out);
    let delta =
        Delta { choice: 1, text: "a\nb".into(), tokens: vec![token(7)], tool_calls: vec![] };
    writer.write_delta(&delta, &bytes_of, &mut out);
    writer.write_finish(&finish(FinishReason::EndOfSequence), &mut out);
    writer.write_end(&prompt(), &completion(), &mut out);
    let events = events(&out);
    assert_eq!(events.len(), 6);
    assert_eq!(events[0]["prompt_token_ids"], json!([1, 2, 3]));
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[1]["choices"][0]["index"], 1);
    assert!(events[1].get("prompt_token_ids").is_none());
    let choice = &events[2]["choices"][0];
    assert_eq!(choice["delta"], json!({"content": "a\nb"}));
    assert_eq!(choice["token_ids"], json!([7]));
    assert_eq!(choice["logprobs"]["content"][0]["bytes"], json!([195, 169]));
    assert_eq!(choice["finish_reason"], Value::Null);
    assert_eq!(events[3]["choices"][0]["finish_reason"], "stop");
    assert_eq!(events[3]["choices"][0]["delta"], json!({}));
    for event in &events[..4] {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["usage"], Value::Null);
        assert!(event.as_object().expect("object").contains_key("usage"));
    }
    assert_eq!(events[4]["choices"], json!([]));
    assert_eq!(events[4]["usage"]["total_tokens"], 7);
    assert_eq!(events[5], Value::Null);
}

fn call(index: u32, name: Option<&str>, arguments: &str) -> ToolCallDelta {
    let start =
        name.map(|name| ToolCallStart { id: format!("call_{index}"), name: name.to_owned() });
    ToolCallDelta { index, start, arguments: arguments.to_owned() }
}

#[test]
fn tool_calls_have_the_shape_of_the_api() {
    let delta = |tool_calls| Delta { choice: 0, text: String::new(), tokens: vec![], tool_calls };
    let deltas = [
        delta(vec![call(0, Some("f"), "{\"a\"")]),
        delta(vec![call(0, None, ": 1}"), call(1, Some("g"), "{}")]),
    ];
    let mut choice = GatheredChoice {
        finish: Some(finish(FinishReason::ToolCalls)),
        ..GatheredChoice::default()
    };
    let writer = ChunkWriter::new("c", &prompt(), false, false);
    let mut out = Vec::new();
    for delta in &deltas {
        writer.write_delta(delta, &bytes_of, &mut out);
        choice.add(delta.clone());
    }
    let gathered = Gathered { choices: vec![choice], ..Gathered::default() };
    let bytes = reply_json("c", &prompt(), &gathered, &completion(), false, &bytes_of);
    let reply: Value = serde_json::from_slice(&bytes).expect("is JSON");
    assert_eq!(reply["choices"][0]["finish_reason"], "tool_calls");
    let function = |name, arguments| json!({"name": name, "arguments": arguments});
    assert_eq!(
        reply["choices"][0]["message"],
        json!({"role": "assistant", "content": null, "refusal": null, "tool_calls": [
            {"id": "call_0", "type": "function", "function": function("f", "{\"a\": 1}")},
            {"id": "call_1", "type": "function", "function": function("g", "{}")},
        ]})
    );
    let chunks = events(&out);
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"tool_calls": [{"index": 0, "id": "call_0", "type": "function",
                               "function": function("f", "{\"a\"")}]})
    );
    assert_eq!(
        chunks[1]["choices"][0]["delta"],
        json!({"tool_calls": [
            {"index": 0, "function": {"arguments": ": 1}"}},
            {"index": 1, "id": "call_1", "type": "function", "function": function("g", "{}")},
        ]})
    );
}

#[test]
fn prompt_log_probabilities_are_those_of_vllm() {
    let among = TokenLogprobs { logprob: -0.5, top: vec![(7, -0.25), (2, -0.5)] };
    let beyond = TokenLogprobs { logprob: f32::NEG_INFINITY, top: vec![(7, -0.25)] };
    let gathered = Gathered { prompt_logprobs: vec![among, beyond], ..Gathered::default() };
    let bytes = reply_json("c", &prompt(), &gathered, &completion(), false, &bytes_of);
    let reply: Value = serde_json::from_slice(&bytes).expect("is JSON");
    assert_eq!(
        reply["prompt_logprobs"],
        json!([
            null,
            {"7": {"logprob": -0.25, "rank": 1, "decoded_token": "é"},
             "2": {"logprob": -0.5, "rank": 2, "decoded_token": ""}},
            {"3": {"logprob": -9999.0, "rank": null, "decoded_token": ""},
             "7": {"logprob": -0.25, "rank": 1, "decoded_token": "é"}},
        ])
    );
}

#[test]
fn silent_tokens_make_no_chunk() {
    let writer = ChunkWriter::new("c", &prompt(), false, false);
    let mut out = Vec::new();
    let silent = OutputToken { id: 8, logprobs: None };
    let delta = Delta { choice: 0, text: String::new(), tokens: vec![silent], tool_calls: vec![] };
    writer.write_delta(&delta, &bytes_of, &mut out);
    assert!(out.is_empty());
    writer.write_end(&prompt(), &completion(), &mut out);
    assert_eq!(events(&out), [Value::Null]);
}
