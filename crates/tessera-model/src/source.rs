//! Which model a worker serves.

use std::path::PathBuf;

use crate::weights::WeightSource;

/// A model directory, the weights that go with it, and the name that clients use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSource {
    /// Directory in Hugging Face layout: configs, tokenizer and, usually, weights.
    pub directory: PathBuf,
    pub name: String,
    pub weights: WeightSource,
}

impl Default for ModelSource {
    /// Nothing: a directory that does not exist.
    fn default() -> Self {
        let directory = PathBuf::new();
        Self {
            name: String::new(),
            weights: WeightSource::Checkpoint(directory.clone()),
            directory,
        }
    }
}
