//! Content hashes of media. The bytes as sent are hashed, not the pixels: equal bytes decode equally,
//! and hashing needs no decoding.

use tessera_types::{Hash256, MediaId};

/// Separates frame lists from plain items and versions the encoding below.
const FRAME_LIST_CONTEXT: &str = "tessera 2025 media id of a frame list v1";

/// BLAKE3 of the raw bytes of one image.
pub fn media_id(bytes: &[u8]) -> MediaId {
    MediaId(Hash256(*blake3::hash(bytes).as_bytes()))
}

/// Hash of a video given as a list of frames: of their number and, in order, their ids.
pub fn frame_list_id(frames: &[MediaId]) -> MediaId {
    let mut hasher = blake3::Hasher::new_derive_key(FRAME_LIST_CONTEXT);
    hasher.update(&(frames.len() as u64).to_le_bytes());
    for frame in frames {
        hasher.update(frame.0.as_bytes());
    }
    MediaId(Hash256(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_depend_on_content_order_and_count() {
        let [a, b] = [media_id(b"a"), media_id(b"b")];
        let lists = [vec![], vec![a], vec![b], vec![a, b], vec![b, a], vec![a, a], vec![a, a, a]];
        let mut ids: Vec<MediaId> = lists.iter().map(|frames| frame_list_id(frames)).collect();
        ids.extend([a, b]);
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        assert_eq!(a, media_id(b"a"));
        assert_eq!(
            media_id(b"").to_string(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
            "BLAKE3 of nothing, as published"
        );
    }
}
