//! Flags of `tessera bench kernels`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;
use tessera_kernels::Device;

use crate::bench::limits::device_as_text;
use crate::bench::shape::Shape;
use crate::bench::size::ImageSize;
use crate::error::{Error, Result};
use crate::gpus::parse_device;

/// Flags of `tessera bench kernels`.
#[derive(Debug, Clone, Args)]
pub struct KernelsArgs {
    /// Model whose kernels are measured: 3b, 7b, 72b, tiny, or the path of a config.json.
    #[arg(long, default_value = "3b", value_name = "SHAPE")]
    shape: String,
    /// What computes: reference (f32, slow), cpu (SIMD, BF16 weights), cpu-f32, cuda[:0,1,...] (BF16) or cuda-f32[:0,1,...].
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Default: the cores of this machine.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Groups of kernels; default: all.
    #[arg(long, value_delimiter = ',', value_enum, value_name = "GROUP,...")]
    only: Vec<Group>,
    /// Rows of products, norms and rotations.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2,4,8,16,64,512",
        value_name = "ROWS,..."
    )]
    rows: Vec<u32>,
    /// Tokens in the KV cache that attention reads.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096", value_name = "TOKENS,...")]
    contexts: Vec<u32>,
    /// Image whose patches attend to each other.
    #[arg(long, default_value = "1008x1008", value_name = "WIDTHxHEIGHT")]
    image: ImageSize,
    /// Runs of each kernel, each with the machine's limits measured beside it.
    #[arg(long, default_value_t = 9, value_name = "N")]
    repeats: usize,
    /// Also write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Kernels that are measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The linears of a layer and the head.
    Gemm,
    /// Attention over the paged KV cache, decode and prefill.
    Attention,
    /// Rotation and KV write.
    Rope,
    /// Attention of the vision tower, in windows and over a whole frame.
    Vision,
    Norm,
    Sampling,
}

/// The flags, checked and completed.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    #[serde(skip)]
    pub shape: Shape,
    #[serde(serialize_with = "device_as_text")]
    pub device: Device,
    pub threads: usize,
    pub groups: Vec<Group>,
    pub rows: Vec<u32>,
    pub contexts: Vec<u32>,
    pub image: ImageSize,
    pub repeats: usize,
}

impl KernelsArgs {
    /// Checks the flags and fills in what depends on the machine.
    ///
    /// # Errors
    /// Names the flag.
    pub fn plan(&self) -> Result<Plan> {
        let lists = [("--rows", &self.rows), ("--contexts", &self.contexts)];
        let is_wrong = |list: &[u32]| list.is_empty() || list.contains(&0);
        let wrong_list = lists.iter().find(|(_, list)| is_wrong(list)).map(|(flag, _)| *flag);
        let wrong_number = (self.repeats == 0).then_some("--repeats");
        let wrong_threads = (self.threads == Some(0)).then_some("--threads");
        if let Some(flag) = wrong_list.or(wrong_number).or(wrong_threads) {
            return Err(Error::Flag { flag, reason: "must be at least 1".into() });
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Plan {
            shape: Shape::load(&self.shape, None)?,
            device: parse_device(&self.device)?,
            threads: self.threads.unwrap_or_else(cores),
            groups: match self.only.is_empty() {
                true => Group::value_variants().to_vec(),
                false => self.only.clone(),
            },
            rows: self.rows.clone(),
            contexts: self.contexts.clone(),
            image: self.image,
            repeats: self.repeats,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        kernels: KernelsArgs,
    }

    fn plan(flags: &[&str]) -> Result<Plan> {
        let all = ["test"].iter().chain(flags);
        Flags::try_parse_from(all).expect("flags that parse").kernels.plan()
    }

    #[test]
    fn all_groups_are_measured_unless_some_are_named() {
        assert_eq!(plan(&[]).expect("a plan").groups.len(), Group::value_variants().len());
        let some = plan(&["--only", "norm,gemm", "--rows", "3"]).expect("a plan");
        assert_eq!((some.groups, some.rows), (vec![Group::Norm, Group::Gemm], vec![3]));
    }

    #[test]
    fn zeros_are_refused_by_flag() {
        for flag in ["--rows", "--contexts", "--repeats", "--threads"] {
            let error = plan(&[flag, "0"]).expect_err(flag);
            assert!(error.to_string().starts_with(flag), "{error}");
        }
    }
}
