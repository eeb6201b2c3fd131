//! When to stop: SIGINT, SIGTERM, or the end of a supervisor's lifeline.

use std::io::Read;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// Completes at the first SIGINT or SIGTERM, or, with `exit_with_stdin`, when standard input ends: the
/// supervisor that held its other end is gone.
///
/// # Errors
/// Signal handlers cannot be installed; they are in place when this returns.
pub fn shutdown(exit_with_stdin: bool) -> Result<impl Future<Output = ()> + Send + 'static> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    Ok(async move {
        let reason = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
            () = stdin_ends(), if exit_with_stdin => "supervisor gone",
        };
        tracing::info!(reason, "shutting down");
    })
}

/// Completes when standard input ends. A thread of its own reads it: a runtime that ends would wait for a
/// read on its blocking pool, and this one may never return.
async fn stdin_ends() {
    let (ended, end) = oneshot::channel();
    let read = move || {
        let mut buffer = [0; 64];
        // Whatever is written there is ignored; an error means that the pipe is gone as well.
        while matches!(std::io::stdin().read(&mut buffer), Ok(read) if read > 0) {}
        // Nobody listens any more when another reason came first.
        let _ = ended.send(());
    };
    match std::thread::Builder::new().name("lifeline".into()).spawn(read) {
        // A dropped sender counts as an end too: better to stop than to run without a supervisor.
        Ok(_) => drop(end.await),
        Err(error) => tracing::error!(%error, "the lifeline cannot be watched"),
    }
}
