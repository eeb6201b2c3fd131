//! `tessera`: one binary for every role. This is the only place that reads environment, flags and
//! files; services are handed checked settings.
//!
//! Modules: [`cli`] (flags), [`settings`] (defaults < file < environment < flags), [`roles`] (run one
//! role), [`up`] (a whole cluster on this machine), [`generate`] (ask a question), [`bench`] (how
//! fast it is), [`signals`], [`error`].

mod bench;
mod cli;
mod error;
mod generate;
mod roles;
mod settings;
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
