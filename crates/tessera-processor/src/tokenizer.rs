//! Byte-level BPE of the checkpoint's `tokenizer.json`, with the added tokens kept apart: plain text
//! never yields one, so that only the template and media parts can (ENGINE §10).

use std::collections::HashMap;
use std::path::Path;

use tessera_types::TokenId;
use tokenizers::{AddedVocabulary, DecoderWrapper, ModelWrapper};

use crate::error::{CheckpointError, ProcessorError};

/// A token beside the BPE vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    pub id: TokenId,
    pub content: String,
    /// Special tokens leave no text when decoded; other added tokens (`<tool_call>`) do.
    pub special: bool,
}

/// Encodes text and knows the bytes of every token.
pub struct Tokenizer {
    /// Without added tokens.
    bpe: tokenizers::Tokenizer,
    /// Longest first, so that the first match is the longest.
    added: Vec<AddedToken>,
    /// Characters that begin an added token.
    first_chars: Vec<char>,
    /// Bytes of all tokens, one after another; token `i` ends at `ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// A file that is not byte-level BPE or whose added tokens want surrounding text stripped.
    pub fn load(file: &Path) -> Result<Self, CheckpointError> {
        let bytes = crate::checkpoint_file::read_bytes(file)?;
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            CheckpointError::Tokenizer { file: file.to_owned(), source }
        };
        let mut bpe = tokenizers::Tokenizer::from_bytes(&bytes).map_err(failed)?;
        if !matches!(bpe.get_model(), ModelWrapper::BPE(_))
            || !matches!(bpe.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
        {
            return Err(failed("model and decoder must be byte-level BPE".into()));
        }
        let mut added = Vec::new();
        for (id, token) in bpe.get_added_tokens_decoder() {
            if token.content.is_empty() || token.lstrip || token.rstrip || token.single_word {
                let content = token.content;
                return Err(failed(format!("added token {content:?} is not plain").into()));
            }
            added.push(AddedToken { id, content: token.content, special: token.special });
        }
        added.sort_by(|a, b| b.content.len().cmp(&a.content.len()).then(a.id.cmp(&b.id)));
        let mut first_chars: Vec<char> =
            added.iter().filter_map(|token| token.content.chars().next()).collect();
        first_chars.sort_unstable();
        first_chars.dedup();
        bpe.with_padding(None);
        bpe.with_truncation(None).map_err(failed)?;
        bpe.with_added_vocabulary(AddedVocabulary::new());
        let (bytes, ends, special) = token_table(&bpe.get_vocab(false), &added);
        Ok(Self { bpe, added, first_chars, bytes, ends, special })
    }

    /// Number of ids with a token; ids from here on are padding rows.
    pub fn num_tokens(&self) -> u32 {
        self.ends.len() as u32
    }

    /// Tokens beside the BPE vocabulary, longest first.
    pub fn added_tokens(&self) -> &[AddedToken] {
        &self.added
    }

    /// The id of an added token by its text.
    pub fn added_token_id(&self, content: &str) -> Option<TokenId> {
        self.added.iter().find(|token| token.content == content).map(|token| token.id)
    }

    /// Encodes text in which nothing is special, whatever it spells. Appends to `out`.
    pub fn encode_plain(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), ProcessorError> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding = self
            .bpe
            .encode_fast(text, false)
            .map_err(|source| ProcessorError::Tokenize { source })?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// Finds the leftmost added token in `text`, the longest where several start: its byte range and id.
    pub fn find_added(&self, text: &str) -> Option<(std::ops::Range<usize>, TokenId)> {
        text.match_indices(&self.first_chars[..]).find_map(|(at, _)| {
            let token = self.added.iter().find(|token| text[at..].starts_with(&token.content))?;
            Some((at..at + token.content.len(), token.id))
        })
    }

    /// Characters that begin an added token.
    pub(crate) fn first_chars(&self) -> &[char] {
        &self.first_chars
    }

    /// Bytes of a token's text, those of special tokens included; empty for ids without a token.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// A token's text, with U+FFFD for bytes that are no character of their own.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Whether the token leaves no text in a reply.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Text of a finished sequence of tokens, without special tokens.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let visible = ids.iter().filter(|&&id| !self.is_special(id));
        let bytes: Vec<u8> = visible.flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Lays the bytes of all tokens out by id; ids without a token are empty.
fn token_table(
    vocabulary: &HashMap<String, TokenId>,
    added: &[AddedToken],
) -> (Vec<u8>, Vec<u32>, Vec<bool>) {
    let ids = vocabulary.values().copied().chain(added.iter().map(|token| token.id));
    let count = ids.max().map_or(0, |last| last as usize + 1);
    let byte_of: HashMap<char, u8> = (0..=255u8).map(|byte| (char_of_byte(byte), byte)).collect();
    let mut texts: Vec<Vec<u8>> = vec![Vec::new(); count];
    let mut special = vec![false; count];
    let added = added.iter().map(|token| (&token.content, token.id, token.special));
    let base = vocabulary.iter().map(|(text, &id)| (text, id, false));
    for (text, id, is_special) in base.chain(added) {
        // Like the byte-level decoder: a token with any other character stands for its own UTF-8.
        let bytes: Option<Vec<u8>> = text.chars().map(|c| byte_of.get(&c).copied()).collect();
        texts[id as usize] = bytes.unwrap_or_else(|| text.as_bytes().to_vec());
        special[id as usize] = is_special;
    }
    let mut ends = Vec::with_capacity(count);
    let mut bytes = Vec::new();
    for text in texts {
        bytes.extend(text);
        ends.push(bytes.len() as u32);
    }
    (bytes, ends, special)
}

/// The printable character that byte-level vocabularies write for a byte (GPT-2, `bytes_to_unicode`):
/// itself where it is printable Latin-1, else the next free one from U+0100.
fn char_of_byte(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let index = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + index).expect("68 characters from U+0100 are all letters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_characters_are_the_published_ones() {
        let cases =
            [(b'A', 'A'), (b' ', 'Ġ'), (b'\n', 'Ċ'), (b'\t', 'ĉ'), (0x7f, 'ġ'), (0xad, 'Ń')];
        for (byte, expected) in cases {
            assert_eq!(char_of_byte(byte), expected, "byte {byte:#x}");
        }
        let distinct: std::collections::HashSet<char> = (0..=255).map(char_of_byte).collect();
        assert_eq!(distinct.len(), 256);
    }
}
