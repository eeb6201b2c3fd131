//! How far one sequence is in its grammar.

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;
use tessera_types::{TokenId, TokenMask};

use super::{Compiled, GrammarError, reason};

/// The state of one sequence: a matcher that has seen all its output.
pub struct Constraint {
    matcher: Matcher,
}

impl Constraint {
    /// The state after `output`, which exists already.
    ///
    /// # Errors
    /// [`GrammarError::ForcedOutput`]: it is not the beginning of anything in the language.
    pub fn new(compiled: &Compiled, output: &[TokenId]) -> Result<Self, GrammarError> {
        let mut constraint = Self { matcher: compiled.start() };
        for (index, &token) in output.iter().enumerate() {
            constraint.accept(token).map_err(|error| match error {
                GrammarError::Stuck { reason } => GrammarError::ForcedOutput { index, reason },
                error => error,
            })?;
        }
        Ok(constraint)
    }

    /// Takes the next token of the output.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`]: the mask did not allow it, or the state is beyond the limits.
    pub fn accept(&mut self, token: TokenId) -> Result<(), GrammarError> {
        // Only an end-of-sequence token can follow, and nothing follows that.
        if self.is_complete() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(stuck)
    }

    /// Whether nothing but the end of the sequence can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    /// The tokens that may follow.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`]: none may, or finding them is beyond the limits.
    pub fn mask(&mut self) -> Result<TokenMask, GrammarError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(stuck)?;
        let mask = words(&allowed);
        if mask.words.iter().all(|&word| word == 0) {
            return Err(GrammarError::Stuck { reason: "no token may follow".to_owned() });
        }
        Ok(mask)
    }
}

fn stuck(error: impl std::fmt::Display) -> GrammarError {
    GrammarError::Stuck { reason: reason(error) }
}

/// The library's 32-bit words in pairs, without bits beyond the vocabulary.
fn words(allowed: &SimpleVob) -> TokenMask {
    let pairs = allowed.as_slice().chunks(2);
    let mut words: Vec<u64> = pairs
        .map(|pair| u64::from(pair[0]) | u64::from(pair.get(1).copied().unwrap_or(0)) << 32)
        .collect();
    words.truncate(allowed.len().div_ceil(64));
    let used = allowed.len() % 64;
    if let Some(last) = words.last_mut().filter(|_| used > 0) {
        *last &= (1 << used) - 1;
    }
    TokenMask { words: words.into() }
}
