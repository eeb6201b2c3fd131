//! Seeds, choices, stops, streams and counts.

use serde_json::{Value, json};
use tessera_proto::common::v1::FinishReason;
use tessera_tests::chat::{self, text_body, with};
use tessera_tests::golden::Golden;
use tessera_tests::shared;
use tessera_tests::sse::Collected;

const QUESTION: &str = "Name 3 things.";

fn drawn(seed: u64, extra: Value) -> Value {
    let body = with(text_body(QUESTION, 24), json!({"temperature": 1, "top_p": 1, "seed": seed}));
    with(body, extra)
}

fn tokens(answer: &Value, choice: usize) -> Vec<u32> {
    chat::ids(&answer["choices"][choice], "token_ids")
}

#[test]
fn a_seed_decides_the_answer() {
    let http = shared::tp2().http();
    let answer = |seed| tokens(&http.chat(&drawn(seed, json!({}))).ok(), 0);
    let first = answer(7);
    assert_eq!(first.len(), 24);
    assert_eq!(answer(7), first);
    assert_ne!(answer(8), first);
}

#[test]
fn a_seed_means_the_same_on_both_faces() {
    let cluster = shared::tp2();
    let over_http = cluster.http().chat(&drawn(7, json!({}))).ok();
    let mut request = chat::request(chat::user(vec![chat::text(QUESTION)]), chat::drawn(24));
    request.seed = Some(7);
    let over_grpc = cluster.grpc().answer(request).expect("is answered");
    assert_eq!(over_grpc.prompt().effective_seed, 7);
    assert_eq!(over_grpc.choice().token_ids, tokens(&over_http, 0));
}

#[test]
fn a_drawn_seed_is_reported_and_repeats_the_answer() {
    let grpc = shared::tp2().grpc();
    let mut request = chat::request(chat::user(vec![chat::text(QUESTION)]), chat::drawn(24));
    let first = grpc.answer(request.clone()).expect("is answered");
    request.seed = Some(first.prompt().effective_seed);
    let second = grpc.answer(request).expect("is answered");
    assert_eq!(second.choice().token_ids, first.choice().token_ids);
}

#[test]
fn choices_differ_and_the_first_is_that_of_a_single_one() {
    let http = shared::tp2().http();
    let one = http.chat(&drawn(7, json!({}))).ok();
    let two = http.chat(&drawn(7, json!({"n": 2}))).ok();
    assert_eq!(two["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!((&two["choices"][0]["index"], &two["choices"][1]["index"]), (&json!(0), &json!(1)));
    assert_eq!(tokens(&two, 0), tokens(&one, 0));
    assert_ne!(tokens(&two, 1), tokens(&one, 0));
    assert_eq!(two["usage"]["completion_tokens"], 48);
    assert_eq!(two["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
}

#[test]
fn choices_of_a_grpc_stream_are_those_of_http() {
    let cluster = shared::tp2();
    let over_http = cluster.http().chat(&drawn(9, json!({"n": 3}))).ok();
    let mut request = chat::request(chat::user(vec![chat::text(QUESTION)]), chat::drawn(24));
    (request.seed, request.n) = (Some(9), Some(3));
    let answer = cluster.grpc().answer(request).expect("is answered");
    for choice in 0..3 {
        assert_eq!(answer.choices[&choice].token_ids, tokens(&over_http, choice as usize));
        assert_eq!(answer.choices[&choice].reason, FinishReason::Length);
    }
}

/// Stop strings of the golden text: inside a token, one token, over three tokens. The text ends before
/// the string, however it was cut into tokens.
#[test]
fn stop_strings_end_the_text_before_them() {
    let cluster = shared::tp2();
    let golden = Golden::load("tiny", "text");
    for stop in ["quest", " group", "oup St gr"] {
        let at = golden.greedy_text.find(stop).expect("the text has it");
        let expected = &golden.greedy_text[..at];
        let body = with(golden.http_body(), json!({"stop": ["never there", stop]}));
        let answer = cluster.http().chat(&body).ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], expected, "{stop:?}");
        assert_eq!(choice["finish_reason"], "stop", "{stop:?}");
        let counted = answer["usage"]["completion_tokens"].as_u64().expect("a count");
        assert_eq!(counted, tokens(&answer, 0).len() as u64, "{stop:?}");
        assert!(golden.greedy_tokens.starts_with(&tokens(&answer, 0)), "{stop:?}");
        assert!(counted < golden.greedy_tokens.len() as u64, "{stop:?}");

        let streamed: Vec<Value> = cluster.http().chat_stream(&body).collect();
        assert_eq!(streamed.iter().collect::<Collected>().text, expected, "{stop:?}");

        let mut request = chat::golden(&golden);
        request.stop = vec![stop.to_owned()];
        let answer = cluster.grpc().answer(request).expect("is answered");
        assert_eq!(answer.choice().text, expected);
        assert_eq!(answer.choice().reason, FinishReason::StopString);
        assert_eq!(answer.choice().matched_stop, stop);
    }
}

#[test]
fn stop_tokens_end_the_answer() {
    let golden = Golden::load("tiny", "text");
    let mut request = chat::golden(&golden);
    let stop = golden.greedy_tokens[3];
    request.sampling.as_mut().expect("set").stop_token_ids = vec![stop];
    let answer = shared::tp2().grpc().answer(request).expect("is answered");
    let choice = answer.choice();
    assert_eq!(choice.reason, FinishReason::StopToken);
    assert!(golden.greedy_tokens.starts_with(&choice.token_ids), "{choice:?}");
    assert!((3..=4).contains(&choice.token_ids.len()), "{choice:?}");
}

#[test]
fn a_stream_says_what_a_whole_answer_says() {
    let http = shared::tp2().http();
    for case in ["text", "image_odd"] {
        let golden = Golden::load("tiny", case);
        let whole = http.chat(&golden.http_body()).ok();
        let body = with(golden.http_body(), json!({"stream_options": {"include_usage": true}}));
        let mut events = http.chat_stream(&body);
        let received: Vec<Value> = events.by_ref().collect();
        assert!(events.is_done(), "the stream ends with [DONE]");
        let streamed: Collected = received.iter().collect();
        assert_eq!(streamed.text, whole["choices"][0]["message"]["content"]);
        assert_eq!(streamed.token_ids, tokens(&whole, 0));
        assert_eq!(streamed.prompt_token_ids, golden.prompt_ids);
        assert_eq!(streamed.finish_reason.as_deref(), Some("length"));
        let usage = streamed.usage.expect("was asked for");
        for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(usage[count], whole["usage"][count], "{count}");
        }
        // Tokens travel one by one, not as one lump at the end.
        let with_text =
            |event: &&Value| event["choices"][0]["delta"]["content"].as_str() != Some("");
        assert!(received.iter().filter(with_text).count() > golden.greedy_tokens.len() / 2);
    }
}

#[test]
fn usage_counts_prompt_output_and_media() {
    let cluster = shared::tp2();
    let golden = Golden::load("tiny", "images");
    let usage = cluster.http().chat(&golden.http_body()).ok()["usage"].clone();
    let (prompt, output) = (golden.prompt_ids.len(), golden.greedy_tokens.len());
    assert_eq!(usage["prompt_tokens"], prompt);
    assert_eq!(usage["completion_tokens"], output);
    assert_eq!(usage["total_tokens"], prompt + output);

    let answer = cluster.grpc().generate_once(chat::golden(&golden)).expect("is answered");
    let usage = answer.completion.and_then(|completion| completion.usage).expect("usage");
    assert_eq!(usage.num_prompt_tokens as usize, prompt);
    assert_eq!(usage.num_output_tokens as usize, output);
    assert_eq!(
        usage.num_media_tokens,
        golden.media.iter().map(|item| item.num_tokens).sum::<u32>()
    );
}

#[test]
fn log_probabilities_over_http_name_the_drawn_token() {
    let body = drawn(11, json!({"logprobs": true, "top_logprobs": 4}));
    let answer = shared::tp2().http().chat(&body).ok();
    let content =
        answer["choices"][0]["logprobs"]["content"].as_array().expect("log probabilities");
    assert_eq!(content.len(), 24);
    let mut bytes = Vec::new();
    for entry in content {
        let own = entry["logprob"].as_f64().expect("a number");
        let top = entry["top_logprobs"].as_array().expect("a list");
        assert_eq!(top.len(), 4);
        let likely: Vec<f64> = top.iter().filter_map(|entry| entry["logprob"].as_f64()).collect();
        assert!(own <= likely[0] && likely.is_sorted_by(|a, b| a >= b), "{entry}");
        // The drawn token is one of the best, or less likely than all of them.
        let listed = top.iter().any(|other| other["token"] == entry["token"]);
        assert!(listed || own <= likely[3], "{entry}");
        let sum: f64 = likely.iter().map(|logprob| logprob.exp()).sum();
        assert!(sum <= 1.0 + 1e-3, "{entry}");
        let own_bytes = entry["bytes"].as_array().expect("bytes");
        bytes.extend(own_bytes.iter().map(|byte| byte.as_u64().expect("a byte") as u8));
    }
    let text = answer["choices"][0]["message"]["content"].as_str().expect("a text");
    assert_eq!(String::from_utf8_lossy(&bytes), text, "the tokens' bytes make the text");
}

#[test]
fn a_repetition_penalty_changes_a_repetitive_answer() {
    let http = shared::tp2().http();
    let golden = Golden::load("tiny", "video");
    let repeats = |tokens: &[u32]| tokens.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert!(repeats(&golden.greedy_tokens) > 0, "the golden case repeats itself");
    let body = with(golden.http_body(), json!({"repetition_penalty": 2.0}));
    let penalised = tokens(&http.chat(&body).ok(), 0);
    assert!(repeats(&penalised) < repeats(&golden.greedy_tokens), "{penalised:?}");
}

#[test]
fn unknown_fields_are_ignored() {
    let golden = Golden::load("tiny", "text");
    let body = with(golden.http_body(), json!({"no_such_field": {"a": [1]}, "user": "someone"}));
    assert_eq!(tokens(&shared::tp2().http().chat(&body).ok(), 0), golden.greedy_tokens);
}

/// At a high temperature answers are full of half characters; a stream never sends one.
#[test]
fn wild_answers_are_streamed_as_they_are_whole() {
    let http = shared::tp2().http();
    for seed in 0..4 {
        let body = drawn(seed, json!({"temperature": 2, "max_tokens": 48}));
        let whole = http.chat(&body).ok();
        let events: Vec<Value> = http.chat_stream(&body).collect();
        let streamed: Collected = events.iter().collect();
        assert_eq!(streamed.token_ids, tokens(&whole, 0), "seed {seed}");
        assert_eq!(streamed.text, whole["choices"][0]["message"]["content"], "seed {seed}");
    }
}

#[test]
fn a_prompt_seen_before_is_found_in_the_prefix_cache() {
    let http = shared::tp2().http();
    let body = text_body("A prompt of its own, longer than a block of the cache by far.", 8);
    let first = http.chat(&body).ok();
    let second = http.chat(&body).ok();
    let cached =
        |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    let prompt = second["usage"]["prompt_tokens"].as_u64();
    assert!(cached(&second) > cached(&first), "{second}");
    assert!(cached(&second) < prompt, "the last token is always computed: {second}");
    assert_eq!(tokens(&second, 0), tokens(&first, 0));
}
