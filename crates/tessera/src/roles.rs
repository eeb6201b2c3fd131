//! Runs one role: settings in, a service until it is told to stop.

use tokio::runtime::{Builder, Runtime};

use crate::cli::CommonArgs;
use crate::error::{Error, Result};
use crate::gpus;
use crate::progress;
use crate::settings::Settings;
use crate::signals;

/// Runs a future on a fresh runtime.
pub fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    Ok(runtime()?.block_on(future))
}

fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)
}

/// `tessera router`.
pub fn router(settings: Settings, common: &CommonArgs) -> Result<()> {
    let settings = settings.share()?;
    tessera_telemetry::init_tracing(&settings.log)?;
    runtime()?.block_on(async {
        let shutdown = signals::shutdown(common.exit_with_stdin)?;
        Ok(tessera_router::run(settings.router, shutdown).await?)
    })
}

/// `tessera encoder`.
pub fn encoder(settings: Settings, common: &CommonArgs) -> Result<()> {
    let settings = settings.share()?;
    tessera_telemetry::init_tracing(&settings.log)?;
    gpus::require(settings.encoder.parse_device()?, 1)?;
    runtime()?.block_on(async {
        let shutdown = signals::shutdown(common.exit_with_stdin)?;
        Ok(tessera_encoder::run(settings.encoder, shutdown).await?)
    })
}

/// `tessera decoder`.
pub fn decoder(settings: Settings, common: &CommonArgs) -> Result<()> {
    let settings = settings.share()?;
    tessera_telemetry::init_tracing(&settings.log)?;
    gpus::require(settings.decoder.parse_device()?, settings.decoder.ranks_per_process)?;
    runtime()?.block_on(async {
        let shutdown = signals::shutdown(common.exit_with_stdin)?;
        // Under a supervisor several processes share the terminal, where bars would overwrite each other.
        match progress::bar("loading").filter(|_| !common.exit_with_stdin) {
            Some(bar) => {
                let observe = Box::new(move |progress| bar.show(progress));
                Ok(tessera_decoder::run_observed(settings.decoder, observe, shutdown).await?)
            }
            None => Ok(tessera_decoder::run(settings.decoder, shutdown).await?),
        }
    })
}
