//! `tessera bench serve`: load on any OpenAI-compatible server, or on a Tessera router by gRPC.
//!
//! In an open loop every latency counts from the moment at which the request was meant to leave, so that a
//! slow server can't hide its queue by slowing down its client. The client reports its own CPU use and
//! how late it was.
//!
//! Modules: `args` (flags), `length` (distributions), `workload` (what is asked), `pictures` (images made in
//! memory), `arrivals` (when), [`client`] (one request, by HTTP or gRPC), `load` (all of them), `observe` (the
//! client's own health), `report`.

mod args;
mod arrivals;
mod client;
mod length;
mod load;
mod observe;
mod pictures;
mod report;
mod workload;

pub use self::args::ServeArgs;

use self::client::Client;
use self::report::Report;
use crate::error::Result;
use crate::roles;

/// Puts the load on the server and prints what came of it.
pub fn run(args: &ServeArgs) -> Result<()> {
    let plan = args.plan()?;
    let report = roles::block_on(async {
        let client = Client::connect(&plan).await?;
        let outcome = load::run(&plan, client).await?;
        Ok::<_, crate::error::Error>(Report::new(&plan, outcome))
    })??;
    report.print();
    match &args.json {
        Some(file) => report.write(file),
        None => Ok(()),
    }
}
