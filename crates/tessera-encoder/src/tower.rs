//! The vision tower on a backend, as the vision thread owns it.

use std::error::Error;
use std::time::{Duration, Instant};

use tessera_kernels::{Backend, ReferenceBackend};
use tessera_model::numerics::vision_numerics;
use tessera_model::{ModelConfig, VisionItem, VisionTower, WeightSource, Weights};
use tessera_types::{ModelFingerprint, NumericsId};

use crate::error::EncoderError;
use crate::vision::{PatchItem, VisionEncoder};

/// Longest forward pass before the device counts as hung. A CPU takes minutes for a large image.
const FORWARD_DEADLINE: Duration = Duration::from_secs(1800);

/// What identifies the weights and arithmetic of this worker.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    pub vision_fingerprint: ModelFingerprint,
    pub language_fingerprint: ModelFingerprint,
    pub vision_numerics: NumericsId,
}

/// A loaded tower with its backend.
pub struct Tower<B: Backend> {
    backend: B,
    tower: VisionTower<B>,
    num_cols: u32,
}

fn model_error(error: impl Into<Box<dyn Error + Send + Sync>>) -> EncoderError {
    EncoderError::Model(error.into())
}

/// Reads headers and hashes what tells checkpoints apart; loads no weights.
///
/// # Errors
/// A broken config or checkpoint, by file and field or tensor.
pub fn identify(config: &ModelConfig, weights: &WeightSource) -> Result<Identity, EncoderError> {
    let weights = Weights::open(weights, config).map_err(model_error)?;
    Ok(Identity {
        vision_fingerprint: weights.vision_fingerprint(config).map_err(model_error)?,
        language_fingerprint: weights.language_fingerprint(config).map_err(model_error)?,
        vision_numerics: vision_numerics(ReferenceBackend::new().caps()),
    })
}

/// Loads the tower on the reference backend.
///
/// # Errors
/// A tensor that is missing, misshapen or unreadable, by file and name.
pub fn load(
    config: &ModelConfig,
    weights: &WeightSource,
    max_patches: u32,
) -> Result<Tower<ReferenceBackend>, EncoderError> {
    let mut weights = Weights::open(weights, config).map_err(model_error)?;
    let mut backend = ReferenceBackend::new();
    let tower = VisionTower::load(&mut backend, &config.vision, max_patches, &mut weights)
        .map_err(model_error)?;
    Ok(Tower { backend, tower, num_cols: config.vision.out_hidden_size as u32 })
}

impl<B: Backend> VisionEncoder for Tower<B> {
    fn num_cols(&self) -> u32 {
        self.num_cols
    }

    fn encode(
        &mut self,
        items: &[PatchItem],
    ) -> Result<Vec<Vec<f32>>, Box<dyn Error + Send + Sync>> {
        let items: Vec<VisionItem<'_>> = items
            .iter()
            .map(|item| VisionItem { grid: item.grid, pixel_values: &item.values })
            .collect();
        let deadline = Instant::now() + FORWARD_DEADLINE;
        Ok(self.tower.encode(&mut self.backend, &items, deadline)?)
    }
}
