//! `tessera gpus`: what this machine has for the CUDA backend, and what this program brings along. Workers look at the
//! same before they load anything.

use std::fmt::Write as _;

use clap::Args;
use tessera_kernels::{CudaCheck, Device, KernelFile, UnknownDevice, cuda};

use crate::error::{Error, Result};

/// Flags of `tessera gpus`.
#[derive(Debug, Args)]
pub struct GpusArgs {
    /// List the kernels instead, as a Markdown table: what each takes of a multiprocessor.
    #[arg(long)]
    kernels: bool,
}

/// Prints libraries and GPUs, or kernels.
///
/// # Errors
/// No GPU can be used.
pub fn gpus(args: &GpusArgs) -> Result<()> {
    if args.kernels {
        print!("{}", kernel_table(cuda::kernels()));
        return Ok(());
    }
    let found = cuda::check();
    print!("{found}");
    match found.is_usable() {
        true => Ok(()),
        false => Err(Error::NoUsableGpu),
    }
}

/// The device that a flag names.
///
/// # Errors
/// A name that is no device.
pub fn parse_device(name: &str) -> Result<Device> {
    name.parse()
        .map_err(|error: UnknownDevice| Error::Flag { flag: "--device", reason: error.to_string() })
}

/// Looks for what a worker on `device` with `num_ranks` ranks needs, and logs all it finds.
///
/// # Errors
/// The first thing that is missing.
pub fn require(device: Device, num_ranks: u32) -> Result<()> {
    let Device::Cuda(device) = device else { return Ok(()) };
    let found = cuda::check();
    log(&found);
    let mut ordinals = (0..num_ranks as usize).map(|rank| device.ordinal(rank));
    ordinals.try_for_each(|ordinal| found.require(ordinal)).map_err(Error::Gpu)
}

fn log(found: &CudaCheck) {
    for line in found.to_string().lines() {
        tracing::info!("{line}");
    }
}

fn kernel_table(files: &[KernelFile]) -> String {
    let mut table = String::from(
        "| file | kernel | registers | spilled bytes (stores, loads) | stack bytes | shared bytes |\n\
         |---|---|---:|---:|---:|---:|\n",
    );
    for file in files {
        for kernel in file.kernels {
            let spills = format!("{}, {}", kernel.spill_store_bytes, kernel.spill_load_bytes);
            writeln!(
                table,
                "| {}.cu | {} | {} | {spills} | {} | {} |",
                file.name, kernel.name, kernel.registers, kernel.stack_bytes, kernel.shared_bytes
            )
            .expect("text grows");
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use tessera_kernels::KernelResources;

    use super::*;

    #[test]
    fn each_kernel_has_a_line() {
        const KERNELS: &[KernelResources] = &[KernelResources {
            name: "swiglu_bf16",
            registers: 24,
            spill_store_bytes: 4,
            spill_load_bytes: 8,
            stack_bytes: 16,
            shared_bytes: 1024,
        }];
        let file = KernelFile { name: "elements", kernels: KERNELS, image_bytes: 9 };
        let table = kernel_table(&[file]);
        assert_eq!(
            table.lines().last(),
            Some("| elements.cu | swiglu_bf16 | 24 | 4, 8 | 16 | 1024 |")
        );
    }
}
