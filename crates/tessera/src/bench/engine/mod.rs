//! `tessera bench engine`: the real engine, in this process, on any shape.
//!
//! Modules: `args` (flags), [`harness`] (an engine with local ranks, and what its sequences report), `measure`
//! (prefill, decode), `mixed` (a long prompt beside running sequences), `continuous` (closed loop), `vision`
//! (the tower alone), `report`.

mod args;
mod continuous;
mod harness;
mod measure;
mod mixed;
mod report;
mod vision;

use std::time::Instant;

pub use self::args::EngineArgs;

use self::harness::Harness;
use self::measure::Bench;
use self::report::Report;
use super::limits::LimitMeter;
use crate::error::Result;

/// Runs what the flags ask for. Each section is printed, and the report written, when it is done, so that an
/// interrupted run keeps what it has.
pub fn run(args: &EngineArgs) -> Result<()> {
    let plan = args.plan()?;
    let mut report = Report::new(&plan);
    report.print_head();
    let save = |report: &Report<'_>| args.json.as_ref().map_or(Ok(()), |file| report.write(file));
    let meter = LimitMeter::new(plan.device, plan.total_threads())?;
    // The tower first, so that it and the language model are never held at once.
    vision::run(&plan, &meter, &mut report)?;
    save(&report)?;
    if plan.needs_engine() {
        let started = Instant::now();
        let harness = Harness::start(&plan)?;
        report.loaded(started.elapsed());
        let mut bench = Bench::new(&plan, &harness, &meter);
        bench.prefill(&mut report)?;
        save(&report)?;
        bench.decode(&mut report)?;
        save(&report)?;
        mixed::run(&bench, &mut report)?;
        save(&report)?;
        continuous::run(&bench, &mut report)?;
        save(&report)?;
    }
    Ok(())
}
