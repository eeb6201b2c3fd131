//! Ids of everything that may change bits, as the engine and the processor use them (ENGINE §3, §4).

use tessera_kernels::Caps;
use tessera_types::{Hash256, NumericsId};

/// Id of a decoder group: the backend's own, the tensor-parallel degree and the order of reduction.
/// Weights are not in it: block keys mix in the model fingerprint beside it.
pub fn decoder_numerics(caps: &Caps, world_size: u32) -> NumericsId {
    id(caps, "decoder, sum by ascending rank", world_size)
}

/// Id of an encoder. The vision tower is never split.
pub fn vision_numerics(caps: &Caps) -> NumericsId {
    id(caps, "vision", 1)
}

fn id(caps: &Caps, part: &str, world_size: u32) -> NumericsId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"tessera numerics v1\0");
    hasher.update(caps.numerics_id.0.as_bytes());
    for text in [env!("CARGO_PKG_VERSION"), caps.name, part] {
        hasher.update(text.as_bytes());
        hasher.update(&[0]);
    }
    for dtype in [caps.activation_dtype, caps.kv_dtype] {
        hasher.update(dtype.name().as_bytes());
        hasher.update(&[0]);
    }
    hasher.update(&world_size.to_le_bytes());
    NumericsId(Hash256(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use tessera_kernels::{Backend, ReferenceBackend};

    use super::*;

    #[test]
    fn the_id_is_stable_and_tells_degrees_and_parts_apart() {
        let backend = ReferenceBackend::new();
        let caps = backend.caps();
        assert_eq!(decoder_numerics(caps, 2), decoder_numerics(ReferenceBackend::new().caps(), 2));
        assert_ne!(decoder_numerics(caps, 1), decoder_numerics(caps, 2));
        assert_ne!(decoder_numerics(caps, 1), vision_numerics(caps));
    }
}
