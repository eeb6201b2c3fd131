//! The vision tower on a backend, as the vision thread owns it.

use std::error::Error;
use std::time::{Duration, Instant};

use tessera_kernels::{Backend, CpuBackend, CudaDevice, Device, ReferenceBackend, cuda};
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
struct Tower<B: Backend> {
    backend: B,
    tower: VisionTower<B>,
    num_cols: u32,
}

fn model_error(error: impl Into<Box<dyn Error + Send + Sync>>) -> EncoderError {
    EncoderError::Model(error.into())
}

/// What the tower runs on.
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    pub device: Device,
    /// On a CPU device; 0 takes all cores.
    pub threads: usize,
    /// On a GPU.
    pub deterministic: bool,
}

/// Reads headers and hashes what tells checkpoints apart; loads no weights.
///
/// # Errors
/// A broken config or checkpoint, by file and field or tensor.
pub fn identify(
    config: &ModelConfig,
    weights: &WeightSource,
    compute: Compute,
) -> Result<Identity, EncoderError> {
    let weights = Weights::open(weights, config).map_err(model_error)?;
    let numerics = match compute.device {
        Device::Reference => vision_numerics(ReferenceBackend::new().caps()),
        // The number of threads changes no bits.
        Device::Cpu(format) => {
            vision_numerics(CpuBackend::new(1, format).map_err(model_error)?.caps())
        }
        Device::Cuda(device) => vision_numerics(open(device, compute.deterministic)?.caps()),
    };
    Ok(Identity {
        vision_fingerprint: weights.vision_fingerprint(config).map_err(model_error)?,
        language_fingerprint: weights.language_fingerprint(config).map_err(model_error)?,
        vision_numerics: numerics,
    })
}

/// Loads the tower.
///
/// # Errors
/// A tensor that is missing, misshapen or unreadable, by file and name; threads that do not start.
pub fn load(
    config: &ModelConfig,
    weights: &WeightSource,
    max_patches: u32,
    compute: Compute,
) -> Result<Box<dyn VisionEncoder>, EncoderError> {
    match compute.device {
        Device::Reference => load_on(ReferenceBackend::new(), config, weights, max_patches),
        Device::Cpu(format) => {
            let all = || std::thread::available_parallelism().map_or(1, usize::from);
            let threads = if compute.threads == 0 { all() } else { compute.threads };
            let backend = CpuBackend::new(threads, format).map_err(model_error)?;
            load_on(backend, config, weights, max_patches)
        }
        Device::Cuda(device) => {
            load_on(open(device, compute.deterministic)?, config, weights, max_patches)
        }
    }
}

/// Opens the encoder's GPU.
fn open(device: CudaDevice, deterministic: bool) -> Result<cuda::CudaBackend, EncoderError> {
    cuda::open(&device.options(0, deterministic)).map_err(model_error)
}

fn load_on<B: Backend>(
    mut backend: B,
    config: &ModelConfig,
    weights: &WeightSource,
    max_patches: u32,
) -> Result<Box<dyn VisionEncoder>, EncoderError> {
    let mut weights = Weights::open(weights, config).map_err(model_error)?;
    let tower = VisionTower::load(&mut backend, &config.vision, max_patches, &mut weights)
        .map_err(model_error)?;
    Ok(Box::new(Tower { backend, tower, num_cols: config.vision.out_hidden_size as u32 }))
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
