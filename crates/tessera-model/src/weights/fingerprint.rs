//! Fingerprints of a model part, cheap enough for a checkpoint of 145 GB.
//!
//! What a fingerprint covers: the parsed configuration of the part; name, type and shape of each of its
//! tensors; small tensors (norms, biases) whole; of larger ones four windows of bytes, the first and
//! the last among them. So two checkpoints that were trained or converted differently differ, while
//! sharding, order and naming style don't matter. It is no proof against a checkpoint that was altered
//! on purpose outside of the windows.

use serde::Serialize;
use tessera_kernels::WeightError;
use tessera_types::{Hash256, ModelFingerprint};

use super::checkpoint::Checkpoint;
use crate::tensors::TensorSpec;

/// Tensors up to this many bytes are hashed whole.
const WHOLE_BYTES: u64 = 64 << 10;
/// Windows of a larger tensor, spread evenly from its first byte to its last.
const NUM_WINDOWS: u64 = 4;
const WINDOW_BYTES: u64 = 1 << 10;

/// The parsed configuration, so that flat and nested files of one model agree.
pub(super) fn config_bytes(config: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(config).expect("a config is plain data")
}

/// Fingerprint of a part: its configuration, and a digest of its weights.
pub(super) fn of_part(part: &str, config: &[u8], weights: Hash256) -> ModelFingerprint {
    let mut hasher = blake3::Hasher::new();
    for text in [b"tessera model v2".as_slice(), part.as_bytes(), config] {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text);
    }
    hasher.update(weights.as_bytes());
    ModelFingerprint(Hash256(*hasher.finalize().as_bytes()))
}

/// Digest of random weights.
pub(super) fn of_seed(seed: u64) -> Hash256 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"random").update(&seed.to_le_bytes());
    Hash256(*hasher.finalize().as_bytes())
}

/// Digest of the tensors of a part, which are checked first.
pub(super) fn of_tensors(
    checkpoint: &Checkpoint,
    tensors: &[TensorSpec],
) -> Result<Hash256, WeightError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"checkpoint");
    let mut tensors: Vec<&TensorSpec> = tensors.iter().collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let mut buffer = Vec::new();
    for TensorSpec { name, shape } in tensors {
        let entry = checkpoint.check(name, shape)?;
        let header = format!("{name} {:?} {:?}", entry.dtype, entry.shape);
        hasher.update(&(header.len() as u64).to_le_bytes()).update(header.as_bytes());
        for (from, len) in windows(entry.len()) {
            buffer.resize(len as usize, 0);
            checkpoint.read_raw(name, entry, from, &mut buffer)?;
            hasher.update(&buffer);
        }
    }
    Ok(Hash256(*hasher.finalize().as_bytes()))
}

/// (offset, length) of the byte windows of a tensor.
fn windows(len: u64) -> Vec<(u64, u64)> {
    if len <= WHOLE_BYTES {
        return vec![(0, len)];
    }
    let room = len - WINDOW_BYTES;
    (0..NUM_WINDOWS).map(|i| (room * i / (NUM_WINDOWS - 1), WINDOW_BYTES)).collect()
}
