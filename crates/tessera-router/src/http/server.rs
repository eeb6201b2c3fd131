//! Serves HTTP/1.1 connections within their bounds of number and time.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::listen::{BoundedListener, BoundedStream};

/// Accepts until `shutdown`. Connections are tracked: they finish the reply they are at, then close.
pub(crate) async fn serve(
    listener: BoundedListener,
    app: Router,
    header_timeout: Duration,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(header_timeout);
    let builder = Arc::new(builder);
    loop {
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            () = shutdown.cancelled() => return,
        };
        let (builder, app, shutdown) = (Arc::clone(&builder), app.clone(), shutdown.clone());
        tasks.spawn(async move { serve_connection(&builder, stream, app, shutdown).await });
    }
}

async fn serve_connection(
    builder: &http1::Builder,
    stream: BoundedStream,
    app: Router,
    shutdown: CancellationToken,
) {
    let service = app.map_request(|request: Request<Incoming>| request.map(Body::new));
    let connection =
        builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // Clients that leave in the middle are daily business.
        tracing::debug!(%error, "connection ended early");
    }
}
