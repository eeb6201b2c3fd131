//! Token ids to text, one at a time. What has been given out never changes, a character is given out
//! only when all its bytes are there, and the pieces joined equal the text decoded at once.

use std::sync::Arc;

use tessera_types::TokenId;

use crate::tokenizer::Tokenizer;

/// Text of one choice as its tokens arrive. A token costs time in its own length only.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Bytes that may begin a character, at most three between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, pending: Vec::new() }
    }

    /// Text that `token` completes: empty for special tokens, padding ids and parts of characters.
    /// Bytes that can no longer become a character are given out as U+FFFD.
    pub fn push(&mut self, token: TokenId) -> String {
        if !self.tokenizer.is_special(token) {
            self.pending.extend_from_slice(self.tokenizer.token_bytes(token));
        }
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            rest = &rest[chunk.valid().len()..];
            let invalid = chunk.invalid();
            // Only the very end may still become a character; a hopeless end may not.
            if invalid.is_empty() || (invalid.len() == rest.len() && may_continue(invalid)) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[invalid.len()..];
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
        text
    }

    /// Text of what is left at the end: U+FFFD for an unfinished character, else nothing.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether more bytes could make the (invalid) end of a text a character.
fn may_continue(end: &[u8]) -> bool {
    std::str::from_utf8(end).is_err_and(|error| error.error_len().is_none())
}
