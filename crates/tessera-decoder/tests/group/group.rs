//! Starts, kills and asks decoder processes. A process is a thread with a runtime of its own; killing it
//! drops everything it runs, without a word to anyone.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tessera_cluster::{ActiveRecord, ClusterName, GroupName, Keys, Record};
use tessera_decoder::{DecoderConfig, DecoderError};
use tessera_membership::{
    ClusterAddress, EmbeddedConfig, EmbeddedStore, Store, StoreConfig, StoreEndpoint,
};
use tessera_model::{ModelSource, WeightSource};
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::decoder_client::DecoderClient;
use tessera_proto::decoder::v1::generate_response::Message;
use tessera_types::SamplingParams;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::{Status, Streaming};

/// Far beyond what anything here takes; a test that reaches it is stuck.
pub const TIMEOUT: Duration = Duration::from_secs(60);
const CLUSTER: &str = "test";
const GROUP: &str = "g0";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// A process of the group.
struct Process {
    runtime: Option<Runtime>,
    shutdown: Option<oneshot::Sender<()>>,
    result: mpsc::Receiver<Result<(), DecoderError>>,
}

/// A group, its store, and where its slots' locks are.
pub struct Group {
    store_runtime: Runtime,
    store: Option<EmbeddedStore>,
    endpoint: StoreEndpoint,
    configs: Vec<DecoderConfig>,
    processes: Vec<Option<Process>>,
    dying: Vec<JoinHandle<()>>,
    _state_dir: TempDir,
}

impl Group {
    /// `tp` ranks, `ranks_per_process` in each process; returns when the group serves.
    pub fn start(tp: u32, ranks_per_process: u32) -> Self {
        Self::start_with(tp, ranks_per_process, |_| {})
    }

    pub fn start_with(tp: u32, ranks_per_process: u32, edit: impl Fn(&mut DecoderConfig)) -> Self {
        let store_runtime = runtime();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let store = store_runtime
            .block_on(EmbeddedStore::bind(listen, EmbeddedConfig::default()))
            .expect("the store starts");
        let endpoint = StoreEndpoint::from(store.local_addr());
        let state_dir = tempfile::tempdir().expect("a directory");
        let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny");
        let config = |slot| {
            let mut config = DecoderConfig {
                group: GROUP.into(),
                slot,
                tp,
                ranks_per_process,
                state_dir: state_dir.path().into(),
                kv_cache_bytes: 32 << 20,
                cluster: ClusterAddress { name: CLUSTER.into(), endpoints: vec![endpoint.clone()] },
                model: ModelSource {
                    name: "tiny".into(),
                    weights: WeightSource::Checkpoint(fixture.clone()),
                    directory: fixture.clone(),
                },
                ..DecoderConfig::default()
            };
            edit(&mut config);
            config
        };
        let configs: Vec<_> = (0..tp / ranks_per_process).map(config).collect();
        let processes = configs.iter().map(|_| None).collect();
        let mut group = Self {
            store_runtime,
            store: Some(store),
            endpoint,
            configs,
            processes,
            dying: Vec::new(),
            _state_dir: state_dir,
        };
        (0..group.configs.len()).for_each(|slot| group.restart(slot));
        group.client().wait_for_epoch_after(0);
        group
    }

    /// Starts the process of a slot.
    pub fn restart(&mut self, slot: usize) {
        let runtime = runtime();
        let (shutdown, asked) = oneshot::channel();
        let (sender, result) = mpsc::channel();
        let config = self.configs[slot].clone();
        runtime.spawn(async move {
            let asked = async {
                // A test that forgets its process wants it to go on.
                if asked.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let ended = tessera_decoder::run(config, asked).await;
            let _ = sender.send(ended);
        });
        self.processes[slot] =
            Some(Process { runtime: Some(runtime), shutdown: Some(shutdown), result });
    }

    /// The process of a slot is gone at once.
    pub fn kill(&mut self, slot: usize) {
        let mut process = self.processes[slot].take().expect("it runs");
        let runtime = process.runtime.take().expect("it runs");
        // Dropping the tasks closes every socket; joining threads may take its time.
        self.dying.push(std::thread::spawn(move || {
            runtime.shutdown_timeout(Duration::from_secs(5));
            drop(process);
        }));
    }

    /// Asks a process to leave, as a signal would.
    pub fn shut_down(&mut self, slot: usize) {
        let process = self.processes[slot].as_mut().expect("it runs");
        process.shutdown.take().expect("asked once").send(()).expect("it listens");
    }

    /// Waits for a process that was asked to leave.
    pub fn join(&mut self, slot: usize) -> Result<(), DecoderError> {
        let process = self.processes[slot].take().expect("it runs");
        process.result.recv_timeout(TIMEOUT).expect("it ends in time")
    }

    pub fn client(&self) -> Client {
        let runtime = runtime();
        let config = StoreConfig::new(vec![self.endpoint.clone()]);
        let store = runtime.block_on(Store::connect(config)).expect("a usable endpoint");
        Client { runtime, store }
    }

    /// All keys of the cluster.
    pub fn keys_in_store(&self) -> Vec<String> {
        let client = self.client();
        let snapshot = client.runtime.block_on(client.store.get_prefix("/tessera/"));
        snapshot.expect("the store answers").entries.into_iter().map(|entry| entry.key).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for mut process in self.processes.drain(..).flatten() {
            if let Some(runtime) = process.runtime.take() {
                runtime.shutdown_timeout(Duration::from_secs(5));
            }
        }
        for dying in self.dying.drain(..) {
            dying.join().expect("no panic");
        }
        if let Some(store) = self.store.take() {
            self.store_runtime.block_on(store.shutdown());
        }
    }
}

/// What a router would do, one call at a time.
pub struct Client {
    runtime: Runtime,
    store: Store,
}

/// An attempt under way.
pub struct Attempt<'a> {
    runtime: &'a Runtime,
    stream: Result<Streaming<pb::GenerateResponse>, Status>,
    /// Dropping it would tell the decoder that the router is gone.
    requests: tokio::sync::mpsc::Sender<pb::GenerateRequest>,
}

/// The first message of a greedy attempt that ignores end-of-sequence tokens.
pub fn start_of(active: &ActiveRecord, prompt: &[u32], max_tokens: u32) -> pb::Start {
    let sampling = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() };
    let text = pb::position_span::Span::TextLen(prompt.len() as u32);
    pb::Start {
        fence: Some(pb::Fence {
            cluster: CLUSTER.into(),
            group: GROUP.into(),
            epoch: active.epoch.0,
        }),
        request_id: "test".into(),
        attempt: 1,
        choice: 0,
        prompt: Some(pb::Prompt {
            token_ids: prompt.to_vec(),
            media: Vec::new(),
            positions: vec![pb::PositionSpan { span: Some(text) }],
        }),
        output_token_ids: Vec::new(),
        sampling: Some((&sampling).into()),
        effective_seed: 1,
        priority: 0,
        tenant: 0,
        remaining_ms: 0,
        age_ms: 0,
    }
}

impl Client {
    fn find_active(&self) -> Option<ActiveRecord> {
        let keys = Keys::new(ClusterName::new(CLUSTER).expect("valid"));
        let key = keys.active(&GroupName::new(GROUP).expect("valid"));
        let entry = self.runtime.block_on(self.store.get(&key)).expect("the store answers")?;
        Some(ActiveRecord::from_bytes(&entry.value).expect("a record"))
    }

    /// For services that a test brings itself.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The active record.
    pub fn active(&self) -> ActiveRecord {
        self.find_active().expect("an epoch is active")
    }

    /// Waits until a later epoch is active and its leader says that it serves.
    pub fn wait_for_epoch_after(&self, epoch: u64) -> ActiveRecord {
        let began = Instant::now();
        loop {
            if let Some(active) = self.find_active().filter(|active| active.epoch.0 > epoch)
                && self.health_at(&active.address).is_ok_and(|report| {
                    report.epoch == active.epoch.0 && report.state() == pb::GroupState::Serving
                })
            {
                return active;
            }
            assert!(began.elapsed() < TIMEOUT, "no epoch after {epoch}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn health_at(&self, address: &str) -> Result<pb::HealthResponse, String> {
        let request = pb::HealthRequest { cluster: CLUSTER.into(), group: GROUP.into() };
        self.runtime.block_on(async {
            let url = format!("http://{address}");
            let mut client = DecoderClient::connect(url).await.map_err(|e| e.to_string())?;
            let reports = client.health(request).await.map_err(|e| e.to_string())?;
            let report = reports.into_inner().message().await.map_err(|e| e.to_string())?;
            report.ok_or_else(|| "no report".to_owned())
        })
    }

    /// The first health report at an address.
    pub fn health(address: &str) -> pb::HealthResponse {
        let runtime = runtime();
        let store =
            StoreConfig::new(vec![StoreEndpoint::from(SocketAddr::from(([127, 0, 0, 1], 1)))]);
        let store = runtime.block_on(Store::connect(store)).expect("not asked");
        Self { runtime, store }.health_at(address).expect("it answers")
    }

    /// Waits until no sequence runs and every block but the canary's is free.
    pub fn wait_until_idle(&self) {
        let began = Instant::now();
        loop {
            let address = self.active().address;
            let load = self.health_at(&address).expect("it answers").load.expect("set");
            if load.running == 0 && load.waiting == 0 && load.kv_blocks_free == load.kv_blocks {
                return;
            }
            assert!(began.elapsed() < TIMEOUT, "{load:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Opens an attempt; a refusal is its end.
    pub fn generate(&self, start: pb::Start) -> Attempt<'_> {
        let (requests, receiver) = tokio::sync::mpsc::channel(4);
        let first =
            pb::GenerateRequest { message: Some(pb::generate_request::Message::Start(start)) };
        requests.try_send(first).expect("a new channel has room");
        let address = self.active().address;
        let stream = self.runtime.block_on(async {
            let url = format!("http://{address}");
            let mut client = DecoderClient::connect(url).await.expect("the leader listens");
            let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
            Ok(client.generate(requests).await?.into_inner())
        });
        Attempt { runtime: &self.runtime, stream, requests }
    }

    /// Tokens of a greedy attempt in the active epoch.
    pub fn complete(&self, prompt: &[u32], max_tokens: u32) -> Vec<u32> {
        let mut attempt = self.generate(start_of(&self.active(), prompt, max_tokens));
        let mut output = Vec::new();
        loop {
            match attempt.next().expect("it finishes") {
                Message::Tokens(tokens) => {
                    for record in tokens.records {
                        assert_eq!(record.output_index as usize, output.len());
                        output.push(record.token_id);
                    }
                }
                Message::Finished(finished) => {
                    assert_eq!(finished.num_output_tokens as usize, output.len());
                    return output;
                }
                Message::Accepted(_) | Message::MediaNeeded(_) | Message::PromptLogprobs(_) => {}
            }
        }
    }
}

impl Attempt<'_> {
    /// Sends a further message.
    pub fn send(&self, message: pb::generate_request::Message) {
        let request = pb::GenerateRequest { message: Some(message) };
        self.requests.try_send(request).expect("the decoder reads");
    }

    /// The next message.
    pub fn next(&mut self) -> Result<Message, Status> {
        let stream = match &mut self.stream {
            Ok(stream) => stream,
            Err(status) => return Err(status.clone()),
        };
        let next =
            self.runtime.block_on(async { tokio::time::timeout(TIMEOUT, stream.message()).await });
        let message = next.expect("it says something in time")?;
        message
            .and_then(|message| message.message)
            .ok_or_else(|| Status::internal("it ended early"))
    }

    /// Reads until this many tokens have come.
    pub fn wait_for_tokens(&mut self, num_tokens: usize) {
        let mut seen = 0;
        while seen < num_tokens {
            if let Message::Tokens(tokens) = self.next().expect("it runs") {
                seen += tokens.records.len();
            }
        }
    }

    /// Reads to the end.
    pub fn end(&mut self) -> Result<pb::Finished, Status> {
        loop {
            if let Message::Finished(finished) = self.next()? {
                return Ok(finished);
            }
        }
    }
}
