//! The tokenizer as grammars see it.

use std::fmt;
use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use tessera_processor::Tokenizer;
use tessera_types::TokenId;

/// Tokens of plain text in which nothing is special.
pub type EncodeText = Arc<dyn Fn(&str) -> Vec<TokenId> + Send + Sync>;

/// Bytes of every token and which of them are not text.
#[derive(Clone)]
pub struct GrammarVocabulary {
    /// Bytes by id, as many as there are real tokens; an empty one is no token and never allowed.
    pub tokens: Vec<Vec<u8>>,
    /// Tokens beside the text vocabulary: a grammar reaches them by name only.
    pub added: Vec<TokenId>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
    /// How the model's tokenizer spells text: what a grammar forces is spelled the same way.
    pub encode: EncodeText,
}

impl GrammarVocabulary {
    /// The checkpoint's tokenizer. All its added tokens count as such, special or not (`<tool_call>`).
    pub fn of(tokenizer: Tokenizer, eos_token_ids: Vec<TokenId>) -> Self {
        let ids = 0..tokenizer.num_tokens();
        let tokens = ids.map(|id| tokenizer.token_bytes(id).to_vec()).collect();
        let added = tokenizer.added_tokens().iter().map(|token| token.id).collect();
        let encode = move |text: &str| {
            let mut tokens = Vec::new();
            // Byte-level BPE knows every byte, so it has no text that it cannot spell.
            match tokenizer.encode_plain(text, &mut tokens) {
                Ok(()) => tokens,
                Err(_) => Vec::new(),
            }
        };
        Self { tokens, added, eos_token_ids, encode: Arc::new(encode) }
    }
}

impl fmt::Debug for GrammarVocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarVocabulary")
            .field("tokens", &self.tokens.len())
            .field("added", &self.added.len())
            .field("eos_token_ids", &self.eos_token_ids)
            .finish_non_exhaustive()
    }
}

/// The trie over the vocabulary, with the tokenizer beside it.
struct Environment {
    trie: TokTrie,
    encode: EncodeText,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| (self.encode)(text))
    }
}

impl GrammarVocabulary {
    /// The library's view of it; `None` without an end-of-sequence token, as no output could end.
    pub(super) fn into_environment(self) -> Option<TokEnv> {
        let mut words = self.tokens;
        let is_real = |token: &&TokenId| (**token as usize) < words.len();
        let eos: Vec<TokenId> = self.eos_token_ids.iter().filter(is_real).copied().collect();
        let first = *eos.first()?;
        for token in self.added {
            if let Some(word) = words.get_mut(token as usize) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let info = TokRxInfo::new(words.len() as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos);
        Some(Arc::new(Environment { trie, encode: self.encode }))
    }
}
