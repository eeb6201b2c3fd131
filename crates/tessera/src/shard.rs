//! `tessera shard`: a checkpoint as one file per rank, which loads in one go from first byte to last.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use tessera_model::{LoadProgress, ModelError, ShardJob, write_shards};

use crate::error::{Error, Result};
use crate::{progress, roles, signals};

/// Flags of `tessera shard`.
#[derive(Debug, Clone, Args)]
pub struct ShardArgs {
    /// Model directory in Hugging Face layout.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Tensor-parallel degree of the groups that will load it.
    #[arg(long)]
    tp: u32,
    /// Directory to write; it must not exist or be empty, and appears when it is complete.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Writes the files; a signal ends the work and leaves nothing behind.
pub fn shard(args: &ShardArgs) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let (args, seen) = (args.clone(), Arc::clone(&interrupted));
    roles::block_on(async move {
        let shutdown = signals::shutdown(false)?;
        let mut writer = tokio::task::spawn_blocking(move || write(&args, &seen));
        let written = tokio::select! {
            written = &mut writer => written,
            () = shutdown => {
                interrupted.store(true, Ordering::Relaxed);
                writer.await
            }
        };
        written.expect("the writer does not panic").map_err(Error::Shard)
    })?
}

fn write(args: &ShardArgs, interrupted: &AtomicBool) -> Result<(), ModelError> {
    let bar = progress::bar("writing");
    let observe = |progress: LoadProgress| {
        bar.iter().for_each(|bar| bar.show(progress));
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    write_shards(&ShardJob { model: &args.model, tp: args.tp, out: &args.out }, &observe)
}
