//! `tessera bench gpu`: the shapes that decide on a GPU, one after the other, each as `tessera bench engine` measures it:
//! beside the bandwidth of copies and the peak of products, measured in the same minute. A rank of a group that is larger
//! than this machine runs alone, so what its sums over ranks cost is not in it.

use std::path::PathBuf;

use clap::Args;

use super::engine::{self, EngineArgs};
use crate::error::{Error, Result};

/// Flags of `tessera bench gpu`.
#[derive(Debug, Args)]
pub struct GpuArgs {
    /// cuda[:INDEX] or cuda-f32[:INDEX]; any other device runs the same measurements.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Language models; NAME/N is the share of one rank at TP N.
    #[arg(long, value_delimiter = ',', default_value = "72b/8,72b/4,7b", value_name = "SHAPE,...")]
    shapes: Vec<String>,
    /// Prompt lengths to prefill, each in one step.
    #[arg(long, value_delimiter = ',', default_value = "2048,8192", value_name = "TOKENS,...")]
    prefill: Vec<u32>,
    /// Batch sizes to decode.
    #[arg(long, value_delimiter = ',', default_value = "1,32", value_name = "SEQUENCES,...")]
    decode: Vec<u32>,
    /// Tokens in the KV cache of each sequence when its decode is measured.
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    context: u32,
    /// The shape whose vision tower is measured.
    #[arg(long, default_value = "72b", value_name = "SHAPE")]
    vision_shape: String,
    /// Images to run through it.
    #[arg(long, default_value = "1008x1008,2016x2016", value_name = "WIDTHxHEIGHT,...")]
    images: String,
    /// Layers of the language models to run instead of all.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 9, value_name = "N")]
    repeats: usize,
    /// Also write the figures as JSON, one file per shape, into this directory, which is made.
    #[arg(long, value_name = "DIRECTORY")]
    json: Option<PathBuf>,
}

/// Runs all parts. A part that fails ends the run; what was measured before is printed and written.
///
/// # Errors
/// No such device, too little memory, a wrong flag.
pub fn run(args: &GpuArgs) -> Result<()> {
    if let Some(path) = &args.json {
        std::fs::create_dir_all(path)
            .map_err(|source| Error::WriteFile { path: path.clone(), source })?;
    }
    for (name, words) in args.parts() {
        let mut part = EngineArgs::of_words(words)?;
        part.json = args.json.as_ref().map(|directory| directory.join(format!("{name}.json")));
        engine::run(&part)?;
        println!();
    }
    Ok(())
}

impl GpuArgs {
    /// Each part's name and flags.
    fn parts(&self) -> Vec<(String, Vec<String>)> {
        let list = |values: &[u32]| values.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let common = |shape: &str| {
            let mut words = vec![format!("--shape={shape}"), format!("--device={}", self.device)];
            words.push(format!("--repeats={}", self.repeats));
            words
        };
        let mut parts = Vec::new();
        for shape in &self.shapes {
            let mut words = common(shape);
            words.extend(self.layers.map(|layers| format!("--layers={layers}")));
            words.push(format!("--prefill={}", list(&self.prefill)));
            words.push(format!("--decode={}", list(&self.decode)));
            words.push(format!("--context={}", self.context));
            let longest = self.prefill.iter().copied().max().unwrap_or(1).max(self.context);
            words.push(format!("--token-budget={longest}"));
            parts.push((shape.replace('/', "-of-"), words));
        }
        let mut words = common(&self.vision_shape);
        words.push(format!("--vision={}", self.images));
        parts.push((format!("{}-tower", self.vision_shape), words));
        parts
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        gpu: GpuArgs,
    }

    #[test]
    fn every_part_is_one_that_the_engine_takes() {
        let flags = ["test", "--device", "cpu", "--layers", "2", "--repeats", "3"];
        let args = Flags::try_parse_from(flags).expect("flags that parse").gpu;
        let parts = args.parts();
        let names: Vec<_> = parts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["72b-of-8", "72b-of-4", "7b", "72b-tower"]);
        for (name, words) in parts {
            let plan = EngineArgs::of_words(words).and_then(|args| args.plan()).expect(&name);
            assert_eq!(plan.needs_engine(), name != "72b-tower");
            assert_eq!(plan.vision.len(), if name == "72b-tower" { 2 } else { 0 });
            assert_eq!(plan.repeats, 3);
        }
    }
}
