//! `tessera`: one binary for every role. This is the only place that reads environment, flags and
//! files; services are handed checked settings.
//!
//! Modules: [`cli`] (flags), [`settings`] (defaults < file < environment < flags), [`roles`] (run one
//! role), [`up`] (a whole cluster on this machine), [`generate`] (ask a question), [`bench`] (how
//! fast it is), [`gpus`] (what is there for CUDA), [`shard`] (one file per rank), [`progress`] (a bar), [`signals`], [`error`].

mod bench;
mod cli;
mod error;
mod generate;
mod gpus;
mod progress;
mod roles;
mod settings;
mod shard;
mod signals;
mod up;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tessera: {}", error::chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}
