//! `tessera up`: a whole cluster on this machine. Router, encoders and every rank's process are
//! children that are restarted when they die; membership is an embedded store unless told otherwise.
//! Children use the same client path as on a real cluster.

mod child;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use futures::future::{join_all, select_all};
use tessera_kernels::Device;
use tessera_membership::{EmbeddedConfig, EmbeddedStore};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::cli::CommonArgs;
use crate::error::{Error, Result};
use crate::generate::{GenerateArgs, generate};
use crate::gpus::{self, parse_device};
use crate::signals;
use child::{ChildSpec, Supervised};

/// Between SIGTERM and SIGKILL for each child.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// The committed fixture, looked for beside the working directory and the program.
const FIXTURE: &str = "tests/fixtures/tiny";

/// Flags of `tessera up`.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Tensor-parallel degree of each decoder group.
    #[arg(long, default_value_t = 2)]
    pub tp: u32,
    /// Ranks in each decoder process.
    #[arg(long, default_value_t = 1)]
    pub ranks_per_process: u32,
    /// Encoder processes.
    #[arg(long, default_value_t = 1)]
    pub encoders: u32,
    /// Decoder groups.
    #[arg(long, default_value_t = 1)]
    pub groups: u32,
    /// What computes: reference (f32, slow), cpu (SIMD, BF16 weights), cpu-f32, cuda[:0,1,...] (BF16) or cuda-f32[:0,1,...].
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Address of the OpenAI-compatible HTTP server.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub http: SocketAddr,
    /// Address of the gRPC server.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub grpc: SocketAddr,
    /// Ask this once the cluster is ready, then stay up.
    #[arg(long, value_name = "QUESTION")]
    pub ask: Option<String>,
    /// Image for --ask.
    #[arg(long, value_name = "FILE", requires = "ask")]
    pub image: Option<PathBuf>,
    /// How long the cluster may take to become ready before `up` says so (it keeps trying).
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub ready_timeout: u64,
}

/// Runs until SIGINT or SIGTERM; then stops router, groups, encoders and store, in this order.
pub async fn up(args: UpArgs) -> Result<()> {
    check(&args)?;
    let settings = args.common.settings(Vec::new())?;
    tessera_telemetry::init_tracing(&settings.log)?;
    let device = parse_device(&args.device)?;
    gpus::require(device, args.groups * args.tp)?;
    let shutdown = signals::shutdown(args.common.exit_with_stdin)?;
    let model = model_dir(&settings.model)?;
    let (store, membership) =
        store(args.common.membership.as_deref().unwrap_or("embedded")).await?;
    let layout = Layout {
        program: std::env::current_exe().map_err(Error::OwnProgram)?,
        shared: shared_args(&args, &model, &membership),
        device,
        state: StateDir::create()?,
        args: &args,
    };
    let start =
        |specs: Vec<ChildSpec>| specs.into_iter().map(Supervised::start).collect::<Vec<_>>();
    let encoders = start(layout.encoders());
    let groups = start(layout.decoders());
    let router = start(vec![layout.router()]);
    eprintln!("tessera: starting (model {}, membership {membership})", model.display());

    tokio::pin!(shutdown);
    let children: Vec<&Supervised> = encoders.iter().chain(&groups).chain(&router).collect();
    let result = tokio::select! {
        () = &mut shutdown => Ok(()),
        // Only until the first time everything works; from then on children are restarted for ever.
        name = any_hopeless(&children) => Err(Error::Child { name }),
        result = announce(&args) => {
            if let Err(error) = result {
                eprintln!("tessera: {}", crate::error::chain(&error));
            }
            shutdown.await;
            Ok(())
        }
    };
    for tier in [router, groups, encoders] {
        join_all(tier.into_iter().map(Supervised::stop)).await;
    }
    if let Some(store) = store {
        store.shutdown().await;
    }
    result
}

/// Name of the first child that will never start.
async fn any_hopeless(children: &[&Supervised]) -> String {
    select_all(children.iter().map(|child| Box::pin(child.hopeless()))).await.0
}

fn check(args: &UpArgs) -> Result<()> {
    let at_least_one = [
        ("--tp", args.tp),
        ("--groups", args.groups),
        ("--ranks-per-process", args.ranks_per_process),
    ];
    for (flag, value) in at_least_one {
        if value == 0 {
            return Err(Error::Flag { flag, reason: "must be at least 1".into() });
        }
    }
    if !args.tp.is_multiple_of(args.ranks_per_process) {
        let reason =
            format!("{} ranks do not divide into processes of {}", args.tp, args.ranks_per_process);
        return Err(Error::Flag { flag: "--ranks-per-process", reason });
    }
    Ok(())
}

/// The directory that was asked for, else the committed fixture.
fn model_dir(asked: &Path) -> Result<PathBuf> {
    if !asked.as_os_str().is_empty() {
        return Ok(asked.to_owned());
    }
    let beside_program = std::env::current_exe().map_err(Error::OwnProgram)?;
    let roots = std::iter::once(Path::new(".")).chain(beside_program.ancestors());
    roots.map(|root| root.join(FIXTURE)).find(|dir| dir.join("config.json").is_file()).ok_or_else(
        || Error::Flag {
            flag: "--model",
            reason: format!("missing, and the fixture {FIXTURE} is not nearby"),
        },
    )
}

/// Starts the embedded store, or checks that an etcd was named.
async fn store(membership: &str) -> Result<(Option<EmbeddedStore>, String)> {
    if membership != "embedded" {
        return Ok((None, membership.to_owned()));
    }
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let store = EmbeddedStore::bind(listen, EmbeddedConfig::default()).await?;
    let url = format!("etcd://{}", store.local_addr());
    Ok((Some(store), url))
}

/// Flags that every child gets.
fn shared_args(args: &UpArgs, model: &Path, membership: &str) -> Vec<OsString> {
    let common = &args.common;
    let mut shared: Vec<OsString> = vec!["--exit-with-stdin".into()];
    let mut flag = |name: &str, value: &OsString| shared.extend([name.into(), value.clone()]);
    flag("--model", &model.into());
    flag("--membership", &membership.into());
    let texts = [
        ("--cluster", &common.cluster),
        ("--model-name", &common.model_name),
        ("--weights", &common.weights),
        ("--log", &common.log),
    ];
    for (name, value) in texts {
        if let Some(value) = value {
            flag(name, &value.into());
        }
    }
    common.set.iter().for_each(|pair| flag("--set", &pair.into()));
    if let Some(config) = &common.config {
        flag("--config", &config.into());
    }
    shared
}

/// Directory for slot locks; gone with the supervisor.
struct StateDir(PathBuf);

impl StateDir {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tessera-up-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .map_err(|source| Error::ReadFile { path: path.clone(), source })?;
        Ok(Self(path))
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // A leftover of empty lock files harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Turns the flags of `up` into children.
struct Layout<'a> {
    program: PathBuf,
    shared: Vec<OsString>,
    state: StateDir,
    device: Device,
    args: &'a UpArgs,
}

impl Layout<'_> {
    fn child(&self, name: String, role: &str, flags: &[(&str, String)]) -> ChildSpec {
        let mut args: Vec<OsString> = vec![role.into()];
        args.extend(self.shared.iter().cloned());
        for (flag, value) in flags {
            args.extend([OsString::from(*flag), value.into()]);
        }
        ChildSpec { name, program: self.program.clone(), args, stop_grace: STOP_GRACE }
    }

    /// Ranks of all groups share the cores; each has one at least.
    fn threads_per_rank(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / (self.args.tp * self.args.groups) as usize).max(1)
    }

    fn router(&self) -> ChildSpec {
        let flags =
            [("--http", self.args.http.to_string()), ("--grpc", self.args.grpc.to_string())];
        self.child("router".into(), "router", &flags)
    }

    fn encoders(&self) -> Vec<ChildSpec> {
        (0..self.args.encoders)
            .map(|n| {
                let flags = self.encoder_device(n).map(|device| ("--device", device));
                self.child(format!("encoder {n}"), "encoder", flags.as_slice())
            })
            .collect()
    }

    /// With GPUs, encoders use them too; on a CPU theirs is a setting of its own.
    fn encoder_device(&self, encoder: u32) -> Option<String> {
        let Device::Cuda(device) = self.device else { return None };
        let is_set = |pair: &String| pair.starts_with("encoder.device=");
        let named = self.args.common.set.iter().any(is_set);
        (!named).then(|| Device::Cuda(device.part(encoder as usize, 1)).to_string())
    }

    /// Processes take GPUs one after another, or those listed.
    fn decoder_device(&self, group: u32, slot: u32) -> String {
        let num_ranks = self.args.ranks_per_process as usize;
        let first = (group * self.args.tp) as usize + slot as usize * num_ranks;
        match self.device {
            Device::Cuda(device) => Device::Cuda(device.part(first, num_ranks)).to_string(),
            device => device.to_string(),
        }
    }

    fn decoders(&self) -> Vec<ChildSpec> {
        let slots = self.args.tp / self.args.ranks_per_process;
        let places =
            (0..self.args.groups).flat_map(|group| (0..slots).map(move |slot| (group, slot)));
        places
            .map(|(group, slot)| {
                let flags = [
                    ("--group", format!("g{group}")),
                    ("--slot", slot.to_string()),
                    ("--tp", self.args.tp.to_string()),
                    ("--ranks-per-process", self.args.ranks_per_process.to_string()),
                    ("--device", self.decoder_device(group, slot)),
                    ("--threads", self.threads_per_rank().to_string()),
                    ("--state-dir", self.state.0.display().to_string()),
                ];
                self.child(format!("decoder g{group}/{slot}"), "decoder", &flags)
            })
            .collect()
    }
}

/// Waits until a request would succeed, says so, and asks the question if there is one.
async fn announce(args: &UpArgs) -> Result<()> {
    let started = Instant::now();
    let endpoint = format!("http://{}", args.grpc);
    let limit = Duration::from_secs(args.ready_timeout);
    if tokio::time::timeout(limit, serving(&endpoint)).await.is_err() {
        eprintln!("tessera: {}", Error::NotReady { seconds: args.ready_timeout });
        serving(&endpoint).await;
    }
    eprintln!(
        "tessera: ready after {:.1} s: OpenAI API on http://{}/v1, gRPC on {}",
        started.elapsed().as_secs_f64(),
        args.http,
        args.grpc
    );
    let Some(question) = &args.ask else { return Ok(()) };
    if let Some(image) = &args.image {
        eprintln!("tessera: asking about {}: {question}", image.display());
    }
    let question = GenerateArgs {
        question: question.clone(),
        images: args.image.clone().into_iter().collect(),
        frames: Vec::new(),
        fps: None,
        system: None,
        endpoint,
        max_tokens: Some(48),
        temperature: None,
        top_p: None,
        seed: None,
    };
    generate(&question).await?;
    eprintln!("tessera: staying up; Ctrl-C stops everything");
    Ok(())
}

/// Returns once the router's health service says that it serves.
async fn serving(endpoint: &str) {
    loop {
        if let Ok(endpoint) = Endpoint::from_shared(endpoint.to_owned())
            && let Ok(channel) = endpoint.connect_timeout(Duration::from_secs(1)).connect().await
        {
            let request = HealthCheckRequest { service: String::new() };
            let reply = HealthClient::new(channel).check(request).await;
            if reply.is_ok_and(|reply| reply.get_ref().status() == ServingStatus::Serving) {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
