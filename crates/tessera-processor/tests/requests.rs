//! What clients may do to a prompt, and what they may not.

#![allow(clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use serde_json::json;
use support::{bounds, chat, image, processor, video, vision};
use tessera_processor::{
    BlockKeyChain, ChatPrompt, CheckpointError, Content, ContentPart, MediaDescription, Message,
    Processor, ProcessorError, Role, SamplingOverrides,
};
use tessera_types::{BlockKey, Hash256, ModelFingerprint, NumericsId, Prompt, TokenId};

fn user(parts: Vec<ContentPart>) -> ChatPrompt {
    ChatPrompt::new(vec![Message::parts(Role::User, parts)])
}

fn text(text: &str) -> ContentPart {
    ContentPart::Text(text.to_owned())
}

/// Ids of added tokens in order of appearance.
fn added(processor: &Processor, prompt: &Prompt) -> Vec<TokenId> {
    let is_added =
        |id: &TokenId| processor.tokenizer().added_tokens().iter().any(|token| token.id == *id);
    prompt.tokens.iter().copied().filter(is_added).collect()
}

fn bytes_of(processor: &Processor, prompt: &Prompt) -> Vec<u8> {
    let tokens = prompt.tokens.iter();
    tokens.flat_map(|&id| processor.tokenizer().token_bytes(id)).copied().collect()
}

#[test]
fn special_tokens_in_client_text_are_plain_text() {
    let processor = processor("tiny");
    let quiet = processor.prompt(&user(vec![text("x")]), &[], &vision()).unwrap();
    let expected = added(&processor, &quiet);
    let everywhere: String =
        processor.tokenizer().added_tokens().iter().map(|token| token.content.as_str()).collect();
    let spread = vec![text("<|im_"), text("end|>"), text("<|image_pad|>\u{f0000}"), text("<")];
    for parts in [vec![text(&everywhere)], spread] {
        let chat = user(parts);
        let prompt = processor.prompt(&chat, &[], &vision()).unwrap();
        assert_eq!(added(&processor, &prompt), expected);
        let rendered = processor.render(&chat).unwrap();
        assert_eq!(bytes_of(&processor, &prompt), rendered.as_bytes(), "the text itself is kept");
    }
    // The same in a system message, a tool and a call.
    let mut chat = chat(&json!([
        {"role": "system", "content": "<|im_end|>"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function":
            {"name": "<|im_end|>", "arguments": {"<|im_end|>": "<|video_pad|>"}}}]},
    ]));
    chat.tools = vec![json!({"type": "function", "function": {"name": "<|im_start|>"}})];
    let prompt = processor.prompt(&chat, &[], &vision()).unwrap();
    let count = |content: &str| {
        let id = processor.tokenizer().added_token_id(content).unwrap();
        prompt.tokens.iter().filter(|&&token| token == id).count()
    };
    assert_eq!([count("<|im_start|>"), count("<|im_end|>"), count("<|video_pad|>")], [4, 3, 0]);
    assert_eq!(bytes_of(&processor, &prompt), processor.render(&chat).unwrap().as_bytes());
}

#[test]
fn media_stand_where_their_parts_stand() {
    let processor = processor("tiny");
    let parts = vec![text("<|image_pad|>"), ContentPart::Image, text("b"), ContentPart::Video];
    let media = [
        image(&processor, "tiny_9x7.png", bounds(&processor)),
        video(&processor, &["turn_0.png", "turn_1.png"], 2.0, bounds(&processor)),
    ];
    let prompt = processor.prompt(&user(parts), &media, &vision()).unwrap();
    let special = processor.config().special;
    let spans: Vec<(u32, u32)> = prompt.media.iter().map(|s| (s.item, s.num_tokens)).collect();
    assert_eq!(spans, [(0, media[0].num_tokens), (1, media[1].num_tokens)]);
    for (span, pad) in prompt.media.iter().zip([special.image_pad, special.video_pad]) {
        let (start, end) = (span.offset as usize, span.end() as usize);
        assert!(prompt.tokens[start..end].iter().all(|&token| token == pad));
        assert_eq!(prompt.tokens[start - 1], special.vision_start);
        assert_eq!(prompt.tokens[end], special.vision_end);
    }
    let pads = |pad| prompt.tokens.iter().filter(|&&token| token == pad).count() as u32;
    assert_eq!(pads(special.image_pad), media[0].num_tokens);
    assert_eq!(pads(special.video_pad), media[1].num_tokens);
}

#[test]
fn bad_requests_name_their_field() {
    let processor = processor("tiny").with_max_context_len(60);
    let picture = || image(&processor, "tiny_9x7.png", bounds(&processor));
    let large = image(&processor, "tall_150x262.png", bounds(&processor));
    let ask = |chat: ChatPrompt, media: &[MediaDescription]| {
        processor.prompt(&chat, media, &vision()).expect_err("a bad request")
    };
    let frames = |fps: f64| {
        let config = processor.config();
        config.describe_frames(&[], fps, bounds(&processor)).expect_err("a bad video")
    };
    let pixels = |min, max| processor.config().pixel_bounds(min, max).expect_err("bad bounds");
    let long = "word ".repeat(60);
    let sampling = |max_tokens: u32| {
        let overrides = SamplingOverrides { max_tokens: Some(max_tokens), ..Default::default() };
        processor.sampling(&overrides, 50).expect_err("bad sampling")
    };
    let cases: Vec<(&str, &str, ProcessorError)> = vec![
        ("messages", "EMPTY_MESSAGES", ask(ChatPrompt::new(vec![]), &[])),
        ("messages", "UNKNOWN_ROLE", Role::parse("robot").expect_err("no such role")),
        ("messages", "MEDIA_MISMATCH", ask(user(vec![ContentPart::Image]), &[])),
        ("messages", "MEDIA_MISMATCH", ask(user(vec![text("x")]), &[picture()])),
        ("messages", "MEDIA_MISMATCH", ask(user(vec![ContentPart::Video]), &[picture()])),
        ("messages", "PROMPT_TOO_LONG", ask(user(vec![text(&long)]), &[])),
        ("messages", "PROMPT_TOO_LONG", ask(user(vec![ContentPart::Image]), &[large])),
        ("messages", "BAD_MEDIA", frames(2.0)),
        ("fps", "BAD_MEDIA_OPTION", frames(0.0)),
        ("fps", "BAD_MEDIA_OPTION", frames(f64::NAN)),
        ("min_pixels", "BAD_MEDIA_OPTION", pixels(Some(0), None)),
        ("min_pixels", "BAD_MEDIA_OPTION", pixels(Some(5000), Some(4000))),
        ("max_pixels", "BAD_MEDIA_OPTION", pixels(None, Some(u64::MAX))),
        ("max_tokens", "BAD_SAMPLING", sampling(0)),
        ("max_tokens", "OUTPUT_TOO_LONG", sampling(11)),
    ];
    for (param, reason, error) in cases {
        assert_eq!((error.param(), error.reason()), (param, reason), "{error}");
    }
    // Exactly one token of room is enough.
    let prompt = processor.prompt(&user(vec![text("x")]), &[], &vision()).unwrap();
    let full = prompt.tokens.len() as u32;
    let exact = support::processor("tiny").with_max_context_len(full + 1);
    assert!(exact.prompt(&user(vec![text("x")]), &[], &vision()).is_ok());
    let tight = support::processor("tiny").with_max_context_len(full);
    let refused = tight.prompt(&user(vec![text("x")]), &[], &vision()).expect_err("no room");
    assert!(matches!(refused, ProcessorError::PromptTooLong { .. }));
}

#[test]
fn a_template_without_media_is_an_error_not_a_silent_loss() {
    let directory = tempfile::tempdir().unwrap();
    copy_checkpoint(directory.path());
    let template = json!({"chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}"});
    std::fs::write(directory.path().join("chat_template.json"), template.to_string()).unwrap();
    let processor = Processor::load(directory.path()).unwrap();
    let media = [image(&processor, "tiny_9x7.png", bounds(&processor))];
    let lost = processor.prompt(&user(vec![ContentPart::Image]), &media, &vision());
    assert!(matches!(lost, Err(ProcessorError::MediaNotPlaced { parts: 1, found: 0 })));
}

fn copy_checkpoint(to: &std::path::Path) {
    for name in [
        "config.json",
        "preprocessor_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.json",
    ] {
        std::fs::copy(support::fixture(&format!("tiny/{name}")), to.join(name)).unwrap();
    }
}

#[test]
fn a_checkpoint_at_fault_is_named_by_file() {
    type Break = fn(&std::path::Path);
    let cases: [(&str, Break); 6] = [
        ("tokenizer.json", |d| std::fs::remove_file(d.join("tokenizer.json")).unwrap()),
        ("tokenizer.json", |d| std::fs::write(d.join("tokenizer.json"), "{}").unwrap()),
        ("chat_template.json", |d| {
            std::fs::write(d.join("chat_template.json"), r#"{"chat_template": "{% if %}"}"#)
                .unwrap()
        }),
        ("generation_config.json", |d| {
            let text = r#"{"eos_token_id": 1, "top_p": 7}"#;
            std::fs::write(d.join("generation_config.json"), text).unwrap()
        }),
        ("image_token_id", |d| edit_config(d, "image_token_id", json!(5))),
        ("vocab_size", |d| edit_config(d, "vocab_size", json!(2063))),
    ];
    for (name, break_it) in cases {
        let directory = tempfile::tempdir().unwrap();
        copy_checkpoint(directory.path());
        assert!(Processor::load(directory.path()).is_ok(), "the copy itself is whole");
        break_it(directory.path());
        let error: CheckpointError = Processor::load(directory.path()).err().unwrap();
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
}

fn edit_config(directory: &std::path::Path, field: &str, value: serde_json::Value) {
    let path = directory.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

/// All that a client can vary about one request with an image and a video.
#[derive(Clone)]
struct Variant {
    image: &'static str,
    frames: Vec<&'static str>,
    fps: f64,
    min_pixels: Option<u64>,
    video_max_pixels: Option<u64>,
    question: &'static str,
    image_first: bool,
    add_vision_id: bool,
    add_generation_prompt: bool,
    role: Role,
    tools: Vec<serde_json::Value>,
}

impl Variant {
    fn base() -> Self {
        Self {
            image: "odd_97x131.png",
            frames: vec!["walk_0.png", "walk_1.png", "walk_2.png", "walk_3.png"],
            fps: 2.0,
            min_pixels: None,
            video_max_pixels: None,
            question: "What is this?",
            image_first: true,
            add_vision_id: false,
            add_generation_prompt: true,
            role: Role::User,
            tools: Vec::new(),
        }
    }

    /// The key of the last block, which through its parents covers the whole prompt.
    fn last_key(&self, processor: &Processor) -> BlockKey {
        let config = processor.config();
        let bounds = config.pixel_bounds(self.min_pixels, None).unwrap();
        let mut media = vec![image(processor, self.image, bounds)];
        let bounds = config.pixel_bounds(None, self.video_max_pixels).unwrap();
        media.push(video(processor, &self.frames, self.fps, bounds));
        let mut parts = vec![ContentPart::Image, ContentPart::Video, text(self.question)];
        if !self.image_first {
            media.swap(0, 1);
            parts.swap(0, 1);
        }
        let mut message = Message::parts(self.role, Vec::new());
        message.content = Content::Parts(parts);
        let mut chat = ChatPrompt::new(vec![message]);
        chat.add_vision_id = self.add_vision_id;
        chat.add_generation_prompt = self.add_generation_prompt;
        chat.tools = self.tools.clone();
        let prompt = processor.prompt(&chat, &media, &vision()).unwrap();
        let (model, numerics) = (ModelFingerprint(Hash256([3; 32])), NumericsId(Hash256([4; 32])));
        let chain = BlockKeyChain::new(model, numerics, 1, "", []);
        *chain.keys(&prompt, &[]).last().unwrap()
    }
}

#[test]
fn every_request_field_that_changes_pixels_or_positions_changes_a_key() {
    let processor = processor("tiny");
    type Edit = fn(&mut Variant);
    let edits: [(&str, Edit); 14] = [
        ("another role", |v| v.role = Role::Assistant),
        ("another image of the same size", |v| v.image = "other_97x131.png"),
        ("an image of another size", |v| v.image = "tall_150x262.png"),
        ("frames in another order", |v| v.frames.swap(0, 1)),
        ("a frame less", |v| v.frames.truncate(3)),
        ("two frames less", |v| v.frames.truncate(2)),
        ("another fps", |v| v.fps = 1.0),
        ("larger images", |v| v.min_pixels = Some(100_000)),
        ("smaller frames", |v| v.video_max_pixels = Some(4000)),
        ("another question", |v| v.question = "What is that?"),
        ("another order of parts", |v| v.image_first = false),
        ("numbered media", |v| v.add_vision_id = true),
        ("no generation prompt", |v| v.add_generation_prompt = false),
        ("tools", |v| v.tools = vec![json!({"name": "f"})]),
    ];
    let mut keys = vec![("nothing", Variant::base().last_key(&processor))];
    for (name, edit) in edits {
        let mut variant = Variant::base();
        edit(&mut variant);
        let key = variant.last_key(&processor);
        let twin = keys.iter().find(|(_, known)| *known == key);
        assert!(twin.is_none(), "{name} has the key of {:?}", twin.map(|(name, _)| name));
        assert_eq!(variant.last_key(&processor), key, "{name}: a key is a function of the request");
        keys.push((name, key));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn detokenizing_one_by_one_equals_decoding_at_once(
        ids in proptest::collection::vec(0u32..2300, 0..60), bytes in "\\PC{0,12}",
    ) {
        thread_local!(static PROCESSOR: Processor = processor("tiny"));
        PROCESSOR.with(|processor| {
            // Random ids give invalid UTF-8, a text in single bytes gives long characters.
            let mut ids = ids;
            for byte in bytes.bytes() {
                let single = (0..256u32).find(|&id| processor.tokenizer().token_bytes(id) == [byte]);
                ids.push(single.unwrap());
            }
            let mut detokenizer = processor.detokenizer();
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&detokenizer.push(id));
            }
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, processor.tokenizer().decode(&ids));
            Ok(())
        })?;
    }

    #[test]
    fn client_text_never_yields_a_special_token(
        fragments in proptest::collection::vec(
            prop_oneof![
                Just("<|"), Just("|>"), Just("im_end"), Just("<|im_start|>"), Just("image_pad"),
                Just("<tool_call>"), Just("<"), Just("\u{f0000}"), Just("é"), Just(" "), Just("\n"),
            ],
            1..12,
        ),
        joined in any::<bool>(),
    ) {
        thread_local!(static PROCESSOR: Processor = processor("tiny"));
        PROCESSOR.with(|processor| {
            let chat = match joined {
                true => user(vec![text(&fragments.concat())]),
                false => user(fragments.iter().map(|fragment| text(fragment)).collect()),
            };
            let prompt = processor.prompt(&chat, &[], &vision()).unwrap();
            let quiet = processor.prompt(&user(vec![text("x")]), &[], &vision()).unwrap();
            prop_assert_eq!(added(processor, &prompt), added(processor, &quiet));
            let rendered = processor.render(&chat).unwrap();
            prop_assert_eq!(bytes_of(processor, &prompt), rendered.into_bytes());
            Ok(())
        })?;
    }
}
