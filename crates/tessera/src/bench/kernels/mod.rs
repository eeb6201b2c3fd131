//! `tessera bench kernels`: each operation of a backend against its roofline, the limits measured before and
//! after every run.
//!
//! Modules: `args` (flags), [`bed`] (a backend with slots, and the loop that measures), `gemm`, `paged` (attention
//! over the KV cache, rotation and KV write), `vision` (attention without a cache), `rows` (norms, sampling),
//! `report`.

mod args;
mod bed;
mod gemm;
mod paged;
mod report;
mod rows;
mod vision;

use tessera_kernels::{Backend, CpuBackend, Device, ReferenceBackend, cuda};

pub use self::args::KernelsArgs;

use self::args::{Group, Plan};
use self::bed::Maker;
use self::report::Report;
use super::error::BenchError;
use super::limits::LimitMeter;
use crate::error::Result;

/// Runs the groups that the flags name; each row is printed when it is done.
pub fn run(args: &KernelsArgs) -> Result<()> {
    let plan = args.plan()?;
    let mut report = Report::new(&plan);
    report.print_head();
    let meter = LimitMeter::new(plan.device, plan.threads)?;
    let threads = plan.threads;
    match plan.device {
        Device::Reference => {
            run_groups(&plan, &meter, &|| Ok(ReferenceBackend::new()), &mut report)?;
        }
        Device::Cpu(format) => {
            run_groups(&plan, &meter, &move || CpuBackend::new(threads, format), &mut report)?;
        }
        Device::Cuda(device) => {
            let make = move || cuda::open(&device.options(0, false));
            run_groups(&plan, &meter, &make, &mut report)?;
        }
    }
    match &args.json {
        Some(file) => report.write(file),
        None => Ok(()),
    }
}

fn run_groups<B: Backend>(
    plan: &Plan,
    meter: &LimitMeter,
    make: Maker<'_, B>,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    for group in &plan.groups {
        match group {
            Group::Gemm => gemm::run(plan, meter, make, report)?,
            Group::Attention => paged::attention(plan, meter, make, report)?,
            Group::Rope => paged::rope(plan, meter, make, report)?,
            Group::Vision => vision::run(plan, meter, make, report)?,
            Group::Norm => rows::norm(plan, meter, make, report)?,
            Group::Sampling => rows::sampling(plan, meter, make, report)?,
        }
    }
    Ok(())
}
