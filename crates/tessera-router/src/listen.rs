//! Accepts connections up to a bound, with Nagle's algorithm off: a token is a small write, and waiting
//! for an acknowledgement before the next would cost tens of milliseconds.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// Pause after a failed accept (no file descriptors left, for example), so that it does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// A listener that holds at most so many connections open; further ones wait in the kernel's queue.
#[derive(Debug)]
pub(crate) struct BoundedListener {
    listener: TcpListener,
    connections: Arc<Semaphore>,
}

/// A connection that gives its place back when dropped.
#[derive(Debug)]
pub(crate) struct BoundedStream {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
}

impl BoundedListener {
    pub(crate) fn new(listener: TcpListener, max_connections: usize) -> Self {
        let places = max_connections.min(Semaphore::MAX_PERMITS);
        Self { listener, connections: Arc::new(Semaphore::new(places)) }
    }

    /// The next connection. Never fails: what goes wrong with one connection is not the listener's end.
    pub(crate) async fn accept(&self) -> BoundedStream {
        let place = Arc::clone(&self.connections)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // A socket that refuses the option is about to fail anyway.
                    let _ = stream.set_nodelay(true);
                    return BoundedStream { stream, _place: place };
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for BoundedStream {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_bound_holds_and_a_closed_connection_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("is bound");
        let listener = BoundedListener::new(listener, 1);
        let _clients = [
            TcpStream::connect(address).await.expect("connects"),
            TcpStream::connect(address).await.expect("connects"),
        ];
        let first = listener.accept().await;
        assert!(first.stream.nodelay().expect("is a socket"));
        let mut second = Box::pin(listener.accept());
        assert!(futures::poll!(second.as_mut()).is_pending());
        assert_eq!(listener.connections.available_permits(), 0);
        drop(first);
        second.await;
    }
}
