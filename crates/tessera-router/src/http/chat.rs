//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Response, header};
use tokio::time::Instant;

use super::body::read_body;
use super::chat_request::{ChatBody, parse_chat};
use super::chat_response::{Gathered, GatheredChoice, reply_json};
use super::error::{error_response, status_of};
use super::sse::{StreamOptions, stream_response};
use super::{HttpState, request_id, with_request_id};
use crate::error::RequestError;
use crate::events::{Completion, Event, Generation};
use crate::metrics::CallGuard;
use crate::request::{TENANT_HEADER, tenant_id};

pub(super) async fn chat_completions(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Response<Body> {
    let arrival = Instant::now();
    let request_id = request_id(request.headers());
    let mut call = state.service.metrics().call("http", "chat", "499");
    let response = match begin(&state, request, &request_id, arrival).await {
        Ok(begun) => reply(&state, begun, &request_id, call).await,
        Err(error) => {
            tracing::debug!(request_id, error = error.message(), "request refused");
            call.set_code(status_of(&error).as_str());
            error_response(&error)
        }
    };
    with_request_id(response, &request_id)
}

/// An admitted request and how its reply is to look.
struct Begun {
    generation: Generation,
    stream: bool,
    options: StreamOptions,
}

async fn begin(
    state: &Arc<HttpState>,
    request: Request,
    request_id: &str,
    arrival: Instant,
) -> Result<Begun, RequestError> {
    let service = &state.service;
    let config = service.config();
    let refusal = service.admission().check_room().err();
    let mut held = service.admission().held_bytes();
    let (parts, body) = request.into_parts();
    let tenant = parts.headers.get(TENANT_HEADER).map(HeaderValue::as_bytes);
    let tenant = tenant_id(tenant)?;
    let timeout = Duration::from_millis(config.http.body_timeout_ms);
    let limit = config.http.max_body_bytes;
    let body = read_body(&parts.headers, body, limit, timeout, &mut held, refusal).await?;
    let parse = {
        let (state, request_id, body) = (Arc::clone(state), request_id.to_owned(), body.clone());
        move || {
            let limits = &state.service.config().limits;
            parse_chat(&body, request_id, arrival, limits, &state.unknown)
        }
    };
    let ChatBody { mut request, stream, include_usage } =
        service.run_sized(body.len(), parse).await??;
    request.tenant = tenant;
    drop(body);
    let options = StreamOptions {
        num_choices: request.num_choices,
        include_usage,
        return_token_ids: request.return_token_ids,
        keepalive: Duration::from_millis(config.http.keepalive_ms),
    };
    let generation = service.generate(request, held).await?;
    Ok(Begun { generation, stream, options })
}

async fn reply(
    state: &HttpState,
    begun: Begun,
    request_id: &str,
    mut call: CallGuard,
) -> Response<Body> {
    let id = format!("chatcmpl-{request_id}");
    let Begun { generation, stream, options } = begun;
    let model = state.service.model();
    if stream {
        return stream_response(&id, generation, &options, Arc::clone(model), call);
    }
    let prompt = Arc::clone(&generation.prompt);
    match gather(generation, options.num_choices).await {
        Ok((gathered, completion)) => {
            call.set_code("200");
            let bytes_of = |id| model.token_bytes(id);
            let json = reply_json(
                &id,
                &prompt,
                &gathered,
                &completion,
                options.return_token_ids,
                &bytes_of,
            );
            json_response(json)
        }
        Err(error) => {
            call.set_code(status_of(&error).as_str());
            error_response(&error)
        }
    }
}

/// Waits for all events. Dropping the future, as the server does when the client leaves, cancels.
async fn gather(
    mut generation: Generation,
    num_choices: u32,
) -> Result<(Gathered, Completion), RequestError> {
    let choices = vec![GatheredChoice::default(); num_choices as usize];
    let mut gathered = Gathered { choices, ..Gathered::default() };
    while let Some(event) = generation.events.recv().await {
        match event? {
            Event::PromptLogprobs(piece) => gathered.prompt_logprobs.extend(piece.tokens),
            Event::Delta(delta) => gathered.choices[delta.choice as usize].add(delta),
            Event::Finish(finish) => {
                let choice = finish.choice as usize;
                gathered.choices[choice].finish = Some(finish);
            }
            Event::Completion(completion) => return Ok((gathered, completion)),
        }
    }
    Err(RequestError::Cancelled)
}

pub(super) fn json_response(json: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(json));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
