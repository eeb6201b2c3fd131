//! A TCP proxy between client and store that can be cut or frozen, to tell a lost network from a lost
//! store.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    /// Bytes flow.
    Open,
    /// Connections are closed, new ones at once.
    Cut,
    /// Connections stand, and nothing flows.
    Frozen,
}

pub struct Proxy {
    pub addr: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Dropped, and so stopped, with the proxy.
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a free port");
        let addr = listener.local_addr().expect("its address");
        let (mode, modes) = watch::channel(Mode::Open);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target, modes));
        Self { addr, mode, _tasks: tasks }
    }

    pub fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }

    pub fn freeze(&self) {
        self.mode.send_replace(Mode::Frozen);
    }

    /// New connections flow; those that were frozen stay so, as after a lost route.
    pub fn heal(&self) {
        self.mode.send_replace(Mode::Open);
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, modes: watch::Receiver<Mode>) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.expect("the listener stands");
        if *modes.borrow() != Mode::Cut {
            connections.spawn(carry(client, target, modes.clone()));
        }
    }
}

async fn carry(client: TcpStream, target: SocketAddr, mut modes: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // Once frozen, a connection never thaws.
    let frozen = modes.clone();
    let up = copy(from_client, to_server, frozen.clone());
    let down = copy(from_server, to_client, frozen);
    tokio::select! {
        () = async { tokio::join!(up, down); } => {}
        () = async { drop(modes.wait_for(|mode| *mode == Mode::Cut).await) } => {}
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut modes: watch::Receiver<Mode>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let frozen = async { drop(modes.wait_for(|mode| *mode == Mode::Frozen).await) };
        let read = tokio::select! {
            read = from.read(&mut buffer) => Some(read),
            () = frozen => None,
        };
        let Some(read) = read else {
            return std::future::pending().await;
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(num_bytes) => {
                if to.write_all(&buffer[..num_bytes]).await.is_err() {
                    return;
                }
            }
        }
    }
}
