//! `tessera generate`: asks one question and streams the answer to the terminal.

use std::io::Write;
use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use futures::{StreamExt, stream};
use tessera_proto::common::v1::SamplingOptions;
use tessera_proto::inference::v1::inference_client::InferenceClient;
use tessera_proto::inference::v1::{
    Completion, ContentPart, GenerateRequest, Image, MediaSource, Message, PromptInfo,
    UploadMediaRequest, Video, content_part, generate_response, media_source,
};
use tessera_proto::{MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES};
use tonic::transport::{Channel, Endpoint};

use crate::error::{Error, Result};

/// Files up to this size travel inside the request; larger ones are uploaded in chunks first.
const MAX_INLINE_BYTES: usize = MAX_MESSAGE_BYTES / 4;

/// Flags of `tessera generate`.
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// The question.
    pub question: String,
    /// Image file to ask about; repeat for several, in order before the question.
    #[arg(long = "image", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// Video frame file; repeat in order.
    #[arg(long = "frame", value_name = "FILE")]
    pub frames: Vec<PathBuf>,
    /// Frames per second of the given frames.
    #[arg(long, requires = "frames")]
    pub fps: Option<f64>,
    /// System message.
    #[arg(long)]
    pub system: Option<String>,
    /// gRPC address of a router.
    #[arg(long, default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    /// Tokens to generate at most; default: the rest of the context.
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// 0 is greedy; default: the checkpoint's.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Keep the smallest set of tokens that reaches this probability.
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Seed of the draws; default: drawn by the server and printed.
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Sends the request and prints the answer to standard output, facts about it to standard error.
pub async fn generate(args: &GenerateArgs) -> Result<()> {
    let channel = connect(&args.endpoint).await?;
    let mut client = InferenceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let request = request(&mut client, args).await?;
    let mut answer = client.generate(request).await?.into_inner();
    let mut out = std::io::stdout().lock();
    while let Some(response) = answer.message().await? {
        match response.event {
            Some(generate_response::Event::Prompt(info)) => describe_prompt(&info),
            Some(generate_response::Event::Delta(delta)) => {
                out.write_all(delta.text.as_bytes())
                    .and_then(|()| out.flush())
                    .map_err(Error::Output)?;
            }
            Some(generate_response::Event::Completion(completion)) => {
                writeln!(out).map_err(Error::Output)?;
                describe_completion(&completion);
            }
            Some(
                generate_response::Event::Finish(_) | generate_response::Event::PromptLogprobs(_),
            )
            | None => {}
        }
    }
    Ok(())
}

async fn connect(endpoint: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned())
        .map_err(|source| Error::Endpoint { endpoint: endpoint.to_owned(), source })?;
    let name = endpoint.uri().to_string();
    endpoint
        .tcp_nodelay(true)
        .connect_timeout(std::time::Duration::from_secs(5))
        .connect()
        .await
        .map_err(|source| Error::Endpoint { endpoint: name, source })
}

async fn request(
    client: &mut InferenceClient<Channel>,
    args: &GenerateArgs,
) -> Result<GenerateRequest> {
    let mut parts = Vec::new();
    for path in &args.images {
        let image = Image { source: Some(source(client, path).await?), ..Image::default() };
        parts.push(content_part::Part::Image(image));
    }
    if !args.frames.is_empty() {
        let mut video = Video { fps: args.fps, ..Video::default() };
        for path in &args.frames {
            video.frames.push(source(client, path).await?);
        }
        parts.push(content_part::Part::Video(video));
    }
    parts.push(content_part::Part::Text(args.question.clone()));
    let system = args
        .system
        .iter()
        .map(|text| message("system", vec![content_part::Part::Text(text.clone())]));
    let messages = system.chain([message("user", parts)]).collect();
    let sampling = SamplingOptions {
        temperature: args.temperature,
        top_p: args.top_p,
        max_tokens: args.max_tokens,
        ..SamplingOptions::default()
    };
    Ok(GenerateRequest {
        messages,
        sampling: Some(sampling),
        seed: args.seed,
        ..GenerateRequest::default()
    })
}

fn message(role: &str, parts: Vec<content_part::Part>) -> Message {
    let parts = parts.into_iter().map(|part| ContentPart { part: Some(part) }).collect();
    Message { role: role.into(), parts, ..Message::default() }
}

async fn source(client: &mut InferenceClient<Channel>, path: &PathBuf) -> Result<MediaSource> {
    let data = tokio::fs::read(path)
        .await
        .map_err(|source| Error::ReadFile { path: path.clone(), source })?;
    let data = Bytes::from(data);
    let source = if data.len() <= MAX_INLINE_BYTES {
        media_source::Source::Data(data)
    } else {
        let starts = (0..data.len()).step_by(MAX_CHUNK_BYTES);
        let chunks: Vec<_> = starts
            .map(|at| data.slice(at..data.len().min(at + MAX_CHUNK_BYTES)))
            .map(|chunk| UploadMediaRequest { chunk })
            .collect();
        let uploaded = client.upload_media(stream::iter(chunks).boxed()).await?.into_inner();
        media_source::Source::MediaId(uploaded.media_id)
    };
    Ok(MediaSource { source: Some(source) })
}

fn describe_prompt(info: &PromptInfo) {
    eprintln!(
        "request {}: {} prompt tokens, seed {}",
        info.request_id, info.num_prompt_tokens, info.effective_seed
    );
    for media in &info.media {
        eprintln!(
            "media: {} x {} px, seen as {} x {} px, {} tokens",
            media.source_width,
            media.source_height,
            media.resized_width,
            media.resized_height,
            media.num_tokens
        );
    }
}

fn describe_completion(completion: &Completion) {
    let usage = completion.usage.unwrap_or_default();
    let timings = completion.timings.unwrap_or_default();
    eprintln!(
        "{} output tokens; prepare {:.0} ms, encode {:.0} ms, first token {:.0} ms, total {:.0} ms",
        usage.num_output_tokens,
        timings.prepare_ms,
        timings.encode_ms,
        timings.first_token_ms,
        timings.total_ms
    );
}
