//! Where weights come from: a published checkpoint, or a seed.

mod checkpoint;
mod fingerprint;
mod random;

use std::path::PathBuf;

use half::bf16;
use tessera_kernels::{SliceReader, TensorSlice, WeightError};
use tessera_types::ModelFingerprint;

use self::checkpoint::Checkpoint;
use self::random::RandomWeights;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::tensors::{self, TensorSpec};

/// What to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightSource {
    /// A directory with `model.safetensors`, or shards and `model.safetensors.index.json`.
    Checkpoint(PathBuf),
    /// Values drawn from a seed, for any shape, without a file.
    Random { seed: u64 },
}

/// An open source of weights. Every rank opens its own and reads its own slices.
#[derive(Debug)]
pub enum Weights {
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
        match source {
            WeightSource::Checkpoint(directory) => {
                Ok(Self::Checkpoint(Checkpoint::open(directory)?))
            }
            WeightSource::Random { seed } => Ok(Self::Random(RandomWeights::new(*seed, config))),
        }
    }

    /// Checks that every tensor is there with the right shape and a type that can be read.
    ///
    /// # Errors
    /// The first that is not, by file and name.
    pub fn check(&self, tensors: &[TensorSpec]) -> Result<(), WeightError> {
        match self {
            Self::Checkpoint(checkpoint) => {
                tensors.iter().try_for_each(|spec| checkpoint.check(&spec.name, &spec.shape))
            }
            Self::Random(_) => Ok(()),
        }
    }

    /// Bytes of weights read from files so far.
    pub fn bytes_read(&self) -> u64 {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.bytes_read(),
            Self::Random(_) => 0,
        }
    }

    /// Identifies configuration and weights of the language model.
    ///
    /// # Errors
    /// As for [`Weights::check`]; a failed read.
    pub fn language_fingerprint(&self, config: &ModelConfig) -> Result<ModelFingerprint> {
        let text = fingerprint::config_bytes(&config.text);
        self.fingerprint("language", &text, &tensors::language(&config.text))
    }

    /// Identifies configuration and weights of the vision tower.
    ///
    /// # Errors
    /// As for [`Weights::language_fingerprint`].
    pub fn vision_fingerprint(&self, config: &ModelConfig) -> Result<ModelFingerprint> {
        let vision = fingerprint::config_bytes(&config.vision);
        self.fingerprint("vision", &vision, &tensors::vision(&config.vision))
    }

    fn fingerprint(
        &self,
        part: &str,
        config: &[u8],
        tensors: &[TensorSpec],
    ) -> Result<ModelFingerprint> {
        match self {
            Self::Checkpoint(checkpoint) => {
                self.check(tensors)?;
                Ok(fingerprint::of_checkpoint(part, config, checkpoint, tensors)?)
            }
            Self::Random(random) => Ok(fingerprint::of_seed(part, config, random.seed())),
        }
    }
}

impl SliceReader for Weights {
    fn read_f32(&self, slice: &TensorSlice<'_>, out: &mut [f32]) -> Result<(), WeightError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.read(slice, out),
            Self::Random(random) => {
                random.fill(slice, out, f32::from);
                Ok(())
            }
        }
    }

    fn read_bf16(&self, slice: &TensorSlice<'_>, out: &mut [bf16]) -> Result<(), WeightError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.read(slice, out),
            Self::Random(random) => {
                random.fill(slice, out, |value| value);
                Ok(())
            }
        }
    }
}
