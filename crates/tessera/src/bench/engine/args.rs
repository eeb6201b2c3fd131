//! Flags of `tessera bench engine`, and what they come to.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, FromArgMatches};
use serde::Serialize;
use tessera_kernels::{DType, Device};
use tessera_model::WeightSource;
use tessera_scheduler::SchedulerConfig;

use crate::bench::limits::{device_as_text, dtype_of};
use crate::bench::shape::Shape;
use crate::bench::size::ImageSize;
use crate::error::{Error, Result};
use crate::gpus::parse_device;

/// Tokens after which a run of decode steps has settled.
pub const SETTLE_TOKENS: u32 = 2;

/// Without any of --prefill, --decode, --mixed, --vision and --continuous: prefill of 512 and decode of 1, 4, 8
/// and 16.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// 3b, 7b, 72b, tiny, or the path of a config.json; 72b/8 is the share of one rank at TP 8, without the sums.
    #[arg(long, default_value = "3b", value_name = "SHAPE")]
    shape: String,
    /// Layers of the language model to run instead of all, so that a sample of a large shape fits.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// `random:SEED`, or `checkpoint` for the weights beside the shape's config.json.
    #[arg(long, default_value = "random:1", value_name = "SOURCE")]
    weights: String,
    /// What computes: reference (f32, slow), cpu (SIMD, BF16 weights), cpu-f32, cuda[:0,1,...] (BF16) or cuda-f32[:0,1,...].
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads of each rank; default: the cores divided by the ranks.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tensor-parallel degree, with a thread per rank in this process.
    #[arg(long, default_value_t = 1, value_name = "N")]
    tp: u32,
    /// Prompt lengths to prefill.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS,...")]
    prefill: Vec<u32>,
    /// Batch sizes to decode.
    #[arg(long, value_delimiter = ',', value_name = "SEQUENCES,...")]
    decode: Vec<u32>,
    /// Tokens in the KV cache of each sequence when its decode is measured.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    context: u32,
    /// Steps of one decode run.
    #[arg(long, default_value_t = 8, value_name = "STEPS")]
    steps: u32,
    /// Prefill a long prompt while this many sequences decode.
    #[arg(long, value_name = "SEQUENCES", num_args = 0..=1, default_missing_value = "4")]
    mixed: Option<u32>,
    /// Length of that prompt.
    #[arg(long, default_value_t = 4000, value_name = "TOKENS")]
    mixed_prompt: u32,
    /// Images, in pixels, to run through the vision tower alone.
    #[arg(long, value_delimiter = ',', value_name = "WIDTHxHEIGHT,...")]
    vision: Vec<ImageSize>,
    /// Requests at a time in a closed loop, for throughput.
    #[arg(long, value_delimiter = ',', value_name = "REQUESTS,...")]
    continuous: Vec<u32>,
    /// Prompt of each request of the closed loop.
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    continuous_prompt: u32,
    /// Mean output of each; drawn between half and one and a half of it.
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    continuous_output: u32,
    /// Length of one window in which throughput is counted.
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    continuous_window: f64,
    /// Tokens computed in one step.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    token_budget: u32,
    /// Steps in flight: 1 or 2.
    #[arg(long, default_value_t = 2, value_name = "STEPS")]
    pipeline_depth: u32,
    /// Tokens per KV block.
    #[arg(long, default_value_t = 16, value_name = "TOKENS")]
    block_size: u32,
    /// Runs of each measurement, each with the machine's limits measured beside it.
    #[arg(long, default_value_t = 9, value_name = "N")]
    repeats: usize,
    /// Also write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// The flags, checked and completed.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    #[serde(skip)]
    pub shape: Shape,
    pub weights: String,
    #[serde(skip)]
    pub weight_source: WeightSource,
    #[serde(serialize_with = "device_as_text")]
    pub device: Device,
    pub threads_per_rank: usize,
    pub tp: u32,
    pub prefill: Vec<u32>,
    pub decode: Vec<u32>,
    pub context: u32,
    pub steps: u32,
    pub mixed: Option<u32>,
    pub mixed_prompt: u32,
    pub vision: Vec<ImageSize>,
    pub continuous: Vec<u32>,
    pub continuous_prompt: u32,
    pub continuous_output: u32,
    pub continuous_window_seconds: f64,
    pub token_budget: u32,
    pub pipeline_depth: u32,
    pub block_size: u32,
    pub repeats: usize,
}

fn wrong(flag: &'static str, reason: impl Into<String>) -> Error {
    Error::Flag { flag, reason: reason.into() }
}

impl EngineArgs {
    /// What these words say on a command line.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn of_words(words: impl IntoIterator<Item = String>) -> Result<Self> {
        let wrong = |error: clap::Error| Error::Flag { flag: "bench", reason: error.to_string() };
        let command = Self::augment_args(clap::Command::new("bench").no_binary_name(true));
        let matches = command.try_get_matches_from(words).map_err(wrong)?;
        Self::from_arg_matches(&matches).map_err(wrong)
    }

    /// Checks the flags against each other and fills in what depends on the machine.
    ///
    /// # Errors
    /// Names the flag.
    pub fn plan(&self) -> Result<Plan> {
        let shape = Shape::load(&self.shape, self.layers)?;
        let weight_source = self.weight_source(&shape)?;
        let device = parse_device(&self.device)?;
        let positive = [
            ("--tp", self.tp as usize),
            ("--threads", self.threads.unwrap_or(1)),
            ("--context", self.context as usize),
            ("--steps", self.steps as usize),
            ("--repeats", self.repeats),
            ("--mixed-prompt", self.mixed_prompt as usize),
            ("--continuous-prompt", self.continuous_prompt as usize),
            ("--continuous-output", self.continuous_output as usize),
        ];
        if let Some((flag, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(wrong(flag, "must be at least 1"));
        }
        let lists = [
            ("--prefill", &self.prefill),
            ("--decode", &self.decode),
            ("--continuous", &self.continuous),
        ];
        if let Some((flag, _)) = lists.iter().find(|(_, list)| list.contains(&0)) {
            return Err(wrong(flag, "must be at least 1"));
        }
        if self.continuous_window.is_nan() || self.continuous_window <= 0.0 {
            return Err(wrong("--continuous-window", "must be more than 0"));
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let is_default = lists.iter().all(|(_, list)| list.is_empty())
            && self.mixed.is_none()
            && self.vision.is_empty();
        let or_default = |list: &[u32], default: &[u32]| match is_default {
            true => default.to_vec(),
            false => list.to_vec(),
        };
        Ok(Plan {
            shape,
            weights: self.weights.clone(),
            weight_source,
            device,
            threads_per_rank: self.threads.unwrap_or((cores / self.tp as usize).max(1)),
            tp: self.tp,
            prefill: or_default(&self.prefill, &[512]),
            decode: or_default(&self.decode, &[1, 4, 8, 16]),
            context: self.context,
            steps: self.steps,
            mixed: self.mixed.filter(|&sequences| sequences > 0),
            mixed_prompt: self.mixed_prompt,
            vision: self.vision.clone(),
            continuous: self.continuous.clone(),
            continuous_prompt: self.continuous_prompt,
            continuous_output: self.continuous_output,
            continuous_window_seconds: self.continuous_window,
            token_budget: self.token_budget,
            pipeline_depth: self.pipeline_depth,
            block_size: self.block_size,
            repeats: self.repeats,
        })
    }

    fn weight_source(&self, shape: &Shape) -> Result<WeightSource> {
        if self.weights == "checkpoint" {
            let directory = shape.directory.clone();
            let missing = "`checkpoint` needs --shape with the path of a config.json";
            let directory = directory.ok_or_else(|| wrong("--weights", missing))?;
            return Ok(WeightSource::Checkpoint(directory));
        }
        let seed = self.weights.strip_prefix("random:").and_then(|seed| seed.parse().ok());
        let unknown = || format!("{:?} is neither `checkpoint` nor `random:SEED`", self.weights);
        let seed = seed.ok_or_else(|| wrong("--weights", unknown()))?;
        Ok(WeightSource::Random { seed })
    }
}

impl Plan {
    /// Whether anything needs the language model.
    pub fn needs_engine(&self) -> bool {
        let lists = [&self.prefill, &self.decode, &self.continuous];
        self.mixed.is_some() || lists.iter().any(|list| !list.is_empty())
    }

    /// Threads of all ranks.
    pub fn total_threads(&self) -> usize {
        self.threads_per_rank * self.tp as usize
    }

    /// Type of weights and KV.
    pub fn dtype(&self) -> DType {
        dtype_of(self.device)
    }

    /// Output of one decode run, in tokens.
    pub fn decode_tokens(&self) -> u32 {
        // The sequences of a batch may start a step apart.
        self.steps + 2 * SETTLE_TOKENS
    }

    /// Output of a sequence that decodes while the long prompt is prefilled, in tokens: every step of the
    /// prefill gives it one.
    pub fn mixed_tokens(&self) -> u32 {
        let batch = self.mixed.unwrap_or(0);
        let per_step = self.token_budget.saturating_sub(batch).max(1);
        self.mixed_prompt.div_ceil(per_step) + 16 * SETTLE_TOKENS
    }

    /// Window in which throughput is counted.
    pub fn window(&self) -> Duration {
        Duration::from_secs_f64(self.continuous_window_seconds)
    }

    /// Longest output of a request of the closed loop.
    pub fn longest_continuous(&self) -> u32 {
        self.continuous_output + self.continuous_output / 2
    }

    /// Limits of the engine: as much as the measurements need.
    pub fn scheduler(&self) -> SchedulerConfig {
        let most = |list: &[u32]| list.iter().copied().max().unwrap_or(0);
        let max_running = most(&self.decode)
            .max(most(&self.continuous))
            .max(self.mixed.map_or(0, |batch| batch + 1))
            .max(1);
        let max_model_len = most(&self.prefill)
            .max(self.context + self.decode_tokens().max(self.mixed_tokens()))
            .max(self.mixed_prompt)
            .max(self.continuous_prompt + self.longest_continuous())
            + 2;
        SchedulerConfig {
            block_size: self.block_size,
            max_running,
            max_waiting: 2 * max_running,
            max_tokens_per_step: self.token_budget,
            max_model_len,
            pipeline_depth: self.pipeline_depth,
            ..SchedulerConfig::default()
        }
    }

    /// KV blocks that hold the largest measurement, with the contexts of decode kept in the prefix cache.
    pub fn num_blocks(&self) -> u32 {
        let scheduler = self.scheduler();
        let blocks = |tokens: u32| tokens.div_ceil(self.block_size) + 1;
        let decode = self.context + self.decode_tokens().max(self.mixed_tokens());
        let loops = self.continuous_prompt + self.longest_continuous();
        let running = scheduler.max_running * blocks(decode.max(loops));
        running + blocks(scheduler.max_model_len) + scheduler.reserved_blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        engine: EngineArgs,
    }

    fn plan(flags: &[&str]) -> Result<Plan> {
        let all = ["test", "--shape", "tiny"].iter().chain(flags);
        Flags::try_parse_from(all).expect("flags that parse").engine.plan()
    }

    #[test]
    fn without_flags_the_standard_set_is_run() {
        let standard = plan(&[]).expect("a plan");
        assert_eq!((standard.prefill, standard.decode), (vec![512], vec![1, 4, 8, 16]));
        let chosen = plan(&["--mixed", "--vision", "56x28,1008x1008"]).expect("a plan");
        assert_eq!((chosen.mixed, chosen.decode), (Some(4), vec![]));
        assert_eq!(chosen.vision[0], ImageSize { width: 56, height: 28 });
    }

    #[test]
    fn the_engine_holds_what_is_measured() {
        let plan = plan(&["--decode", "1,16", "--mixed", "2", "--context", "100"]).expect("a plan");
        let scheduler = plan.scheduler();
        assert_eq!(scheduler.validate(), Ok(()));
        assert_eq!(scheduler.max_running, 16);
        assert!(scheduler.max_model_len > 4000);
        assert!(plan.num_blocks() >= 16 * 100 / 16 + 4000 / 16);
    }

    #[test]
    fn contradictions_are_refused_by_flag() {
        let cases: [(&str, &[&str]); 6] = [
            ("--weights", &["--weights", "checkpoint"]),
            ("--weights", &["--weights", "random"]),
            ("--device", &["--device", "abacus"]),
            ("--repeats", &["--repeats", "0"]),
            ("--decode", &["--decode", "4,0"]),
            ("--continuous-window", &["--continuous-window", "0"]),
        ];
        for (flag, flags) in cases {
            let error = plan(flags).expect_err(flag);
            assert!(error.to_string().starts_with(flag), "{error}");
        }
    }
}
