//! The OpenAI-compatible face. Handlers read a body within bounds, parse it into a
//! [`crate::request::ChatRequest`], hand it to the [`Service`], and put events into JSON.
//!
//! Modules: `server` (connections), `body` (bounded reading), `fields` (JSON by field), `unknown`
//! (ignored fields), `chat_request`, `content`, `constraint` and `tools` (parsing), `chat` (the handler),
//! `chat_response` and `logprobs` (JSON out), `sse` (streams), `error` (OpenAI's error object), `info` (models, health, tokenize).

mod body;
mod chat;
mod chat_request;
mod chat_response;
mod constraint;
mod content;
mod error;
mod fields;
mod info;
mod logprobs;
mod server;
mod sse;
mod tools;
mod unknown;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Response, Uri};
use axum::routing::{get, post};

pub(crate) use content::decode_data_url;
pub(crate) use server::serve;

use crate::error::RequestError;
use crate::service::Service;
use error::error_response;
use unknown::UnknownFields;

const REQUEST_ID: &str = "x-request-id";

/// What all handlers share.
pub(crate) struct HttpState {
    service: Service,
    unknown: UnknownFields,
}

/// All routes.
pub(crate) fn app(service: Service) -> Router {
    let state = Arc::new(HttpState { service, unknown: UnknownFields::default() });
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/models", get(info::list_models))
        .route("/v1/models/{model}", get(info::get_model))
        .route("/health", get(info::health))
        .route("/tokenize", post(info::tokenize))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(state)
}

async fn not_found(uri: Uri) -> Response<Body> {
    let detail = format!("{:.200} is not a path of this server", uri.path());
    let mut response = error_response(&RequestError::invalid("path", detail));
    *response.status_mut() = axum::http::StatusCode::NOT_FOUND;
    response
}

async fn not_allowed(method: Method, uri: Uri) -> Response<Body> {
    let detail = format!("{method} is not a method of {:.200}", uri.path());
    let mut response = error_response(&RequestError::invalid("method", detail));
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// The client's request id if it is fit for logs, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    crate::request::request_id(given.unwrap_or_default())
}

/// Echoes the request id, by which clients name a request to operators.
fn with_request_id(mut response: Response<Body>, id: &str) -> Response<Body> {
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}
