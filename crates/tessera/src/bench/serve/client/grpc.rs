//! `Inference.Generate` of a Tessera router.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::stream;
use tessera_proto::common::v1::SamplingOptions;
use tessera_proto::inference::v1::inference_client::InferenceClient;
use tessera_proto::inference::v1::{
    ContentPart, GenerateRequest, Image, MediaSource, Message, UploadMediaRequest, Video,
    content_part, generate_response, media_source,
};
use tessera_proto::{MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{Answer, Conversation, Failure};
use crate::bench::serve::args::Plan;
use crate::bench::serve::workload::Media;

/// Media of a request up to this size in all travel inside it; more is uploaded first.
const MAX_INLINE_BYTES: usize = MAX_MESSAGE_BYTES / 2;

/// See the module documentation. Clones share a connection.
#[derive(Clone)]
pub struct GrpcClient {
    client: InferenceClient<Channel>,
    model: Arc<str>,
    sampling: SamplingOptions,
}

impl GrpcClient {
    pub async fn connect(url: &str, plan: &Plan) -> Result<Self, Failure> {
        let endpoint = Endpoint::from_shared(url.to_owned());
        let endpoint = endpoint.map_err(|error| Failure::new("bad url", error))?;
        let channel = endpoint.tcp_nodelay(true).connect().await;
        let channel = channel.map_err(|error| Failure::new("connect", error))?;
        Ok(Self {
            client: InferenceClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            model: plan.model.as_deref().unwrap_or_default().into(),
            sampling: SamplingOptions {
                temperature: Some(plan.temperature as f32),
                ignore_eos: Some(plan.ignore_eos),
                ..SamplingOptions::default()
            },
        })
    }

    pub async fn ask(&self, conversation: Conversation<'_>) -> Result<Answer, Failure> {
        let mut client = self.client.clone();
        let question = &conversation.chat.turns[conversation.answers.len()];
        let request = GenerateRequest {
            model: self.model.to_string(),
            messages: messages(&mut client, conversation).await?,
            sampling: Some(SamplingOptions {
                max_tokens: Some(question.max_tokens),
                ..self.sampling.clone()
            }),
            // Pieces are then told apart from text that is held back.
            return_token_ids: true,
            ..GenerateRequest::default()
        };
        let mut replies = client.generate(request).await.map_err(failure)?.into_inner();
        let mut answer = Answer::default();
        let mut is_complete = false;
        while let Some(reply) = replies.message().await.map_err(failure)? {
            match reply.event {
                Some(generate_response::Event::Delta(delta)) => {
                    if !delta.token_ids.is_empty() {
                        answer.pieces.push(Instant::now());
                    }
                    answer.text.push_str(&delta.text);
                }
                Some(generate_response::Event::Completion(completion)) => {
                    let usage = completion.usage.unwrap_or_default();
                    answer.num_prompt_tokens = Some(usage.num_prompt_tokens.into());
                    answer.num_cached_tokens = Some(usage.num_cached_tokens.into());
                    answer.num_output_tokens = Some(usage.num_output_tokens.into());
                    is_complete = true;
                }
                _ => {}
            }
        }
        match is_complete {
            true => Ok(answer),
            false => Err(Failure::new("broken stream", "it ended before its completion")),
        }
    }
}

fn failure(status: Status) -> Failure {
    let reason =
        tessera_proto::error_detail(&status).map_or_else(String::new, |detail| detail.reason);
    Failure::new(format!("grpc {:?} {reason}", status.code()).trim_end(), status.message())
}

async fn messages(
    client: &mut InferenceClient<Channel>,
    conversation: Conversation<'_>,
) -> Result<Vec<Message>, Failure> {
    let text = |text: &str| content_part::Part::Text(text.to_owned());
    let chat = conversation.chat;
    let mut messages = Vec::new();
    if let Some(system) = &chat.system {
        messages.push(message("system", vec![text(system)]));
    }
    for (turn, question) in chat.turns.iter().enumerate().take(conversation.answers.len() + 1) {
        let mut parts = Vec::new();
        if turn == 0 {
            parts.extend(media_part(client, &chat.media).await?);
        }
        parts.push(text(&question.text));
        messages.push(message("user", parts));
        if let Some(answer) = conversation.answers.get(turn) {
            messages.push(message("assistant", vec![text(answer)]));
        }
    }
    Ok(messages)
}

fn message(role: &str, parts: Vec<content_part::Part>) -> Message {
    let parts = parts.into_iter().map(|part| ContentPart { part: Some(part) }).collect();
    Message { role: role.into(), parts, ..Message::default() }
}

async fn media_part(
    client: &mut InferenceClient<Channel>,
    media: &Media,
) -> Result<Vec<content_part::Part>, Failure> {
    match media {
        Media::None => Ok(Vec::new()),
        Media::Images(files) => {
            let sources = sources(client, files).await?;
            let image = |source| {
                content_part::Part::Image(Image { source: Some(source), ..Image::default() })
            };
            Ok(sources.into_iter().map(image).collect())
        }
        Media::Video { frames, fps } => {
            let frames = sources(client, frames).await?;
            let video = Video { frames, fps: Some(*fps), ..Video::default() };
            Ok(vec![content_part::Part::Video(video)])
        }
    }
}

async fn sources(
    client: &mut InferenceClient<Channel>,
    files: &[Bytes],
) -> Result<Vec<MediaSource>, Failure> {
    let is_inline = files.iter().map(Bytes::len).sum::<usize>() <= MAX_INLINE_BYTES;
    let mut sources = Vec::with_capacity(files.len());
    for file in files {
        let source = match is_inline {
            true => media_source::Source::Data(file.clone()),
            false => {
                let chunks = (0..file.len()).step_by(MAX_CHUNK_BYTES);
                let chunks: Vec<UploadMediaRequest> = chunks
                    .map(|start| file.slice(start..file.len().min(start + MAX_CHUNK_BYTES)))
                    .map(|chunk| UploadMediaRequest { chunk })
                    .collect();
                let uploaded = client.upload_media(stream::iter(chunks)).await.map_err(failure)?;
                media_source::Source::MediaId(uploaded.into_inner().media_id)
            }
        };
        sources.push(MediaSource { source: Some(source) });
    }
    Ok(sources)
}
