//! Events into messages of the public service.

use tessera_proto::common::v1 as common;
use tessera_proto::hash_bytes;
use tessera_proto::inference::v1 as pb;
use tessera_types::FinishReason;

use crate::events::{
    ChoiceFinish, Completion, Delta, Event, MediaInfo, OutputToken, PromptInfo, ToolCallDelta,
    ToolCallStart,
};

/// How much a client wants to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replies {
    pub(super) return_token_ids: bool,
}

impl Replies {
    /// The first message.
    pub(super) fn prompt(self, prompt: &PromptInfo) -> pb::GenerateResponse {
        response(pb::generate_response::Event::Prompt(self.prompt_info(prompt)))
    }

    /// A later message.
    pub(super) fn event(self, event: Event) -> pb::GenerateResponse {
        use pb::generate_response::Event as Out;
        response(match event {
            Event::PromptLogprobs(piece) => Out::PromptLogprobs(pb::PromptLogprobs {
                first_token: piece.first_token,
                tokens: piece.tokens.iter().map(Into::into).collect(),
            }),
            Event::Delta(delta) => Out::Delta(self.delta(delta)),
            Event::Finish(finish) => Out::Finish(pb::ChoiceFinish {
                choice: finish.choice,
                reason: finish_reason(finish.reason),
                matched_stop: finish.matched_stop.unwrap_or_default(),
            }),
            Event::Completion(completion) => Out::Completion(self::completion(&completion)),
        })
    }

    fn prompt_info(self, prompt: &PromptInfo) -> pb::PromptInfo {
        pb::PromptInfo {
            request_id: prompt.request_id.clone(),
            model: prompt.model.clone(),
            num_prompt_tokens: prompt.prompt.tokens.len() as u32,
            media: prompt.media.iter().map(media_info).collect(),
            token_ids: match self.return_token_ids {
                true => prompt.prompt.tokens.clone(),
                false => Vec::new(),
            },
            effective_seed: prompt.effective_seed,
        }
    }

    fn delta(self, delta: Delta) -> pb::Delta {
        let (token_ids, logprobs) = self.tokens(&delta.tokens);
        let tool_calls = delta.tool_calls.into_iter().map(tool_call_delta).collect();
        pb::Delta { choice: delta.choice, text: delta.text, token_ids, logprobs, tool_calls }
    }

    fn tokens(self, tokens: &[OutputToken]) -> (Vec<u32>, Vec<common::PositionLogprobs>) {
        let ids = tokens.iter().map(|token| token.id).filter(|_| self.return_token_ids);
        let logprobs = tokens.iter().filter_map(|token| token.logprobs.as_ref());
        (ids.collect(), logprobs.map(Into::into).collect())
    }
}

fn tool_call_delta(delta: ToolCallDelta) -> pb::ToolCallDelta {
    let ToolCallDelta { index, start, arguments } = delta;
    let (id, name) = start.map(|start| (start.id, start.name)).unwrap_or_default();
    pb::ToolCallDelta { index, id, name, arguments }
}

fn response(event: pb::generate_response::Event) -> pb::GenerateResponse {
    pb::GenerateResponse { event: Some(event) }
}

fn finish_reason(reason: FinishReason) -> i32 {
    common::FinishReason::from(reason).into()
}

pub(super) fn media_info(info: &MediaInfo) -> pb::MediaInfo {
    pb::MediaInfo {
        kind: common::MediaKind::from(info.kind).into(),
        media_id: hash_bytes(&info.media_id.0),
        source_width: info.source_width,
        source_height: info.source_height,
        resized_width: info.resized_width,
        resized_height: info.resized_height,
        grid: Some(info.grid.into()),
        num_tokens: info.num_tokens,
        cache_hit: info.cache_hit,
    }
}

fn completion(completion: &Completion) -> pb::Completion {
    let Completion { usage, timings, media } = completion;
    pb::Completion {
        usage: Some(pb::Usage {
            num_prompt_tokens: usage.num_prompt_tokens,
            num_cached_tokens: usage.num_cached_tokens,
            num_output_tokens: usage.num_output_tokens,
            num_media_tokens: usage.num_media_tokens,
        }),
        timings: Some(pb::StageTimings {
            prepare_ms: timings.prepare_ms,
            encode_ms: timings.encode_ms,
            first_token_ms: timings.first_token_ms,
            total_ms: timings.total_ms,
        }),
        media: media.iter().map(media_info).collect(),
    }
}

/// Gathers events into the one message of `GenerateOnce`.
#[derive(Debug)]
pub(super) struct OnceReply {
    replies: Replies,
    reply: pb::GenerateOnceResponse,
}

impl OnceReply {
    pub(super) fn new(prompt: &PromptInfo, replies: Replies, num_choices: u32) -> Self {
        let choice = |index| pb::Choice { index, ..pb::Choice::default() };
        let reply = pb::GenerateOnceResponse {
            prompt: Some(replies.prompt_info(prompt)),
            choices: (0..num_choices).map(choice).collect(),
            completion: None,
            prompt_logprobs: Vec::new(),
        };
        Self { replies, reply }
    }

    /// Adds an event; the last one gives the reply.
    pub(super) fn add(&mut self, event: Event) -> Option<pb::GenerateOnceResponse> {
        match event {
            Event::PromptLogprobs(piece) => {
                self.reply.prompt_logprobs.extend(piece.tokens.iter().map(Into::into));
                None
            }
            Event::Delta(delta) => {
                let (token_ids, logprobs) = self.replies.tokens(&delta.tokens);
                let choice = &mut self.reply.choices[delta.choice as usize];
                choice.text.push_str(&delta.text);
                choice.token_ids.extend(token_ids);
                choice.logprobs.extend(logprobs);
                for ToolCallDelta { start, arguments, .. } in delta.tool_calls {
                    if let Some(ToolCallStart { id, name }) = start {
                        let arguments = String::new();
                        choice.tool_calls.push(pb::ToolCall { id, name, arguments });
                    }
                    if let Some(call) = choice.tool_calls.last_mut() {
                        call.arguments.push_str(&arguments);
                    }
                }
                None
            }
            Event::Finish(ChoiceFinish { choice, reason, matched_stop, .. }) => {
                let choice = &mut self.reply.choices[choice as usize];
                choice.reason = finish_reason(reason);
                choice.matched_stop = matched_stop.unwrap_or_default();
                None
            }
            Event::Completion(done) => {
                self.reply.completion = Some(completion(&done));
                Some(std::mem::take(&mut self.reply))
            }
        }
    }
}
