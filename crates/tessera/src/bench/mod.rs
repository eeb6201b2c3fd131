//! `tessera bench`: how fast the engine of this machine is, and how close to what the machine can do; how
//! fast a server answers, whoever made it.
//!
//! Every figure of the engine stands beside the limit of the machine, measured right before and after it: memory
//! bandwidth and arithmetic move within minutes on shared machines, so only adjacent pairs compare.
//!
//! Modules: [`engine`] (the real engine in this process), [`serve`] (a load generator), [`kernels`] (each
//! operation alone), [`gpu`] (the shapes that decide on a GPU), `shape` (published model
//! shapes), `work` (what a step has to read and multiply), `limits` (what the machine can do), `machine` (what it
//! is), `stats`, `random` (seeded draws), `size`, `table`, [`error`].

mod engine;
pub mod error;
mod gpu;
mod kernels;
mod limits;
mod machine;
mod random;
mod serve;
mod shape;
mod size;
mod stats;
mod table;
mod work;

use std::path::Path;

use clap::{Args, Subcommand};
use serde::Serialize;

use self::engine::EngineArgs;
use self::error::BenchError;
use self::gpu::GpuArgs;
use self::kernels::KernelsArgs;
use self::serve::ServeArgs;
use crate::error::{Error, Result};

/// Flags of `tessera bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Run the engine in this process on any model shape and compare it with the machine's limits.
    Engine(EngineArgs),
    /// Run each operation of a backend alone and compare it with its roofline.
    Kernels(KernelsArgs),
    /// Run the shapes that decide on a GPU, each beside the GPU's limits.
    Gpu(GpuArgs),
    /// Put load on an OpenAI-compatible server, or on a Tessera router by gRPC.
    Serve(Box<ServeArgs>),
}

/// Runs the benchmark and prints its figures.
pub fn bench(args: &BenchArgs) -> Result<()> {
    match &args.command {
        BenchCommand::Engine(args) => engine::run(args),
        BenchCommand::Gpu(args) => gpu::run(args),
        BenchCommand::Serve(args) => serve::run(args),
        BenchCommand::Kernels(args) => kernels::run(args),
    }
}

/// Writes a report as JSON.
///
/// # Errors
/// A file that cannot be written.
fn write_json(report: &impl Serialize, file: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report).map_err(BenchError::Json)?;
    std::fs::write(file, text + "\n")
        .map_err(|source| Error::WriteFile { path: file.to_owned(), source })
}
