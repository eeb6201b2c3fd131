//! The text of one choice: token ids in, whole characters out, ending at a stop string.

use std::collections::VecDeque;

use tessera_processor::{Detokenizer, StopMatcher, StopProgress};
use tessera_types::{SamplingParams, TokenId};

use crate::events::OutputToken;

/// Turns the tokens of one choice into what a client sees.
pub(super) struct ChoiceText {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Tokens that are not certain to be part of the reply yet.
    undecided: VecDeque<OutputToken>,
    keeps_tokens: bool,
    num_tokens: u32,
}

/// What became certain.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Spoken {
    pub(super) text: String,
    /// Only if tokens are kept.
    pub(super) tokens: Vec<OutputToken>,
    /// Index of the stop string that ended the text.
    pub(super) matched: Option<usize>,
}

impl ChoiceText {
    pub(super) fn new(detokenizer: Detokenizer, stop: StopMatcher, keeps_tokens: bool) -> Self {
        Self { detokenizer, stop, undecided: VecDeque::new(), keeps_tokens, num_tokens: 0 }
    }

    /// Takes the next token. One that ends the choice has no text.
    pub(super) fn push(&mut self, token: OutputToken, is_silent: bool) -> Spoken {
        let text = match is_silent {
            true => String::new(),
            false => self.detokenizer.push(token.id),
        };
        if self.keeps_tokens {
            self.undecided.push_back(token);
        }
        let progress = self.stop.push(&text);
        self.take(progress)
    }

    /// The decoder ended the choice: what was held back is part of the reply after all.
    pub(super) fn finish(&mut self) -> Spoken {
        let text = self.detokenizer.finish();
        let progress = self.stop.finish(&text);
        self.take(progress)
    }

    /// Tokens that count.
    pub(super) fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    fn take(&mut self, progress: StopProgress) -> Spoken {
        let StopProgress { text, num_tokens, matched } = progress;
        self.num_tokens += num_tokens as u32;
        let certain = num_tokens.min(self.undecided.len());
        Spoken { text, tokens: self.undecided.drain(..certain).collect(), matched }
    }
}

/// Whether drawing `token` ends a choice, so that its text is not part of the reply.
pub(super) fn ends_choice(token: TokenId, sampling: &SamplingParams, eos: &[TokenId]) -> bool {
    sampling.stop_token_ids.contains(&token) || (!sampling.ignore_eos && eos.contains(&token))
}
