//! Tells text that a client wrote from text that the template wrote, through any template.
//!
//! Before rendering, each character that can begin an added token is replaced, in client text only, by a
//! private-use character found in neither the client's texts nor the template. After rendering, an added
//! token spelled with its real first character can only be the template's; the stand-ins are then turned
//! back. A client cannot forge this, not even by spreading a token over adjacent strings, and templates
//! that trim, test or slice their input see text of the same length and shape. (Markers around each
//! string would break those.)

use std::collections::HashSet;

use serde_json::Value;

use crate::error::ProcessorError;

/// Supplementary private use areas A and B.
const PRIVATE_USE: [std::ops::RangeInclusive<char>; 2] =
    ['\u{f0000}'..='\u{ffffd}', '\u{100000}'..='\u{10fffd}'];
/// Least first byte of a private-use character of these areas in UTF-8.
const PRIVATE_USE_LEAD: u8 = 0xf3;

/// One private-use character for each guarded one. None when no client text holds a guarded character.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct StandIns {
    pairs: Vec<(char, char)>,
}

impl StandIns {
    /// Chooses stand-ins for `guarded` that occur in none of `texts`.
    pub fn choose<'t>(
        guarded: &[char],
        client: impl Iterator<Item = &'t str> + Clone,
        template: &'t str,
    ) -> Result<Self, ProcessorError> {
        if !client.clone().any(|text| text.contains(guarded)) {
            return Ok(Self::default());
        }
        let taken: HashSet<char> = client
            .chain([template])
            .filter(|text| text.bytes().any(|byte| byte >= PRIVATE_USE_LEAD))
            .flat_map(str::chars)
            .filter(|c| PRIVATE_USE.iter().any(|range| range.contains(c)))
            .collect();
        let free = PRIVATE_USE.into_iter().flatten().filter(|c| !taken.contains(c));
        let pairs: Vec<(char, char)> = guarded.iter().copied().zip(free).collect();
        match pairs.len() == guarded.len() {
            true => Ok(Self { pairs }),
            false => Err(ProcessorError::PrivateUseExhausted),
        }
    }

    /// Client text as the template may see it.
    pub fn hide(&self, text: &str) -> String {
        self.swap(text, |&(real, stand_in)| (real, stand_in))
    }

    /// Rendered text with the client's own characters back in place.
    pub fn reveal(&self, text: &str) -> String {
        self.swap(text, |&(real, stand_in)| (stand_in, real))
    }

    /// A JSON value with all its strings and keys hidden.
    pub fn hide_json(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.hide(text)),
            Value::Array(items) => items.iter().map(|item| self.hide_json(item)).collect(),
            Value::Object(fields) => Value::Object(
                fields.iter().map(|(key, item)| (self.hide(key), self.hide_json(item))).collect(),
            ),
            other => other.clone(),
        }
    }

    fn swap(&self, text: &str, pair: impl Fn(&(char, char)) -> (char, char)) -> String {
        if self.pairs.is_empty() {
            return text.to_owned();
        }
        text.chars()
            .map(|c| {
                let found = self.pairs.iter().map(&pair).find(|&(from, _)| from == c);
                found.map_or(c, |(_, to)| to)
            })
            .collect()
    }
}

/// All strings and keys of a JSON value, in order.
pub(crate) fn strings_of(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(items) => items.iter().flat_map(strings_of).collect(),
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(key, item)| std::iter::once(key.as_str()).chain(strings_of(item)))
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_without_guarded_characters_costs_nothing() {
        let stand_ins = StandIns::choose(&['<'], ["plain"].into_iter(), "<|im_start|>");
        assert_eq!(stand_ins.expect("a choice"), StandIns::default());
    }

    #[test]
    fn a_client_cannot_name_the_stand_in() {
        let forged = "<\u{f0000}\u{f0001}";
        let stand_ins =
            StandIns::choose(&['<', '['], [forged].into_iter(), "\u{f0002}").expect("a choice");
        assert_eq!(stand_ins.pairs, [('<', '\u{f0003}'), ('[', '\u{f0004}')]);
        assert_eq!(stand_ins.hide("a<b"), "a\u{f0003}b");
        for text in [forged, "<<[x]", ""] {
            assert_eq!(stand_ins.reveal(&stand_ins.hide(text)), text);
        }
    }

    #[test]
    fn a_text_of_every_private_character_is_refused() {
        let all: String = PRIVATE_USE.into_iter().flatten().chain(['<']).collect();
        let refused = StandIns::choose(&['<'], [all.as_str()].into_iter(), "");
        assert!(matches!(refused, Err(ProcessorError::PrivateUseExhausted)));
    }

    #[test]
    fn json_is_hidden_in_keys_and_values() {
        let value = serde_json::json!({"<k": ["<a", 1, {"b": "<"}], "n": null});
        assert_eq!(strings_of(&value), ["<k", "<a", "b", "<", "n"]);
        let stand_ins =
            StandIns::choose(&['<'], strings_of(&value).into_iter(), "").expect("a choice");
        let hidden = stand_ins.hide_json(&value).to_string();
        assert!(!hidden.contains('<'));
        let revealed: Value = serde_json::from_str(&stand_ins.reveal(&hidden)).expect("JSON again");
        assert_eq!(revealed, value);
    }
}
