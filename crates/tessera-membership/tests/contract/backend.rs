//! The two stores under test, each of which can be stopped and started again with its data.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tessera_membership::embedded::shared::SharedStore;
use tessera_membership::{EmbeddedConfig, EmbeddedStore, Store, StoreConfig, StoreEndpoint};
use tokio::net::TcpListener;

const ETCD: &str = "/usr/bin/etcd";
/// How long etcd may take to serve.
const ETCD_START: Duration = Duration::from_secs(20);

pub struct Backend {
    addr: SocketAddr,
    kind: Kind,
}

enum Kind {
    Embedded { store: SharedStore, server: Option<EmbeddedStore> },
    Etcd { data: TempDir, peer: SocketAddr, process: Option<Child> },
}

impl Backend {
    pub async fn embedded() -> Self {
        let config = EmbeddedConfig { min_ttl_seconds: 1, ..EmbeddedConfig::default() };
        let store = SharedStore::new(config);
        let mut backend = Self { addr: free_addr(), kind: Kind::Embedded { store, server: None } };
        backend.start().await;
        backend
    }

    pub async fn etcd() -> Self {
        assert!(
            Path::new(ETCD).exists(),
            "{ETCD} is missing; install Debian's package etcd-server (the test set-up does)"
        );
        let data = tempfile::tempdir().expect("a directory for etcd");
        let mut backend =
            Self { addr: free_addr(), kind: Kind::Etcd { data, peer: free_addr(), process: None } };
        backend.start().await;
        backend
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// A client of this store.
    pub async fn store(&self) -> Store {
        store_at(self.addr).await
    }

    /// Stops serving, with all connections. The data stay. etcd is killed, not asked.
    pub async fn stop(&mut self) {
        match &mut self.kind {
            Kind::Embedded { server, .. } => {
                server.take().expect("it runs").shutdown().await;
            }
            Kind::Etcd { process, .. } => end(process.take().expect("it runs")),
        }
    }

    /// Serves again at the same address.
    pub async fn start(&mut self) {
        match &mut self.kind {
            Kind::Embedded { store, server } => {
                let listener = TcpListener::bind(self.addr).await.expect("the port is ours");
                let serving = EmbeddedStore::serve(listener, store.clone());
                *server = Some(serving.expect("it serves"));
            }
            Kind::Etcd { data, peer, process } => {
                *process = Some(spawn_etcd(data.path(), self.addr, *peer));
                self.wait_until_served().await;
            }
        }
    }

    async fn wait_until_served(&self) {
        let store = self.store().await;
        let served = async {
            while store.get("ready?").await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let served = tokio::time::timeout(ETCD_START, served).await;
        served.expect("etcd does not serve; run it by hand to see why");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Kind::Etcd { process, .. } = &mut self.kind
            && let Some(process) = process.take()
        {
            end(process);
        }
    }
}

pub fn config_for(endpoints: Vec<StoreEndpoint>) -> StoreConfig {
    let mut config = StoreConfig::new(endpoints);
    config.watch.progress_interval = Duration::from_millis(200);
    config.watch.progress_timeout = Duration::from_millis(1000);
    config.watch.retry_min = Duration::from_millis(20);
    config.watch.retry_max = Duration::from_millis(200);
    config
}

pub async fn store_at(addr: SocketAddr) -> Store {
    let config = config_for(vec![StoreEndpoint::from(addr)]);
    Store::connect(config).await.expect("sound settings")
}

/// An address that is free now. Somebody else could take it before it is used; then the test fails
/// with that message.
pub fn free_addr() -> SocketAddr {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address")
}

fn spawn_etcd(data: &Path, client: SocketAddr, peer: SocketAddr) -> Child {
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
    Command::new(ETCD)
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &client])
        .args(["--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer])
        .args(["--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        // Its smallest TTL is one and a half election time-outs, rounded up to seconds.
        .args(["--heartbeat-interval", "10", "--election-timeout", "100"])
        .args(["--log-level", "error", "--logger", "zap"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd starts")
}

fn end(mut process: Child) {
    process.kill().expect("it is our child");
    process.wait().expect("it is our child");
}
