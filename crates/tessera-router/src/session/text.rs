//! The text of one choice: token ids in, whole characters and tool calls out, ending at a stop string or
//! with the calls.

use std::collections::VecDeque;

use tessera_processor::{Detokenizer, StopMatcher, StopProgress, ToolCallReader, ToolEvent};
use tessera_types::{SamplingParams, TokenId};

use crate::events::{OutputToken, ToolCallDelta, ToolCallStart, push_call};

/// Turns the tokens of one choice into what a client sees.
pub(super) struct ChoiceText {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// None if the reply may hold no tool calls.
    tools: Option<ToolCallReader>,
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
    pub(super) tool_calls: Vec<ToolCallDelta>,
    /// The choice has ended with its tool calls.
    pub(super) calls_are_over: bool,
    /// Index of the stop string that ended the text.
    pub(super) matched: Option<usize>,
}

impl ChoiceText {
    pub(super) fn new(
        detokenizer: Detokenizer,
        stop: StopMatcher,
        tools: Option<ToolCallReader>,
        keeps_tokens: bool,
    ) -> Self {
        Self { detokenizer, stop, tools, undecided: VecDeque::new(), keeps_tokens, num_tokens: 0 }
    }

    /// Takes the next token. One that ends the choice has no text.
    pub(super) fn push(&mut self, token: OutputToken, is_silent: bool) -> Spoken {
        let mut text = String::new();
        if !is_silent {
            text = self.detokenizer.push(token.id);
            if let Some(tools) = &mut self.tools {
                tools.note(token.id, &text);
            }
        }
        if self.keeps_tokens {
            self.undecided.push_back(token);
        }
        let progress = self.stop.push(&text);
        let is_end = progress.matched.is_some();
        self.take(progress, is_end)
    }

    /// The decoder ended the choice: what was held back is part of the reply after all.
    pub(super) fn finish(&mut self) -> Spoken {
        let text = self.detokenizer.finish();
        let progress = self.stop.finish(&text);
        self.take(progress, true)
    }

    /// Tokens that count.
    pub(super) fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    /// Whether the choice calls a tool.
    pub(super) fn has_calls(&self) -> bool {
        self.tools.as_ref().is_some_and(|tools| tools.num_calls() > 0)
    }

    fn take(&mut self, progress: StopProgress, is_end: bool) -> Spoken {
        let StopProgress { text, num_tokens, matched } = progress;
        self.num_tokens += num_tokens as u32;
        let certain = num_tokens.min(self.undecided.len());
        let tokens = self.undecided.drain(..certain).collect();
        let mut spoken = Spoken { tokens, matched, ..Spoken::default() };
        let Some(tools) = &mut self.tools else {
            return Spoken { text, ..spoken };
        };
        let mut num_calls = tools.num_calls() as u32;
        let mut events = Vec::new();
        tools.read(&text, &mut events);
        if is_end {
            tools.finish(&mut events);
        }
        for event in events {
            let delta = match event {
                ToolEvent::Text(text) => {
                    spoken.text.push_str(&text);
                    continue;
                }
                ToolEvent::Call { name } => {
                    num_calls += 1;
                    let start = Some(ToolCallStart { id: call_id(), name });
                    ToolCallDelta { index: num_calls - 1, start, arguments: String::new() }
                }
                ToolEvent::Arguments(arguments) => {
                    ToolCallDelta { index: num_calls - 1, start: None, arguments }
                }
            };
            push_call(&mut spoken.tool_calls, delta);
        }
        spoken.calls_are_over = tools.is_over();
        spoken
    }
}

fn call_id() -> String {
    format!("call_{}", uuid::Uuid::new_v4().simple())
}

/// Whether drawing `token` ends a choice, so that its text is not part of the reply.
pub(super) fn ends_choice(token: TokenId, sampling: &SamplingParams, eos: &[TokenId]) -> bool {
    sampling.stop_token_ids.contains(&token) || (!sampling.ignore_eos && eos.contains(&token))
}
