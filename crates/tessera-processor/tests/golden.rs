//! Comparison with the files that `tests/golden` wrote from transformers and tokenizers.

#![allow(clippy::unwrap_used)]

mod support;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{bytes, chat, describe, fixture, processor, rows, vision};
use tessera_processor::{ChatPrompt, Content, ContentPart, Detokenizer, Processor, Tokenizer};
use tessera_types::TokenId;

fn ids(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

/// Encodes the way HF does, taking added tokens wherever the text spells them.
fn encode_all(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let (mut out, mut rest) = (Vec::new(), text);
    while let Some((range, id)) = tokenizer.find_added(rest) {
        tokenizer.encode_plain(&rest[..range.start], &mut out).unwrap();
        out.push(id);
        rest = &rest[range.end..];
    }
    tokenizer.encode_plain(rest, &mut out).unwrap();
    out
}

fn push_all(mut detokenizer: Detokenizer, ids: &[TokenId]) -> String {
    let text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    text + &detokenizer.finish()
}

#[test]
fn tokens_and_text_equal_the_reference_tokenizer() {
    let processor = processor("tiny");
    let tokenizer = processor.tokenizer();
    for case in rows("tokenizer_cases.json") {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(encode_all(tokenizer, text), expected, "{text:?}");
        let all: Vec<u8> =
            expected.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        assert_eq!(String::from_utf8_lossy(&all), case["decoded"].as_str().unwrap());
        let visible = case["decoded_skip_special"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&expected), visible, "{text:?}");
        assert_eq!(push_all(processor.detokenizer(), &expected), visible, "{text:?}");
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let processor = processor("tiny");
    for case in rows("templates.json") {
        let mut prompt = chat(&case["messages"]);
        prompt.tools = case["tools"].as_array().cloned().unwrap_or_default();
        prompt.add_vision_id = case["add_vision_id"].as_bool().unwrap();
        prompt.add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let rendered = processor.render(&prompt).unwrap();
        assert_eq!(rendered, case["rendered"].as_str().unwrap(), "{}", case["name"]);
    }
}

fn assert_case(processor: &Processor, checkpoint: &str, case: &str, golden: &Value) {
    let context = format!("{checkpoint}/{case}");
    let prompt_of = chat(&golden["messages"]);
    assert_eq!(processor.render(&prompt_of).unwrap(), golden["prompt"], "{context}");
    let media = describe(processor, &golden["media"]);
    for (item, expected) in media.iter().zip(golden["media"].as_array().unwrap()) {
        let size = |size: tessera_media::Size| json!([size.width, size.height]);
        assert_eq!(size(item.source), expected["original"], "{context}");
        assert_eq!(size(item.resized), expected["resized"], "{context}");
        let grid = json!([item.grid.t, item.grid.h, item.grid.w]);
        assert_eq!(grid, expected["grid_thw"], "{context}");
        assert_eq!(u64::from(item.num_tokens), expected["tokens"], "{context}");
        if let Some(seconds) = expected["spg"].as_f64() {
            assert_eq!(item.seconds_per_grid, seconds, "{context}");
        }
    }
    let prompt = processor.prompt(&prompt_of, &media, &vision()).unwrap();
    assert_eq!(prompt.tokens, ids(&golden["expanded_ids"]), "{context}");
    assert_eq!(prompt.rope_delta(), golden["rope_delta"].as_i64().unwrap(), "{context}");

    let data = bytes(&format!("{checkpoint}/golden/{case}.safetensors"));
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let (expected, _) = tensors.tensor("position_ids").unwrap().data().as_chunks::<4>();
    let expected: Vec<i32> = expected.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
    let mut positions = Vec::new();
    prompt.extend_positions(0, prompt.tokens.len(), &mut positions);
    for (axis, expected) in expected.chunks_exact(prompt.tokens.len()).enumerate() {
        let got: Vec<i32> = positions.iter().map(|position| position[axis]).collect();
        assert_eq!(got, expected, "{context}, axis {axis}");
    }
}

#[test]
fn prompts_and_positions_equal_the_golden_cases() {
    let mut cases = 0;
    for checkpoint in ["tiny", "tiny-nested", "real-heads", "small-margin"] {
        let processor = processor(checkpoint);
        for entry in std::fs::read_dir(fixture(&format!("{checkpoint}/golden"))).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let golden: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
                let case = path.file_stem().unwrap().to_str().unwrap();
                assert_case(&processor, checkpoint, case, &golden);
                cases += 1;
            }
        }
    }
    assert!(cases >= 18, "only {cases} golden cases were found");
}

#[test]
fn replies_decode_to_the_golden_text() {
    let processor = processor("tiny");
    for case in ["text", "image_odd", "images", "video", "video_slow", "multi_turn"] {
        let golden = support::json(&format!("tiny/golden/{case}.json"));
        let tokens = ids(&golden["greedy_tokens"]);
        let text = golden["greedy_text"].as_str().unwrap();
        assert_eq!(push_all(processor.detokenizer(), &tokens), text, "{case}");
    }
}

/// Conversations of the fixture through templates in the published shapes and one that leans on all of
/// Jinja; `templates/rendered.json` holds what transformers 5.23 made of them.
#[test]
fn other_templates_render_as_transformers_renders_them() {
    let templates = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/templates");
    let rendered = std::fs::read(format!("{templates}/rendered.json")).unwrap();
    let rendered: Vec<Value> = serde_json::from_slice(&rendered).unwrap();
    assert!(rendered.len() > 30);
    let conversations = rows("templates.json");
    for name in ["multimodal", "text_tools", "dialect"] {
        let directory = tempfile::tempdir().unwrap();
        for file in [
            "config.json",
            "preprocessor_config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            std::fs::copy(fixture(&format!("tiny/{file}")), directory.path().join(file)).unwrap();
        }
        let template = format!("{templates}/{name}.jinja");
        std::fs::copy(template, directory.path().join("chat_template.jinja")).unwrap();
        let processor = Processor::load(directory.path()).unwrap();
        for expected in rendered.iter().filter(|row| row["template"] == name) {
            let case = conversations.iter().find(|row| row["name"] == expected["case"]).unwrap();
            let mut prompt = chat(&case["messages"]);
            if name == "text_tools" {
                flatten(&mut prompt);
            }
            prompt.tools = case["tools"].as_array().cloned().unwrap_or_default();
            prompt.add_vision_id = case["add_vision_id"].as_bool().unwrap();
            prompt.add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
            let got = processor.render(&prompt).unwrap();
            assert_eq!(got, expected["rendered"].as_str().unwrap(), "{name}: {}", case["name"]);
        }
    }
}

/// Contents as strings, as text templates want them.
fn flatten(prompt: &mut ChatPrompt) {
    for message in &mut prompt.messages {
        if let Content::Parts(parts) = &message.content {
            let texts = parts.iter().map(|part| match part {
                ContentPart::Text(text) => text.as_str(),
                _ => panic!("a text template gets no media"),
            });
            message.content = Content::Text(texts.collect());
        }
    }
}
