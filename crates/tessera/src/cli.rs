//! Flags. Only settings that people set by hand have a flag of their own; `--set` reaches the rest.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use figment::value::Value;

use crate::bench::{BenchArgs, bench};
use crate::error::{Error, Result};
use crate::generate::{GenerateArgs, generate};
use crate::gpus::{GpusArgs, gpus};
use crate::roles;
use crate::settings::{Settings, parse_value};
use crate::shard::{ShardArgs, shard};
use crate::up::{UpArgs, up};

/// Serves Qwen2.5-VL on a cluster.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole cluster on this machine: router, encoders and decoder groups.
    Up(UpArgs),
    /// Run a router: gRPC and OpenAI-compatible HTTP for clients.
    Router(RouterArgs),
    /// Run an encoder worker: media in, embeddings out.
    Encoder(EncoderArgs),
    /// Run one process of a decoder group.
    Decoder(DecoderArgs),
    /// Ask one question and stream the answer to the terminal.
    Generate(GenerateArgs),
    /// Measure the engine of this machine, or a server.
    Bench(BenchArgs),
    /// Show what this machine has for the CUDA backend: libraries, GPUs, what is missing.
    Gpus(GpusArgs),
    /// Write a checkpoint as one file per rank, for fast restarts.
    Shard(ShardArgs),
    /// Print all settings with their values, as a file that --config reads.
    Config(CommonArgs),
}

/// Flags that every role takes.
#[derive(Debug, Clone, Default, Args)]
pub struct CommonArgs {
    /// Settings file (TOML); `tessera config` prints one with every setting.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Any setting, for example --set router.limits.max_choices=4; repeat for more.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Name of the cluster in the store.
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Where membership lives: etcd://host:port[,host:port...]
    #[arg(long, value_name = "URL")]
    pub membership: Option<String>,
    /// Model directory in Hugging Face layout.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Name that clients use for the model; default: the directory's name.
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// `checkpoint`, or `random:SEED` for random weights of the model's shape.
    #[arg(long, value_name = "SOURCE")]
    pub weights: Option<String>,
    /// Log directives, for example info,tessera_router=debug.
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// End when standard input ends: a supervisor's lifeline.
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

/// Flags of `tessera router`.
#[derive(Debug, Args)]
struct RouterArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Address of the OpenAI-compatible HTTP server.
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Address of the gRPC server.
    #[arg(long, value_name = "ADDR")]
    grpc: Option<SocketAddr>,
    /// Address of /metrics, /livez and /readyz.
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
}

/// Flags of `tessera encoder`.
#[derive(Debug, Args)]
struct EncoderArgs {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    worker: WorkerArgs,
}

/// Flags that encoders and decoders share.
#[derive(Debug, Args)]
struct WorkerArgs {
    /// gRPC address; port 0 takes any free one.
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// host:port under which others reach this process; default: the bound address.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Address of /metrics, /livez and /readyz.
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    /// What computes: reference (f32, slow), cpu (SIMD, BF16 weights), cpu-f32, cuda[:0,1,...] (BF16) or cuda-f32[:0,1,...].
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Threads of each rank, or of the vision tower; default: the cores this process finds.
    #[arg(long)]
    threads: Option<u32>,
}

/// Flags of `tessera decoder`.
#[derive(Debug, Args)]
struct DecoderArgs {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    worker: WorkerArgs,
    /// Name of the decoder group.
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Which contiguous run of ranks this process holds; slot 0 leads.
    #[arg(long)]
    slot: Option<u32>,
    /// Tensor-parallel degree of the group.
    #[arg(long)]
    tp: Option<u32>,
    /// Ranks in each process of the group.
    #[arg(long)]
    ranks_per_process: Option<u32>,
    /// Directory of the slot's lock, shared by successive processes of a slot on one host.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Cli {
    /// Runs the command to its end.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Up(args) => roles::block_on(up(args))?,
            Command::Router(args) => {
                roles::router(args.common.settings(args.flags())?, &args.common)
            }
            Command::Encoder(args) => {
                roles::encoder(args.common.settings(args.worker.flags("encoder"))?, &args.common)
            }
            Command::Decoder(args) => {
                roles::decoder(args.common.settings(args.flags())?, &args.common)
            }
            Command::Generate(args) => roles::block_on(async move { generate(&args).await })?,
            Command::Bench(args) => bench(&args),
            Command::Gpus(args) => gpus(&args),
            Command::Shard(args) => shard(&args),
            Command::Config(common) => {
                print!("{}", common.settings(Vec::new())?.to_toml()?);
                Ok(())
            }
        }
    }
}

/// Dotted keys with values, as [`Settings::load`] takes them.
type Flags = Vec<(String, Value)>;

/// Adds `key` if the flag was given.
fn push<T: ToString>(flags: &mut Flags, key: impl Into<String>, value: &Option<T>) {
    if let Some(value) = value {
        flags.push((key.into(), Value::from(value.to_string())));
    }
}

fn push_number(flags: &mut Flags, key: &str, value: Option<u32>) {
    if let Some(value) = value {
        flags.push((key.into(), Value::from(value)));
    }
}

impl CommonArgs {
    /// Settings of this process: the file, the environment, these flags, then `flags` of the role.
    pub fn settings(&self, flags: Flags) -> Result<Settings> {
        let mut all = Vec::new();
        for pair in &self.set {
            let (key, value) = pair.split_once('=').ok_or_else(|| Error::Flag {
                flag: "--set",
                reason: format!("{pair:?} is not KEY=VALUE"),
            })?;
            all.push((key.to_owned(), parse_value(value)));
        }
        push(&mut all, "cluster", &self.cluster);
        push(&mut all, "membership", &self.membership);
        push(&mut all, "model", &self.model.as_ref().map(|path| path.display()));
        push(&mut all, "model_name", &self.model_name);
        push(&mut all, "weights", &self.weights);
        push(&mut all, "log.filter", &self.log);
        all.extend(flags);
        Settings::load(self.config.as_deref(), all)
    }
}

impl RouterArgs {
    fn flags(&self) -> Flags {
        let mut flags = Vec::new();
        push(&mut flags, "router.http.listen", &self.http);
        push(&mut flags, "router.grpc.listen", &self.grpc);
        push(&mut flags, "router.admin.listen", &self.admin);
        flags
    }
}

impl WorkerArgs {
    fn flags(&self, section: &str) -> Flags {
        let mut flags = Vec::new();
        push(&mut flags, format!("{section}.listen"), &self.listen);
        push(&mut flags, format!("{section}.advertise"), &self.advertise);
        push(&mut flags, format!("{section}.admin.listen"), &self.admin);
        push(&mut flags, format!("{section}.device"), &self.device);
        push_number(&mut flags, &format!("{section}.threads"), self.threads);
        flags
    }
}

impl DecoderArgs {
    fn flags(&self) -> Flags {
        let mut flags = self.worker.flags("decoder");
        push(&mut flags, "decoder.group", &self.group);
        push_number(&mut flags, "decoder.slot", self.slot);
        push_number(&mut flags, "decoder.tp", self.tp);
        push_number(&mut flags, "decoder.ranks_per_process", self.ranks_per_process);
        push(&mut flags, "decoder.state_dir", &self.state_dir.as_ref().map(|path| path.display()));
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_set_flag_without_a_value_is_refused() {
        let common = CommonArgs { set: vec!["cluster".into()], ..CommonArgs::default() };
        let error = common.settings(Vec::new()).expect_err("no value");
        assert!(error.to_string().contains("KEY=VALUE"), "{error}");
    }
}
