//! The canary: a fixed prompt through all ranks, as the first act of an epoch and while the group is
//! idle. Its token ids must equal those stored with the model fingerprint and the numerics id.

use std::sync::Arc;

use tessera_scheduler::{SchedulerConfig, SequenceRequest};
use tessera_types::{PositionSpan, Prompt, SamplingParams, SequenceId, TokenId};

use crate::error::{EngineError, SequenceError};
use crate::stream::{Event, EventSink, SinkError};

/// Tokens the canary computes: prompt and output.
const NUM_TOKENS: u32 = 8;
/// Of these, tokens it draws.
const NUM_OUTPUT_TOKENS: u32 = 4;

/// Takes the canary's token ids on the engine thread. Must not wait.
pub type CanaryReply = Box<dyn FnOnce(Result<Vec<TokenId>, EngineError>) + Send>;

/// The canary's fixed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canary;

impl Canary {
    /// A greedy sequence of a few tokens that fits into the reserve, and so never waits for others.
    pub(crate) fn request(
        sequence: SequenceId,
        limits: &SchedulerConfig,
        vocab_size: u32,
    ) -> SequenceRequest {
        let context = limits.max_model_len - 1;
        let room = match limits.reserved_blocks {
            0 => context,
            blocks => blocks.saturating_mul(limits.block_size).min(context),
        };
        // Room is for one token less than there are: the last one is drawn but not computed.
        let max_tokens = NUM_OUTPUT_TOKENS.min(room.max(1));
        let num_prompt_tokens =
            NUM_TOKENS.min(room.saturating_add(1)).saturating_sub(max_tokens).max(1);
        // Ids spread over the vocabulary, so that every rank's share of the embedding is read.
        let token = |index: u32| {
            (u64::from(vocab_size) * u64::from(2 * index + 1) / u64::from(2 * num_prompt_tokens))
                as TokenId
        };
        SequenceRequest {
            sequence,
            prompt: Arc::new(Prompt {
                tokens: (0..num_prompt_tokens).map(token).collect(),
                media: Vec::new(),
                positions: vec![PositionSpan::Text { len: num_prompt_tokens }],
            }),
            output: Vec::new(),
            sampling: Arc::new(SamplingParams {
                max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            }),
            eos_token_ids: Arc::from([]),
            seed: 0,
            priority: i32::MAX,
            tenant: tessera_types::TenantId::default(),
            arrival: 0,
            block_keys: Vec::new(),
            use_reserve: limits.reserved_blocks > 0,
        }
    }
}

/// Collects the canary's tokens and replies once.
pub(crate) struct CanarySink {
    tokens: Vec<TokenId>,
    reply: Option<CanaryReply>,
}

impl CanarySink {
    pub fn new(reply: CanaryReply) -> Self {
        Self { tokens: Vec::new(), reply: Some(reply) }
    }

    fn reply(&mut self, result: Result<Vec<TokenId>, EngineError>) {
        if let Some(reply) = self.reply.take() {
            reply(result);
        }
    }
}

impl EventSink for CanarySink {
    fn send(&mut self, event: Event) -> Result<(), SinkError> {
        match event {
            Event::Token { token, .. } => self.tokens.push(token),
            Event::Finished { .. } => {
                let tokens = std::mem::take(&mut self.tokens);
                self.reply(Ok(tokens));
            }
            Event::Failed { error } => self.reply(Err(EngineError::Canary(error))),
            Event::Accepted { .. }
            | Event::MediaNeeded { .. }
            | Event::Started { .. }
            | Event::PromptLogprobs { .. } => {}
        }
        Ok(())
    }
}

impl Drop for CanarySink {
    fn drop(&mut self) {
        self.reply(Err(EngineError::Canary(SequenceError::ShuttingDown)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canary_fits_every_reserve() {
        for block_size in 1..20 {
            for max_model_len in 2..20 {
                let limits =
                    SchedulerConfig { block_size, max_model_len, ..SchedulerConfig::default() };
                let request = Canary::request(SequenceId(1), &limits, 1000);
                let longest = request.prompt.tokens.len() as u32 + request.sampling.max_tokens;
                assert!(longest <= max_model_len, "{longest} in a context of {max_model_len}");
                assert!(longest - 1 <= block_size, "{longest} in a block of {block_size}");
                assert!(request.prompt.tokens.iter().all(|&token| token < 1000));
                assert_eq!(request.prompt.validate(), Ok(()));
            }
        }
    }
}
