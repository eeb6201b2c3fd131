//! `/v1/models`, `/health` and `/tokenize`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::Response;
use serde::Serialize;
use tessera_types::TokenId;
use tokio::time::Instant;

use super::body::read_body;
use super::chat::json_response;
use super::chat_request::{TokenizeBody, parse_tokenize};
use super::chat_response::MediaJson;
use super::error::{error_response, status_of};
use super::{HttpState, request_id, with_request_id};
use crate::error::RequestError;

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: [ModelJson; 1],
}

#[derive(Serialize)]
struct ModelJson {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: u32,
}

fn model_json(state: &HttpState) -> ModelJson {
    ModelJson {
        id: state.service.model().name().to_owned(),
        object: "model",
        created: state.service.started_at(),
        owned_by: "tessera",
        max_model_len: state.service.max_model_len(),
    }
}

pub(super) async fn list_models(State(state): State<Arc<HttpState>>) -> Response<Body> {
    json(&ModelList { object: "list", data: [model_json(&state)] })
}

pub(super) async fn get_model(
    State(state): State<Arc<HttpState>>,
    Path(name): Path<String>,
) -> Response<Body> {
    match state.service.model().check_name(&name) {
        Ok(()) => json(&model_json(&state)),
        Err(error) => error_response(&error),
    }
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
}

/// 200 once a request would succeed.
pub(super) async fn health(State(state): State<Arc<HttpState>>) -> Response<Body> {
    match state.service.check_ready() {
        Ok(()) => json(&Health { status: "ok" }),
        Err(error) => error_response(&error),
    }
}

/// vLLM's shape, with our media facts.
#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    media: Vec<MediaJson>,
}

pub(super) async fn tokenize(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Response<Body> {
    let mut call = state.service.metrics().call("http", "tokenize", "499");
    let id = request_id(request.headers());
    let response = match tokens(&state, request, &id).await {
        Ok(tokens) => {
            call.set_code("200");
            json(&tokens)
        }
        Err(error) => {
            call.set_code(status_of(&error).as_str());
            error_response(&error)
        }
    };
    with_request_id(response, &id)
}

async fn tokens(
    state: &Arc<HttpState>,
    request: Request,
    request_id: &str,
) -> Result<Tokens, RequestError> {
    let service = &state.service;
    let config = service.config();
    let mut held = service.admission().held_bytes();
    let (parts, body) = request.into_parts();
    let timeout = Duration::from_millis(config.http.body_timeout_ms);
    let limit = config.http.max_body_bytes;
    let body = read_body(&parts.headers, body, limit, timeout, &mut held, None).await?;
    let size = body.len();
    let parse = {
        let (state, request_id) = (Arc::clone(state), request_id.to_owned());
        move || {
            let limits = &state.service.config().limits;
            parse_tokenize(&body, request_id, Instant::now(), limits, &state.unknown)
        }
    };
    let (tokens, media) = match service.run_sized(size, parse).await?? {
        TokenizeBody::Text { model, prompt } => {
            (service.tokenize_text(&model, prompt).await?, Vec::new())
        }
        TokenizeBody::Chat(request) => {
            let prepared = service.tokenize(*request, held).await?;
            let media = prepared.media_info().iter().map(MediaJson::from).collect();
            (prepared.prompt.tokens.clone(), media)
        }
    };
    Ok(Tokens { count: tokens.len(), max_model_len: service.max_model_len(), tokens, media })
}

fn json<T: Serialize>(value: &T) -> Response<Body> {
    json_response(serde_json::to_vec(value).expect("plain data always serializes"))
}
