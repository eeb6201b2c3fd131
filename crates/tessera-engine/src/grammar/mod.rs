//! Structured output: the tokens that a sequence's grammar allows next, through the crate `llguidance`.
//!
//! Only the leader's process knows grammars. [`GrammarCompiler`] compiles their text on a thread of its own,
//! off the engine thread; the sequence is queued and held until its grammar is ready. Each sequence has a
//! [`Constraint`], which is advanced by every collected token. Its mask for step n + 1 is computed after step
//! n was collected and before step n + 1 is sampled, while the ranks compute that step's first half.
//!
//! Invariants
//! - A mask is a function of the grammar and the tokens drawn so far, so it does not depend on depth, batch
//!   or preemption, and a moved sequence comes back to it by replaying its forced output.
//! - A mask always allows a token. Once the grammar is complete it allows the end-of-sequence tokens only.
//! - The mask goes before all other edits and filters, so these choose among allowed tokens. `min_tokens` has
//!   no effect beside a grammar, which alone decides where the output may end; `ignore_eos` is refused.
//! - A grammar that is invalid, or too costly for [`limits`], fails its own sequence.
//!
//! # Lark
//!
//! [`tessera_types::Grammar::Lark`] is llguidance's dialect:
//!
//! ```text
//! start: <tool_call> "\n" call "\n" </tool_call>
//! call: %json {
//!     "type": "object",
//!     "properties": { "name": { "const": "add" }, "arguments": { "type": "object" } },
//!     "required": ["name", "arguments"],
//!     "additionalProperties": false,
//!     "x-guidance": { "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " }
//! }
//! ```
//!
//! - Rules are lower case, terminals (regular, no recursion) upper case; `start` is where it begins.
//! - An added token of the tokenizer is written as it reads, without quotes: `<tool_call>`, `<|im_end|>`. It may
//!   stand in rules only, not in terminals. Inside quotes the same characters are ordinary text, spelled by
//!   ordinary tokens. Strings and regular expressions never yield an added token.
//! - `%json {…}` is a JSON schema in place; it stands in rules. Between its parts white space is free unless
//!   `x-guidance` says otherwise; before the first and after the last character there is none. (In
//!   [`tessera_types::Grammar::JsonSchema`] it is bounded to 32 characters in one place.)
//! - `TEXT: /(.|\n)*/` is any text, without added tokens.
//! - The end-of-sequence token is not written: it is allowed wherever the start rule is complete.

mod bounds;
mod compiler;
mod constraint;
mod vocabulary;

pub use compiler::{Compiled, Finished, GrammarCompiler, Outcome, limits};
pub use constraint::Constraint;
pub use vocabulary::{EncodeText, GrammarVocabulary};

/// Why a sequence cannot follow its grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The engine was made without a vocabulary, or the checkpoint names no end-of-sequence token.
    #[error("this group serves no grammars")]
    Unavailable,
    /// The text is not a grammar, or one beyond the limits.
    #[error("the grammar cannot be compiled: {reason}")]
    Invalid { reason: String },
    #[error("ignore_eos contradicts a grammar, which decides where the output ends")]
    IgnoreEos,
    /// Output of an earlier attempt does not belong to the language.
    #[error("output token {index} of the earlier attempt does not belong to the grammar: {reason}")]
    ForcedOutput { index: usize, reason: String },
    /// The state became too costly, or allows nothing.
    #[error("the grammar cannot be followed any further: {reason}")]
    Stuck { reason: String },
    /// As many grammars as may wait are waiting; the same request may succeed later.
    #[error("too many grammars are waiting to be compiled")]
    Busy,
}

/// Longest reason kept of a library's message, in characters.
const MAX_REASON_CHARS: usize = 500;

/// The library's message without its dumps of state and grammar, which follow on lines of their own.
fn reason(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    let head = text.split("\n<").next().unwrap_or_default().trim();
    head.chars().take(MAX_REASON_CHARS).collect()
}
