//! What the output of a sequence is constrained to.

use serde::{Deserialize, Serialize};

use crate::sampling::SamplingError;

/// Longest text of a grammar in bytes, all choices together.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// Most alternatives of a [`Grammar::Choice`].
pub const MAX_GRAMMAR_CHOICES: usize = 1024;

/// A language that the output, up to the end-of-sequence token, must belong to. The text is checked where
/// it is compiled, on the leader.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Grammar {
    /// A JSON value valid under this JSON schema.
    JsonSchema(String),
    /// A match of this regular expression, from start to end.
    Regex(String),
    /// One of these strings.
    Choice(Vec<String>),
    /// A grammar in llguidance's dialect of Lark; special tokens may be named as `<|im_end|>`.
    Lark(String),
}

impl Grammar {
    /// Checks the bounds, not the text.
    ///
    /// # Errors
    /// Text beyond [`MAX_GRAMMAR_BYTES`], no choice or too many.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let field = "grammar";
        let bytes = match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(choices) => {
                let got = choices.len();
                if got > MAX_GRAMMAR_CHOICES {
                    return Err(SamplingError::TooMany { field, limit: MAX_GRAMMAR_CHOICES, got });
                }
                if got == 0 {
                    return Err(SamplingError::Empty { field });
                }
                choices.iter().map(String::len).sum()
            }
        };
        match bytes {
            0 => Err(SamplingError::Empty { field }),
            got if got > MAX_GRAMMAR_BYTES => {
                Err(SamplingError::TooLong { field, limit: MAX_GRAMMAR_BYTES, got })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked() {
        let long = "x".repeat(MAX_GRAMMAR_BYTES + 1);
        let refused = [
            Grammar::Regex(String::new()),
            Grammar::Lark(long),
            Grammar::Choice(Vec::new()),
            Grammar::Choice(vec!["a".to_owned(); MAX_GRAMMAR_CHOICES + 1]),
        ];
        for grammar in refused {
            assert!(grammar.validate().is_err(), "{grammar:?}");
        }
        assert_eq!(Grammar::Regex("a+".to_owned()).validate(), Ok(()));
    }
}
