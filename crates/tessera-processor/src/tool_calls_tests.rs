use proptest::prelude::*;

use super::*;

const TAGS: ToolTags = ToolTags { open: 1, close: 2 };

/// A reply whose tags are the characters ⟨ and ⟩: tokens and their texts.
fn tokens(reply: &str) -> Vec<(TokenId, String)> {
    let token = |c: char| match c {
        '⟨' => (TAGS.open, "<tool_call>".to_owned()),
        '⟩' => (TAGS.close, "</tool_call>".to_owned()),
        other => (9, other.to_string()),
    };
    reply.chars().map(token).collect()
}

/// What came of a reply.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    text: String,
    calls: Vec<(String, String)>,
    is_over: bool,
}

impl Seen {
    fn add(&mut self, events: Vec<ToolEvent>) {
        for event in events {
            match event {
                ToolEvent::Text(text) => {
                    assert!(self.calls.is_empty(), "text behind calls: {text:?}");
                    self.text += &text;
                }
                ToolEvent::Call { name } => self.calls.push((name, String::new())),
                ToolEvent::Arguments(more) => {
                    self.calls.last_mut().expect("a call comes first").1 += &more;
                }
            }
        }
    }
}

/// Notes tokens, and reads their text in pieces that end at these bytes or, if that is inside a character,
/// behind it; never ahead of the tokens.
fn run_cut(reply: &str, is_parallel: bool, cuts: &[usize]) -> Seen {
    let mut reader = ToolCallReader::new(TAGS, is_parallel);
    let (mut seen, mut out) = (Seen::default(), Vec::new());
    let (mut all, mut read) = (String::new(), 0);
    for (token, text) in tokens(reply) {
        reader.note(token, &text);
        all += &text;
        for end in read + 1..=all.len() {
            if cuts.contains(&end) && all.is_char_boundary(end) {
                reader.read(&all[read..end], &mut out);
                read = end;
            }
        }
    }
    reader.read(&all[read..], &mut out);
    reader.finish(&mut out);
    seen.add(out);
    seen.is_over = reader.is_over();
    assert_eq!(reader.num_calls(), seen.calls.len());
    seen
}

fn run(reply: &str) -> Seen {
    let every: Vec<usize> = (0..=20 * reply.len()).collect();
    run_cut(reply, true, &every)
}

fn calls(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(name, arguments)| (name.to_string(), arguments.to_string())).collect()
}

#[test]
fn calls_are_read_with_the_text_before_them() {
    let seen = run(
        "Let me see.\n⟨\n{\"name\": \"f\", \"arguments\": {\"a\": [1, {\"b\": \"}\\\"\"}]}}\n⟩\n\
                    ⟨\n{\"name\": \"g\", \"arguments\": {}}\n⟩",
    );
    assert_eq!(seen.text, "Let me see.");
    assert_eq!(seen.calls, calls(&[("f", r#"{"a": [1, {"b": "}\""}]}"#), ("g", "{}")]));
    assert!(!seen.is_over);
}

#[test]
fn arguments_are_given_out_as_they_come() {
    let mut reader = ToolCallReader::new(TAGS, true);
    let mut read = |token, text: &str| {
        let mut out = Vec::new();
        reader.note(token, text);
        reader.read(text, &mut out);
        out
    };
    assert_eq!(read(TAGS.open, "<tool_call>"), []);
    assert_eq!(read(9, "\n{\"name\": \"f"), []);
    assert_eq!(read(9, "\", \"arguments\": "), []);
    let begun = [ToolEvent::Call { name: "f".into() }, ToolEvent::Arguments("{\"a\"".into())];
    assert_eq!(read(9, "{\"a\""), begun);
    assert_eq!(read(9, ": 1}}\n"), [ToolEvent::Arguments(": 1}".into())]);
    assert_eq!(read(TAGS.close, "</tool_call>"), []);
}

#[test]
fn other_forms_of_a_call_are_read_when_complete() {
    for (reply, arguments) in [
        ("⟨{\"arguments\": {\"a\": 1}, \"name\": \"f\"}⟩", "{\"a\": 1}"),
        ("⟨{\"name\": \"f\"}⟩", "{}"),
        ("⟨{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}⟩", "{\"a\": 1}"),
        ("⟨{\"name\": \"f\", \"id\": 3, \"arguments\": {}}⟩", "{}"),
        // The closing tag is missing.
        ("⟨{\"name\": \"f\", \"arguments\": {}}", "{}"),
        ("⟨{\"name\": \"f\"}", "{}"),
    ] {
        assert_eq!(run(reply).calls, calls(&[("f", arguments)]), "{reply}");
    }
    let long = "x".repeat(2 * MAX_HEAD_BYTES);
    let reply = format!("⟨{{\"name\": \"{long}\", \"arguments\": {{}}}}⟩");
    assert_eq!(run(&reply).calls, calls(&[(&long, "{}")]));
    let forgotten = run("⟨{\"name\": \"f\"}\n⟨{\"name\": \"g\", \"arguments\": {}}⟩");
    assert_eq!(forgotten.calls, calls(&[("f", "{}"), ("g", "{}")]));
}

#[test]
fn what_is_no_call_is_text() {
    for reply in [
        "plain",
        "ends in space \n",
        "a ⟨\nno json\n⟩ b",
        "⟨[1]⟩",
        "⟨{\"name\": 3, \"arguments\": {}}⟩",
        "⟨{\"name\": \"\", \"arguments\": {}}⟩",
        "⟨{\"name\": \"f\", \"arguments\": 3}⟩",
        "⟨{\"name\": \"f\", \"arg",
        "⟨",
        "⟩ alone",
        "",
    ] {
        let seen = run(reply);
        let text: String = tokens(reply).into_iter().map(|(_, text)| text).collect();
        assert_eq!((seen.text.as_str(), seen.calls.len()), (text.as_str(), 0), "{reply}");
    }
    // The same letters in other tokens are no tag.
    let spelled = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    assert_eq!(run(spelled).text, spelled);
}

#[test]
fn a_cut_call_keeps_what_was_written() {
    let seen = run("⟨{\"name\": \"f\", \"arguments\": {\"a\": \"b");
    assert_eq!(seen.calls, calls(&[("f", "{\"a\": \"b")]));
    // Arguments that never close end with the tag.
    let seen = run("⟨{\"name\": \"f\", \"arguments\": {\"a\": [}\n⟩\n⟨{\"name\": \"g\"}⟩");
    assert_eq!(seen.calls.len(), 2);
}

/// As when a stop string ends inside a tag: the tag is incomplete for good.
#[test]
fn a_tag_that_stays_incomplete_is_text() {
    let mut reader = ToolCallReader::new(TAGS, true);
    let (mut out, mut seen) = (Vec::new(), Seen::default());
    reader.note(9, "a ");
    reader.note(TAGS.open, "<tool_call>");
    reader.read("a <tool", &mut out);
    reader.finish(&mut out);
    seen.add(out);
    assert_eq!(seen.text, "a <tool");
}

#[test]
fn the_reply_ends_with_its_calls() {
    let call = "⟨{\"name\": \"f\", \"arguments\": {}}⟩";
    let seen = run(&format!("{call}\n and on"));
    assert!(seen.is_over && seen.text.is_empty(), "{seen:?}");
    let all: Vec<usize> = (0..200).collect();
    let single = run_cut(&format!("{call}\n{call}"), false, &all);
    assert!(single.is_over, "{single:?}");
    assert_eq!(single.calls.len(), 1);
    assert!(!run(&format!("{call}\n")).is_over);
}

#[test]
fn an_unfinished_character_before_a_tag_moves_nothing() {
    let mut reader = ToolCallReader::new(TAGS, true);
    reader.note(9, "a");
    reader.note(9, "");
    reader.note(TAGS.open, "\u{fffd}<tool_call>");
    reader.note(9, "{\"name\": \"f\", \"arguments\": {}}");
    let mut out = Vec::new();
    reader.read("a\u{fffd}<tool_call>{\"name\": \"f\", \"arguments\": {}}", &mut out);
    let mut seen = Seen::default();
    seen.add(out);
    assert_eq!(seen.text, "a\u{fffd}");
    assert_eq!(seen.calls, calls(&[("f", "{}")]));
}

proptest! {
    #[test]
    fn the_result_does_not_depend_on_the_cuts(
        parts in proptest::collection::vec(prop_oneof![
            Just("⟨"), Just("⟩"), Just("\n"), Just(" "), Just("text"), Just("é"),
            Just("{\"name\": \"f\", \"arguments\": {\"a\": \"{\"}}"), Just("{\"name\": "), Just("\"f\""),
            Just(", \"arguments\": "), Just("{"), Just("}"), Just("\\"), Just("\""),
        ], 0..14),
        cuts in proptest::collection::vec(0usize..300, 0..40),
        is_parallel: bool,
    ) {
        let reply = parts.concat();
        let whole = run_cut(&reply, is_parallel, &[]);
        prop_assert_eq!(run_cut(&reply, is_parallel, &cuts), whole);
    }
}
