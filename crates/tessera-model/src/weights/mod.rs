//! Where weights come from: a published checkpoint, a pre-sharded one, or a seed.

mod checkpoint;
mod file;
mod fingerprint;
mod presharded;
mod random;
mod shard;

use std::path::PathBuf;

use half::bf16;
use tessera_kernels::{SliceReader, TensorSlice, WeightError};
use tessera_types::ModelFingerprint;

use self::checkpoint::Checkpoint;
use self::random::RandomWeights;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::progress::LoadMeter;
use crate::specs::Slice;
use crate::split::TpSplit;
use crate::tensors::{self, TensorSpec};

pub use self::shard::{ShardJob, ShardObserver, write_shards};

/// What to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightSource {
    /// A directory with `model.safetensors`, or shards and `model.safetensors.index.json`, or what
    /// [`write_shards`] wrote.
    Checkpoint(PathBuf),
    /// Values drawn from a seed, for any shape, without a file.
    Random { seed: u64 },
}

/// An open source of weights. Every rank opens its own and reads its own slices, on any number of threads.
#[derive(Debug)]
pub struct Weights {
    source: Source,
    meter: LoadMeter,
}

#[derive(Debug)]
enum Source {
    Checkpoint(Checkpoint),
    Random(RandomWeights),
}

impl Weights {
    /// Opens the files and reads their headers; no weight is read yet.
    ///
    /// # Errors
    /// No checkpoint in the directory, a malformed index or header, a shard that is missing or shorter
    /// than its header says.
    pub fn open(source: &WeightSource, config: &ModelConfig) -> Result<Self> {
        let source = match source {
            WeightSource::Checkpoint(directory) => Source::Checkpoint(Checkpoint::open(directory)?),
            WeightSource::Random { seed } => Source::Random(RandomWeights::new(*seed, config)),
        };
        Ok(Self { source, meter: LoadMeter::default() })
    }

    /// Counts in `meter`, which others may share.
    #[must_use]
    pub fn with_meter(self, meter: &LoadMeter) -> Self {
        Self { meter: meter.clone(), ..self }
    }

    /// Checks that every tensor is there with the right shape and a type that can be read.
    ///
    /// # Errors
    /// The first that is not, by file and name.
    pub fn check(&self, tensors: &[TensorSpec]) -> Result<(), WeightError> {
        match &self.source {
            Source::Checkpoint(checkpoint) => tensors
                .iter()
                .try_for_each(|spec| checkpoint.check(&spec.name, &spec.shape).map(drop)),
            Source::Random(_) => Ok(()),
        }
    }

    /// Bytes of weights loaded so far, by all that share the meter.
    pub fn bytes_read(&self) -> u64 {
        self.meter.progress().loaded_bytes
    }

    /// Opens what belongs to one rank alone, where the checkpoint is pre-sharded.
    ///
    /// # Errors
    /// [`crate::ModelError::ShardDegree`] where it was made for another degree; a broken rank file.
    pub(crate) fn select(&mut self, split: &TpSplit) -> Result<()> {
        match &mut self.source {
            Source::Checkpoint(checkpoint) => checkpoint.select(split),
            Source::Random(_) => Ok(()),
        }
    }

    /// Tells the meter what is about to be loaded.
    pub(crate) fn announce(&self, slices: &[Slice]) -> Result<(), WeightError> {
        let mut bytes = 0;
        for slice in slices {
            let element_bytes = match &self.source {
                Source::Checkpoint(checkpoint) => checkpoint.entry(&slice.tensor)?.element_bytes(),
                Source::Random(_) => size_of::<bf16>(),
            };
            bytes += (slice.view().len() * element_bytes) as u64;
        }
        self.meter.announce(bytes);
        Ok(())
    }

    /// Identifies configuration and weights of the language model.
    ///
    /// # Errors
    /// As for [`Weights::check`]; a failed read.
    pub fn language_fingerprint(&self, config: &ModelConfig) -> Result<ModelFingerprint> {
        let text = fingerprint::config_bytes(&config.text);
        let digest = match &self.source {
            Source::Random(random) => fingerprint::of_seed(random.seed()),
            Source::Checkpoint(checkpoint) => match checkpoint.manifest() {
                Some(manifest) => manifest.language_weights,
                None => fingerprint::of_tensors(checkpoint, &tensors::language(&config.text))?,
            },
        };
        Ok(fingerprint::of_part("language", &text, digest))
    }

    /// Identifies configuration and weights of the vision tower.
    ///
    /// # Errors
    /// As for [`Weights::language_fingerprint`].
    pub fn vision_fingerprint(&self, config: &ModelConfig) -> Result<ModelFingerprint> {
        let vision = fingerprint::config_bytes(&config.vision);
        let digest = match &self.source {
            Source::Random(random) => fingerprint::of_seed(random.seed()),
            Source::Checkpoint(checkpoint) => match checkpoint.manifest() {
                Some(manifest) => manifest.vision_weights,
                None => fingerprint::of_tensors(checkpoint, &tensors::vision(&config.vision))?,
            },
        };
        Ok(fingerprint::of_part("vision", &vision, digest))
    }
}

impl SliceReader for Weights {
    fn read_f32(&self, slice: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError> {
        let bytes = match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.read(slice, out)?,
            Source::Random(random) => random.fill(slice, out, f32::from),
        };
        self.meter.add(bytes);
        Ok(())
    }

    fn read_bf16(&self, slice: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError> {
        let bytes = match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.read(slice, out)?,
            Source::Random(random) => random.fill(slice, out, |value| value),
        };
        self.meter.add(bytes);
        Ok(())
    }
}
