use tessera_processor::{ContentPart, ToolChoice, ToolUse};
use tessera_types::Grammar;

use super::*;

fn parse(body: &str) -> Result<ChatBody, RequestError> {
    parse_chat(
        body.as_bytes(),
        "r1".to_owned(),
        Instant::now(),
        &LimitsConfig::default(),
        &UnknownFields::default(),
    )
}

/// A minimal body with `extra` fields.
fn with(extra: &str) -> Result<ChatBody, RequestError> {
    let comma = if extra.is_empty() { "" } else { "," };
    parse(&format!(r#"{{"messages": [{{"role": "user", "content": "hi"}}]{comma} {extra}}}"#))
}

#[test]
fn a_full_openai_request_is_understood() {
    let body = with(
        r#""model": "m", "temperature": 0.5, "top_p": 0.9, "seed": -1, "max_tokens": 7, "n": 3,
           "max_completion_tokens": 9, "stop": ["a", "b", "c", "d", "e"], "logprobs": true,
           "top_logprobs": 5, "stream": true, "stream_options": {"include_usage": true},
           "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100, "12": 1.5},
           "response_format": {"type": "text"}, "user": "someone""#,
    )
    .expect("valid");
    let request = &body.request;
    assert_eq!(request.model, "m");
    assert_eq!(request.seed, Some(u64::MAX));
    assert_eq!(request.num_choices, 3);
    assert_eq!(request.stop.len(), 5);
    assert_eq!(request.sampling.max_tokens, Some(9));
    assert_eq!(request.sampling.logprobs, Some(5));
    assert_eq!(request.sampling.temperature, Some(0.5));
    assert_eq!(request.sampling.presence_penalty, Some(0.5));
    assert_eq!(request.sampling.logit_bias, [(12, 1.5), (5, -100.0)]);
    assert!(body.stream && body.include_usage);
}

#[test]
fn the_extras_of_vllm_are_understood() {
    let body = with(
        r#""repetition_penalty": 1.1, "top_k": -1, "min_p": 0.1, "ignore_eos": true,
           "min_tokens": 2, "stop_token_ids": [1, 2], "return_token_ids": true"#,
    )
    .expect("valid");
    let sampling = &body.request.sampling;
    assert_eq!(sampling.repetition_penalty, Some(1.1));
    assert_eq!(sampling.top_k, Some(0));
    assert_eq!(sampling.min_p, Some(0.1));
    assert_eq!(sampling.ignore_eos, Some(true));
    assert_eq!(sampling.min_tokens, Some(2));
    assert_eq!(sampling.stop_token_ids, [1, 2]);
    assert!(body.request.return_token_ids);
}

#[test]
fn absence_and_null_mean_the_default() {
    let body =
        with(r#""temperature": null, "stop": null, "seed": null, "n": null"#).expect("valid");
    assert_eq!(body.request.sampling, SamplingOverrides::default());
    assert_eq!((body.request.num_choices, body.request.seed), (1, None));
    assert!(!body.stream && !body.request.return_token_ids);
}

#[test]
fn unknown_fields_are_ignored() {
    let unknown = UnknownFields::default();
    let body =
        br#"{"messages": [{"role": "user", "content": "hi", "cache_control": 1}], "zzz": {}}"#;
    for _ in 0..2 {
        parse_chat(body, String::new(), Instant::now(), &LimitsConfig::default(), &unknown)
            .expect("valid");
    }
}

#[test]
fn tools_and_tool_turns_are_kept_for_the_prompt() {
    let body = parse(
        r#"{"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto",
            "messages": [
              {"role": "developer", "content": "be brief"},
              {"role": "user", "content": [{"type": "text", "text": "go"}]},
              {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
              {"role": "tool", "tool_call_id": "c1", "content": "42"}]}"#,
    )
    .expect("valid");
    let messages = &body.request.chat.messages;
    assert_eq!(messages[0].role, Role::System);
    assert_eq!(messages[1].content, Content::Parts(vec![ContentPart::Text("go".to_owned())]));
    assert_eq!(messages[2].tool_calls[0].arguments["a"], 1);
    assert_eq!(messages[3].role, Role::Tool);
    assert_eq!(messages[3].tool_call_id.as_deref(), Some("c1"));
    assert_eq!(body.request.chat.tools.len(), 1);

    let none = with(
        r#""tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none""#,
    );
    let none = none.expect("valid").request;
    assert_eq!((none.chat.tools.len(), none.tool_use.choice), (1, ToolChoice::None));
}

#[test]
fn the_use_of_tools_and_the_form_of_the_answer_are_understood() {
    let body = with(
        r#""tools": [{"type": "function", "function": {"name": "f"}}], "parallel_tool_calls": false,
           "tool_choice": {"type": "function", "function": {"name": "f"}}, "priority": -3,
           "prompt_logprobs": 2, "structured_outputs": {"regex": "a+"}"#,
    );
    let request = body.expect("valid").request;
    let choice = ToolChoice::Function("f".to_owned());
    assert_eq!(request.tool_use, ToolUse { choice, parallel: false });
    assert_eq!((request.priority, request.sampling.prompt_logprobs), (-3, Some(2)));
    assert_eq!(request.sampling.grammar, Some(Grammar::Regex("a+".to_owned())));
    assert_eq!(request.grammar_field, "structured_outputs.regex");
    let required = with(r#""tool_choice": "required""#).expect("valid").request.tool_use;
    assert_eq!(required, ToolUse { choice: ToolChoice::Required, parallel: true });
}

#[test]
fn bad_input_is_refused_by_field() {
    let cases = [
        (r#"{}"#, "messages"),
        (r#"{"messages": []}"#, "messages"),
        (r#"{"messages": {}}"#, "messages"),
        (r#"{"messages": ["hi"]}"#, "messages[0]"),
        (r#"{"messages": [{"content": "hi"}]}"#, "messages[0].role"),
        (r#"{"messages": [{"role": "king", "content": "hi"}]}"#, "messages[0].role"),
        (r#"{"messages": [{"role": "user"}]}"#, "messages[0]"),
        (r#"{"messages": [{"role": "user", "content": null}]}"#, "messages[0]"),
        (r#"{"messages": [{"role": "user", "content": 7}]}"#, "messages[0].content"),
        (
            r#"{"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}"#,
            "messages[0].tool_calls",
        ),
        (
            r#"{"messages": [{"role": "assistant", "tool_calls":
                [{"function": {"name": "f", "arguments": {}}}]}]}"#,
            "messages[0].tool_calls[0].function.arguments",
        ),
    ];
    for (body, field) in cases {
        let error = parse(body).expect_err(body);
        assert_eq!(error.field(), Some(field), "{body}: {error}");
    }
}

#[test]
fn bad_values_are_refused_by_field() {
    let cases = [
        (r#""model": 7"#, "model"),
        (r#""temperature": "warm""#, "temperature"),
        (r#""max_tokens": 0"#, "max_tokens"),
        (r#""max_tokens": -5"#, "max_tokens"),
        (r#""max_tokens": 1.5"#, "max_tokens"),
        (r#""max_completion_tokens": 0"#, "max_completion_tokens"),
        (r#""n": 0"#, "n"),
        (r#""n": 1000"#, "n"),
        (r#""seed": 1.5"#, "seed"),
        (r#""top_k": -2"#, "top_k"),
        (r#""stop": [1]"#, "stop[0]"),
        (r#""stop": {"a": 1}"#, "stop"),
        (r#""top_logprobs": 3"#, "top_logprobs"),
        (r#""logprobs": 3"#, "logprobs"),
        (r#""logit_bias": {"hello": 1}"#, "logit_bias"),
        (r#""stop_token_ids": [-1]"#, "stop_token_ids"),
        (r#""stream_options": 1"#, "stream_options"),
        (r#""tools": [{"type": "function"}]"#, "tools[0]"),
        (r#""tools": 3"#, "tools"),
        (r#""tool_choice": "maybe""#, "tool_choice"),
        (r#""tool_choice": {"type": "function"}"#, "tool_choice.function"),
        (r#""tool_choice": {"type": "function", "function": {}}"#, "tool_choice.function.name"),
        (r#""parallel_tool_calls": 1"#, "parallel_tool_calls"),
        (r#""priority": 1001"#, "priority"),
        (r#""priority": 0.5"#, "priority"),
        (r#""prompt_logprobs": -1"#, "prompt_logprobs"),
        (r#""prompt_logprobs": 1, "stream": true"#, "prompt_logprobs"),
    ];
    for (extra, field) in cases {
        let error = with(extra).expect_err(extra);
        assert!(matches!(error, RequestError::Invalid { .. }), "{extra}: {error}");
        assert_eq!(error.field(), Some(field), "{extra}: {error}");
    }
}

#[test]
fn known_features_that_are_missing_are_named() {
    for (extra, field) in [
        (r#""response_format": {"type": "structural_tag"}"#, "response_format.type"),
        (r#""guided_json": {}"#, "guided_json"),
        (r#""tool_choice": {"type": "allowed_tools"}"#, "tool_choice.type"),
        (r#""audio": {}"#, "audio"),
    ] {
        let error = with(extra).expect_err(extra);
        assert!(matches!(error, RequestError::Unsupported { .. }), "{extra}: {error}");
        assert_eq!(error.field(), Some(field));
        assert!(error.to_string().contains("not supported yet"));
    }
}

#[test]
fn tokenize_takes_text_or_a_conversation() {
    let parse = |body: &str| {
        parse_tokenize(
            body.as_bytes(),
            String::new(),
            Instant::now(),
            &LimitsConfig::default(),
            &UnknownFields::default(),
        )
    };
    assert!(matches!(
        parse(r#"{"model": "m", "prompt": "hello"}"#),
        Ok(TokenizeBody::Text { prompt, .. }) if prompt == "hello"
    ));
    assert!(matches!(
        parse(r#"{"messages": [{"role": "user", "content": "hi"}]}"#),
        Ok(TokenizeBody::Chat(_))
    ));
    assert!(parse(r#"{"prompt": 7}"#).is_err());
    assert!(parse("{}").is_err());
}
