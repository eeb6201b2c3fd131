//! Structured output over the fake executor: what is drawn belongs to the grammar, at any depth, after
//! preemption and after a move. The validators share nothing with the library that makes the masks.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use serde_json::{Value, json};
use tessera_engine::{EngineConfig, Event, GrammarError, GrammarVocabulary, SequenceError};
use tessera_scheduler::SchedulerConfig;
use tessera_types::{FinishReason, Grammar, SamplingParams, TokenId};

use crate::turns::{Bench, prompt, submission, tokens};

/// Beside the 256 bytes.
const WORDS: [&str; 12] =
    ["\"name\"", "{\"", "\":", "true", "false", "null", "ab", "abc", ", ", "12", "é", "日本"];
const TOOL_CALL: TokenId = 268;
const END_TOOL_CALL: TokenId = 269;
const END_OF_TEXT: TokenId = 270;
const IM_END: TokenId = 271;
const VOCAB_SIZE: u32 = 300;

/// Bytes, some words, four added tokens, and rows of padding beyond them.
fn vocabulary() -> GrammarVocabulary {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.extend(WORDS.iter().map(|word| word.as_bytes().to_vec()));
    let added = ["<tool_call>", "</tool_call>", "<|endoftext|>", "<|im_end|>"];
    tokens.extend(added.iter().map(|token| token.as_bytes().to_vec()));
    let spell = |text: &str| text.bytes().map(TokenId::from).collect();
    GrammarVocabulary {
        tokens,
        added: vec![TOOL_CALL, END_TOOL_CALL, END_OF_TEXT, IM_END],
        eos_token_ids: vec![IM_END, END_OF_TEXT],
        encode: Arc::new(spell),
    }
}

fn config(pipeline_depth: u32) -> EngineConfig {
    EngineConfig {
        scheduler: SchedulerConfig {
            block_size: 8,
            max_running: 6,
            max_waiting: 200,
            max_waiting_per_tenant: 200,
            max_tokens_per_step: 16,
            max_model_len: 512,
            pipeline_depth,
            reserved_blocks: 1,
        },
        vocab_size: VOCAB_SIZE,
        eos_token_ids: vec![IM_END, END_OF_TEXT],
        grammar_vocabulary: Some(vocabulary()),
        ..crate::turns::config(pipeline_depth)
    }
}

/// A run of one sequence with a grammar, by seed.
#[derive(Clone)]
struct Case {
    grammar: Grammar,
    seed: u64,
    output: Vec<TokenId>,
    max_tokens: u32,
}

impl Case {
    fn new(grammar: Grammar, seed: u64) -> Self {
        Self { grammar, seed, output: Vec::new(), max_tokens: 400 }
    }

    fn submit(&self, bench: &Bench) -> Receiver<Event> {
        self.submit_with(bench, |_| ())
    }

    fn submit_with(
        &self,
        bench: &Bench,
        edit: impl FnOnce(&mut SamplingParams),
    ) -> Receiver<Event> {
        let mut submission = submission(prompt(self.seed as u32, &[]), self.max_tokens);
        let sampling = Arc::make_mut(&mut submission.sampling);
        sampling.grammar = Some(self.grammar.clone());
        edit(sampling);
        submission.seed = self.seed;
        submission.output = self.output.clone();
        bench.submit_with_room(submission, 500)
    }
}

fn bench(config: EngineConfig, num_blocks: u32) -> Bench {
    Bench::of_vocabulary(config, VOCAB_SIZE, num_blocks)
}

/// New tokens of each case, all submitted at once, and how it ended.
fn run(cases: &[Case], depth: u32, num_blocks: u32) -> (Vec<(Vec<TokenId>, Event)>, u64) {
    let mut bench = bench(config(depth), num_blocks);
    let streams: Vec<_> = cases.iter().map(|case| case.submit(&bench)).collect();
    bench.settle_with_grammars();
    let read = |(case, events): (&Case, &Receiver<Event>)| {
        let (tokens, last) = tokens(events, case.output.len());
        (tokens, last.expect("an event"))
    };
    let drawn = cases.iter().zip(&streams).map(read).collect();
    bench.assert_empty();
    (drawn, bench.handle.load().scheduler.num_preemptions)
}

/// Tokens without the times they took.
fn outputs(drawn: &[(Vec<TokenId>, Event)]) -> Vec<&[TokenId]> {
    drawn.iter().map(|(tokens, _)| &tokens[..]).collect()
}

/// The text of output that ended by itself; `None` where the limit of tokens cut it.
fn text(drawn: &(Vec<TokenId>, Event)) -> Option<String> {
    let (tokens, last) = drawn;
    let Event::Finished { reason, .. } = last else { panic!("{last:?}") };
    if *reason == FinishReason::Length {
        return None;
    }
    assert_eq!(*reason, FinishReason::EndOfSequence);
    let (end, tokens) = tokens.split_last().expect("an end-of-sequence token");
    assert!([IM_END, END_OF_TEXT].contains(end));
    let words = vocabulary().tokens;
    let bytes = tokens.iter().flat_map(|&token| words[token as usize].clone()).collect();
    Some(String::from_utf8(bytes).expect("grammars of text give text"))
}

/// A schema with its own idea of what it admits.
enum Shape {
    Boolean,
    Null,
    Integer(i64, i64),
    Text(usize),
    Enum(Vec<Value>),
    List(Box<Shape>, usize),
    /// Every property is required, and there are no others.
    Record(Vec<(String, Shape)>),
    Either(Vec<Shape>),
}

impl Shape {
    /// One of bounded depth; `numbers` decides.
    fn draw(numbers: &mut Numbers, depth: u32) -> Self {
        match numbers.below(if depth == 0 { 5 } else { 8 }) {
            0 => Self::Boolean,
            1 => Self::Null,
            2 => {
                let low = numbers.below(2000) as i64 - 1000;
                Self::Integer(low, low + numbers.below(500) as i64)
            }
            3 => Self::Text(numbers.below(12) as usize),
            4 => Self::Enum(vec![json!("a\"b"), json!(7), json!(null), json!([1, {"x": "é"}])]),
            5 => Self::List(Box::new(Self::draw(numbers, depth - 1)), numbers.below(3) as usize),
            6 => {
                let property = |i: u64| {
                    let name = ["name", "two words", "q\"uote", "日本"][i as usize];
                    (name.to_owned(), Self::draw(numbers, depth - 1))
                };
                let count = 1 + depth as u64;
                Self::Record((0..count.min(4)).map(property).collect())
            }
            _ => Self::Either((0..2).map(|_| Self::draw(numbers, depth - 1)).collect()),
        }
    }

    fn schema(&self) -> Value {
        match self {
            Self::Boolean => json!({"type": "boolean"}),
            Self::Null => json!({"type": "null"}),
            Self::Integer(low, high) => {
                json!({"type": "integer", "minimum": low, "maximum": high})
            }
            Self::Text(len) => json!({"type": "string", "maxLength": len}),
            Self::Enum(values) => json!({"enum": values}),
            Self::List(of, len) => {
                json!({"type": "array", "items": of.schema(), "minItems": len, "maxItems": len + 1})
            }
            Self::Record(properties) => {
                let schemas = properties.iter().map(|(name, of)| (name.clone(), of.schema()));
                let names: Vec<_> = properties.iter().map(|(name, _)| name).collect();
                json!({
                    "type": "object",
                    "properties": Value::Object(schemas.collect()),
                    "required": names,
                    "additionalProperties": false,
                })
            }
            Self::Either(shapes) => {
                json!({"anyOf": shapes.iter().map(Self::schema).collect::<Vec<_>>()})
            }
        }
    }

    fn admits(&self, value: &Value) -> bool {
        match self {
            Self::Boolean => value.is_boolean(),
            Self::Null => value.is_null(),
            // JSON's −0 is an integer, and serde_json reads it as a float.
            Self::Integer(low, high) => {
                let number = value.as_i64().or_else(|| (value.as_f64() == Some(0.0)).then_some(0));
                number.is_some_and(|n| (*low..=*high).contains(&n))
            }
            Self::Text(len) => value.as_str().is_some_and(|text| text.chars().count() <= *len),
            Self::Enum(values) => values.contains(value),
            Self::List(of, len) => value.as_array().is_some_and(|items| {
                (*len..=len + 1).contains(&items.len()) && items.iter().all(|item| of.admits(item))
            }),
            Self::Record(properties) => value.as_object().is_some_and(|object| {
                let has =
                    |(name, of): &(String, Shape)| object.get(name).is_some_and(|v| of.admits(v));
                object.len() == properties.len() && properties.iter().all(has)
            }),
            Self::Either(shapes) => shapes.iter().any(|shape| shape.admits(value)),
        }
    }
}

/// A sequence of numbers, the same in every run (Steele et al. 2014, SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

fn json_cases() -> Vec<(Shape, Case)> {
    let mut numbers = Numbers(7);
    let case = |seed| {
        let shape = Shape::draw(&mut numbers, 3);
        let case = Case::new(Grammar::JsonSchema(shape.schema().to_string()), seed);
        (shape, case)
    };
    (0..40).map(case).collect()
}

/// `<tool_call>`, a line of JSON with the spacing of the chat template, `</tool_call>`.
const TOOL_CALL_GRAMMAR: &str = r#"
start: <tool_call> "\n" call "\n" </tool_call>
call: add | sub
add: %json {
    "type": "object",
    "properties": {
        "name": { "const": "add" },
        "arguments": {
            "type": "object",
            "properties": { "a": { "type": "integer", "minimum": 0, "maximum": 99 } },
            "required": ["a"],
            "additionalProperties": false
        }
    },
    "required": ["name", "arguments"],
    "additionalProperties": false,
    "x-guidance": { "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " }
}
sub: %json {
    "type": "object",
    "properties": { "name": { "const": "sub" }, "arguments": { "type": "object", "additionalProperties": false } },
    "required": ["name", "arguments"],
    "additionalProperties": false,
    "x-guidance": { "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " }
}
"#;

fn is_tool_call(text: &str) -> bool {
    let inner = text.strip_prefix("<tool_call>\n").and_then(|t| t.strip_suffix("\n</tool_call>"));
    let Some(inner) = inner else { return false };
    let small = |digits: &str| digits.parse::<u32>().is_ok_and(|n| n <= 99);
    let add = inner.strip_prefix(r#"{"name": "add", "arguments": {"a": "#);
    inner == r#"{"name": "sub", "arguments": {}}"#
        || add.and_then(|rest| rest.strip_suffix("}}")).is_some_and(small)
}

#[test]
fn outputs_belong_to_their_grammar_at_both_depths() {
    let shapes = json_cases();
    let cases: Vec<Case> = shapes.iter().map(|(_, case)| case.clone()).collect();
    let (drawn, _) = run(&cases, 1, 500);
    let mut num_ended = 0;
    for ((shape, case), drawn) in shapes.iter().zip(&drawn) {
        let Some(text) = text(drawn) else { continue };
        num_ended += 1;
        let value = serde_json::from_str(&text).expect("JSON");
        assert!(shape.admits(&value), "{text:?} under {:?}", case.grammar);
    }
    assert!(num_ended >= 30, "only {num_ended} of 40 ended within their tokens");
    assert_eq!(outputs(&run(&cases, 2, 500).0), outputs(&drawn));
}

#[test]
fn expressions_choices_and_rules_hold() {
    let choices = ["yes", "no", "maybe \"so\"\n", "日本"].map(str::to_owned);
    type Check = Box<dyn Fn(&str) -> bool>;
    let chosen = choices.to_vec();
    let grammars: Vec<(Grammar, Check)> = vec![
        (
            Grammar::Regex("[a-f]{3,5}-(12|34)+/x?".to_owned()),
            Box::new(|text| {
                let Some((letters, rest)) = text.split_once('-') else { return false };
                let (digits, end) = rest.split_at(rest.find('/').expect("a slash"));
                (3..=5).contains(&letters.len())
                    && letters.bytes().all(|b| (b'a'..=b'f').contains(&b))
                    && !digits.is_empty()
                    && digits.as_bytes().chunks(2).all(|pair| pair == b"12" || pair == b"34")
                    && ["/", "/x"].contains(&end)
            }),
        ),
        (
            Grammar::Choice(choices.to_vec()),
            Box::new(move |text| chosen.iter().any(|choice| choice == text)),
        ),
        (Grammar::Lark(TOOL_CALL_GRAMMAR.to_owned()), Box::new(is_tool_call)),
        (
            Grammar::Lark("start: \"a\" start \"b\" | \"ab\"".to_owned()),
            Box::new(|text| {
                let half = text.len() / 2;
                text == "a".repeat(half) + &"b".repeat(half) && half > 0
            }),
        ),
    ];
    for (grammar, check) in grammars {
        let cases: Vec<Case> = (0..10).map(|seed| Case::new(grammar.clone(), seed)).collect();
        let (drawn, _) = run(&cases, 2, 500);
        let texts: Vec<String> = drawn.iter().filter_map(text).collect();
        assert!(texts.len() >= 5, "{grammar:?}: {texts:?}");
        for text in &texts {
            assert!(check(text), "{text:?} under {grammar:?}");
        }
        assert!(texts.iter().any(|text| *text != texts[0]), "{grammar:?} always gives {texts:?}");
    }
}

#[test]
fn added_tokens_are_reached_by_name_only() {
    let spelled = Grammar::Regex("<tool_call>".to_owned());
    let named = Grammar::Lark("start: <tool_call> | <|im_end|> \"x\"".to_owned());
    let cases: Vec<Case> = (0..8).map(|seed| Case::new(spelled.clone(), seed)).collect();
    for (tokens, _) in run(&cases, 2, 500).0 {
        assert!(!tokens.contains(&TOOL_CALL), "{tokens:?}");
        assert_eq!(tokens.len(), 12, "eleven letters, none of them in a word, and the end");
    }
    let (drawn, _) = run(&[Case::new(named, 3)], 2, 500);
    assert!([TOOL_CALL, IM_END].contains(&drawn[0].0[0]), "{drawn:?}");
}

#[test]
fn preemption_and_moves_lose_no_state() {
    let short = |(_, case)| Case { max_tokens: 60, ..case };
    let mut cases: Vec<Case> = json_cases().into_iter().map(short).take(12).collect();
    let long = |seed| Case::new(Grammar::Regex("[xyz]{50}".to_owned()), seed);
    cases.extend((0..6).map(|seed| Case { max_tokens: 60, ..long(seed) }));
    let (undisturbed, _) = run(&cases, 2, 500);
    // A sequence begins with two blocks and ends with nine at most; one is the canary's.
    let (crowded, num_preemptions) = run(&cases, 2, 13);
    assert!(num_preemptions > 0);
    assert_eq!(outputs(&crowded), outputs(&undisturbed));
    for cut in [1, 2, 5, 13] {
        let moved = cases.iter().zip(&undisturbed).filter(|(_, (tokens, _))| tokens.len() > cut);
        let (moved, rest): (Vec<Case>, Vec<_>) = moved
            .map(|(case, (tokens, _))| {
                let output = tokens[..cut].to_vec();
                (Case { output, ..case.clone() }, tokens[cut..].to_vec())
            })
            .unzip();
        assert!(moved.len() > 3 || cut > 5);
        let drawn = run(&moved, 2, 500).0.into_iter().map(|(tokens, _)| tokens);
        assert_eq!(drawn.collect::<Vec<_>>(), rest, "cut after {cut}");
    }
}

fn grammar_error(events: &Receiver<Event>) -> GrammarError {
    match events.try_iter().last() {
        Some(Event::Failed { error: SequenceError::Grammar(error) }) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bad_grammar_fails_its_own_sequence() {
    let mut bench = bench(config(2), 500);
    let good = Case::new(Grammar::Choice(vec!["fine".to_owned()]), 1).submit(&bench);
    let invalid = [
        Grammar::Regex("(".to_owned()),
        Grammar::Lark("start: <nosuch>".to_owned()),
        Grammar::Lark("st art".to_owned()),
        Grammar::JsonSchema("{".to_owned()),
        Grammar::JsonSchema(r#"{"type": "nonsense"}"#.to_owned()),
        Grammar::JsonSchema(r#"{"type": "integer", "minimum": 5, "maximum": 3}"#.to_owned()),
        Grammar::JsonSchema(r#"{"$ref": "http://example.com/schema"}"#.to_owned()),
    ];
    // Twice: a refusal is remembered like a grammar.
    for _ in 0..2 {
        let invalid: Vec<_> =
            invalid.iter().map(|grammar| Case::new(grammar.clone(), 2).submit(&bench)).collect();
        bench.settle_with_grammars();
        for events in &invalid {
            let error = grammar_error(events);
            assert!(matches!(&error, GrammarError::Invalid { reason } if !reason.is_empty()));
        }
    }
    assert_eq!(bench.handle.load().grammars.num_compiled, 1 + invalid.len() as u64);
    let case = Case::new(Grammar::Regex("[a-c]+".to_owned()), 3);
    let forced = Case { output: vec![97, 120], ..case.clone() }.submit(&bench);
    let endless = case.submit_with(&bench, |sampling| sampling.ignore_eos = true);
    // Where the grammar ends, `min_tokens` does not matter.
    let short = Case::new(Grammar::Choice(vec!["q".to_owned()]), 4);
    let short = short.submit_with(&bench, |sampling| sampling.min_tokens = 9);
    bench.settle_with_grammars();
    assert!(matches!(grammar_error(&forced), GrammarError::ForcedOutput { index: 1, .. }));
    assert_eq!(grammar_error(&endless), GrammarError::IgnoreEos);
    for (events, expected) in [(good, "fine"), (short, "q")] {
        let (tokens, last) = tokens(&events, 0);
        assert_eq!(text(&(tokens, last.expect("an event"))).as_deref(), Some(expected));
    }
    bench.assert_empty();
}

#[test]
fn costly_grammars_are_bounded_and_the_engine_goes_on() {
    let nested = "(".repeat(5_000) + "a" + &")".repeat(5_000);
    let lists = "[".repeat(5_000) + &"]".repeat(5_000);
    let costly = [
        Grammar::Regex("((a{1000}){1000}){1000}".to_owned()),
        Grammar::Regex("(.|\n)*a(.|\n){5000}b".to_owned()),
        Grammar::Regex("a|".repeat(100_000)),
        Grammar::Regex(nested.clone()),
        Grammar::Lark(format!("start: {nested}")),
        Grammar::Lark("start: a\na: a a | \"x\" | \"\"".to_owned()),
        Grammar::Lark("start: b{1000}\nb: a{1000}\na: \"x\" | \"y\"".to_owned()),
        Grammar::JsonSchema(format!(r#"{{"const": {lists}}}"#)),
        Grammar::JsonSchema(r#"{"type": "array", "minItems": 1000000, "items": {}}"#.to_owned()),
    ];
    let mut bench = bench(config(2), 500);
    let costly: Vec<_> =
        costly.iter().map(|grammar| Case::new(grammar.clone(), 5).submit(&bench)).collect();
    let good = Case::new(Grammar::Choice(vec!["fine".to_owned()]), 1).submit(&bench);
    bench.settle_with_grammars();
    for events in &costly {
        let last = events.try_iter().last();
        let grammar = matches!(&last, Some(Event::Failed { error: SequenceError::Grammar(_) }));
        assert!(grammar || matches!(last, Some(Event::Finished { .. })), "{last:?}");
    }
    assert_eq!(tokens(&good, 0).0.len(), 5);
    bench.assert_empty();
}

#[test]
fn without_a_vocabulary_grammars_are_refused() {
    let mut bench = bench(EngineConfig { grammar_vocabulary: None, ..config(2) }, 500);
    let events = Case::new(Grammar::Choice(vec!["a".to_owned()]), 1).submit(&bench);
    bench.settle();
    assert_eq!(grammar_error(&events), GrammarError::Unavailable);
}

#[test]
fn a_sequence_that_leaves_while_its_grammar_compiles_leaves_nothing() {
    let mut bench = bench(config(2), 500);
    let (id, events) = {
        let mut submission = submission(prompt(1, &[]), 20);
        let grammar = Grammar::Regex("[a-z]+".to_owned());
        Arc::make_mut(&mut submission.sampling).grammar = Some(grammar);
        bench.submit(submission)
    };
    bench.engine.turn();
    bench.handle.abort(id, FinishReason::Cancelled).expect("an empty inbox");
    bench.settle_with_grammars();
    let (_, last) = tokens(&events, 0);
    assert!(matches!(last, Some(Event::Finished { reason: FinishReason::Cancelled, .. })));
    bench.assert_empty();
}
