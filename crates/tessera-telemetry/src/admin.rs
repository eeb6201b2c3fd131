//! The admin server: `/metrics`, `/livez` and `/readyz` on an address of its own, so that operators'
//! probes never compete with clients.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::config::AdminConfig;
use crate::error::TelemetryError;
use crate::registry::Registry;

/// Answer to a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyState {
    /// 200.
    Ready,
    /// 503 with the reason as text.
    NotReady { reason: String },
}

/// A service's judgement of itself. Called on every probe, so it must be cheap and must not block.
pub trait Readiness: Send + Sync + 'static {
    /// Whether work would succeed now.
    fn ready(&self) -> ReadyState;

    /// Whether the process should go on living; a supervisor restarts it otherwise.
    fn live(&self) -> ReadyState {
        ReadyState::Ready
    }
}

impl<F: Fn() -> ReadyState + Send + Sync + 'static> Readiness for F {
    fn ready(&self) -> ReadyState {
        self()
    }
}

/// A bound admin server, not yet serving.
pub struct AdminServer {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
}

impl std::fmt::Debug for AdminServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminServer").field("address", &self.address).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct AdminState {
    registry: Registry,
    readiness: Arc<dyn Readiness>,
}

impl AdminServer {
    /// Takes the address of `config`, so that a port in use is a start-up error.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(
        config: &AdminConfig,
        registry: Registry,
        readiness: Arc<dyn Readiness>,
    ) -> Result<Self, TelemetryError> {
        let listen_error = |source| TelemetryError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen_error)?;
        Self::from_listener(listener, registry, readiness)
    }

    /// Serves on a listener that is bound already.
    ///
    /// # Errors
    /// The listener has no local address.
    pub fn from_listener(
        listener: TcpListener,
        registry: Registry,
        readiness: Arc<dyn Readiness>,
    ) -> Result<Self, TelemetryError> {
        let address = listener.local_addr().map_err(TelemetryError::Serve)?;
        let state = AdminState { registry, readiness };
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .with_state(state);
        Ok(Self { listener, address, router })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes.
    ///
    /// # Errors
    /// The listener fails for good.
    pub async fn serve(
        self,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), TelemetryError> {
        axum::serve(self.listener, self.router)
            .with_graceful_shutdown(shutdown)
            .await
            .map_err(TelemetryError::Serve)
    }
}

async fn metrics(State(state): State<AdminState>) -> Response {
    match state.registry.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn livez(State(state): State<AdminState>) -> Response {
    probe_answer(state.readiness.live())
}

async fn readyz(State(state): State<AdminState>) -> Response {
    probe_answer(state.readiness.ready())
}

fn probe_answer(state: ReadyState) -> Response {
    match state {
        ReadyState::Ready => (StatusCode::OK, "ok\n").into_response(),
        ReadyState::NotReady { reason } => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.expect("connects");
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("writes");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("reads");
        let code = text[9..12].parse().expect("a status code");
        let body = text.split("\r\n\r\n").nth(1).unwrap_or("").to_owned();
        (code, body)
    }

    #[tokio::test]
    async fn readiness_is_asked_on_every_probe() {
        let ready = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&ready);
        let readiness = move || match asked.load(Ordering::Relaxed) {
            true => ReadyState::Ready,
            false => ReadyState::NotReady { reason: "no group serves".to_owned() },
        };
        let registry = Registry::new();
        registry.counter("tessera_test_probes_total", "Probes.").expect("registers").inc();
        let server = AdminServer::bind(&AdminConfig::default(), registry, Arc::new(readiness))
            .await
            .expect("binds");
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.serve(async move {
            let _ = stopped.await;
        }));

        assert_eq!(get(address, "/readyz").await, (503, "no group serves\n".to_owned()));
        assert_eq!(get(address, "/livez").await.0, 200);
        ready.store(true, Ordering::Relaxed);
        assert_eq!(get(address, "/readyz").await.0, 200);
        let (code, text) = get(address, "/metrics").await;
        assert_eq!(code, 200);
        assert!(text.contains("tessera_test_probes_total 1"), "{text}");
        assert_eq!(get(address, "/other").await.0, 404);

        stop.send(()).expect("the server runs");
        serving.await.expect("joins").expect("ends cleanly");
    }
}
