//! Content keys (ENGINE §4): an embedding is named by everything that decides its values, a KV block by
//! everything that decides its own and, through its parent, all before it.
//!
//! BLAKE3 with one derive-key context per kind of key; every field is of fixed length or preceded by its
//! length, so no two field lists encode alike.

use tessera_media::{PixelRecipe, Size};
use tessera_types::{
    BlockKey, EmbeddingKey, Hash256, MediaId, MediaKind, MediaSpan, ModelFingerprint, NumericsId,
    Prompt, TokenId,
};

use crate::describe::MediaDescription;

const EMBEDDING_CONTEXT: &str = "tessera 2025 embedding key v1";
const ROOT_CONTEXT: &str = "tessera 2025 block key root v1";
const BLOCK_CONTEXT: &str = "tessera 2025 block key v1";

/// Which vision tower computes embeddings, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VisionIdentity {
    pub weights: ModelFingerprint,
    pub numerics: NumericsId,
}

/// Key of the embedding of a described media item.
pub fn embedding_key(
    vision: &VisionIdentity,
    recipe: &PixelRecipe,
    media: &MediaDescription,
) -> EmbeddingKey {
    embedding_key_of(
        vision,
        recipe,
        media.kind,
        media.media_id,
        &media.frame_indices,
        media.resized,
    )
}

/// Key of an embedding from its parts, as an encoder worker knows them.
pub fn embedding_key_of(
    vision: &VisionIdentity,
    recipe: &PixelRecipe,
    kind: MediaKind,
    media_id: MediaId,
    frame_indices: &[u32],
    resized: Size,
) -> EmbeddingKey {
    let mut hasher = KeyHasher::new(EMBEDDING_CONTEXT);
    hasher.hash(&vision.weights.0);
    hasher.hash(&vision.numerics.0);
    hasher.hash(&media_id.0);
    hasher.u32(match kind {
        MediaKind::Image => 1,
        MediaKind::Video => 2,
    });
    hasher.u32s(frame_indices);
    hasher.u32(resized.height);
    hasher.u32(resized.width);
    let mut encoded = Vec::new();
    recipe.encode_into(&mut encoded);
    hasher.bytes(&encoded);
    EmbeddingKey(hasher.finish())
}

/// Computes the keys of the KV blocks of sequences on one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockKeyChain {
    root: BlockKey,
    block_size: u32,
    adapter: String,
    salt: Vec<u8>,
}

impl BlockKeyChain {
    /// A chain for blocks of `block_size` tokens. `adapter` names a fine-tune applied at run time, empty
    /// for none; `salt` keeps tenants that must not share apart.
    pub fn new(
        model: ModelFingerprint,
        numerics: NumericsId,
        block_size: u32,
        adapter: impl Into<String>,
        salt: impl Into<Vec<u8>>,
    ) -> Self {
        assert!(block_size > 0, "a block holds tokens");
        let mut hasher = KeyHasher::new(ROOT_CONTEXT);
        hasher.hash(&model.0);
        hasher.hash(&numerics.0);
        hasher.u32(block_size);
        let root = BlockKey(hasher.finish());
        Self { root, block_size, adapter: adapter.into(), salt: salt.into() }
    }

    /// Parent of every first block.
    pub fn root(&self) -> BlockKey {
        self.root
    }

    /// Keys of all full blocks of a prompt followed by `output`.
    pub fn keys(&self, prompt: &Prompt, output: &[TokenId]) -> Vec<BlockKey> {
        let size = self.block_size as usize;
        let total = prompt.tokens.len() + output.len();
        let mut keys: Vec<BlockKey> = Vec::with_capacity(total / size);
        let mut straddling = Vec::with_capacity(size);
        for start in (0..total - total % size).step_by(size) {
            let parent = keys.last().copied().unwrap_or(self.root);
            let tokens = match prompt.tokens.get(start..start + size) {
                Some(tokens) => tokens,
                None => {
                    let rest = prompt.tokens.get(start..).unwrap_or_default();
                    let from = start.saturating_sub(prompt.tokens.len());
                    straddling.clear();
                    straddling.extend_from_slice(rest);
                    straddling.extend_from_slice(&output[from..from + size - rest.len()]);
                    &straddling
                }
            };
            keys.push(self.next(parent, start as u32, tokens, &prompt.media));
        }
        keys
    }

    /// Key of the block that follows `parent` and holds `tokens`, the first of which has index `start`.
    /// `media` are all spans of the prompt, in order.
    pub fn next(
        &self,
        parent: BlockKey,
        start: u32,
        tokens: &[TokenId],
        media: &[MediaSpan],
    ) -> BlockKey {
        assert_eq!(tokens.len(), self.block_size as usize, "only full blocks have keys");
        let end = start + self.block_size;
        let first = media.partition_point(|span| span.end() <= start);
        let inside = || media[first..].iter().take_while(|span| span.offset < end);
        let mut hasher = KeyHasher::new(BLOCK_CONTEXT);
        hasher.hash(&parent.0);
        hasher.u32s(tokens);
        hasher.u32(inside().count() as u32);
        for span in inside() {
            let from = span.offset.max(start);
            hasher.hash(&span.embedding_key.0);
            hasher.u32(from - start);
            hasher.u32(span.end().min(end) - from);
            hasher.u32(from - span.offset);
            hasher.u64(span.seconds_per_grid.to_bits());
        }
        hasher.bytes(self.adapter.as_bytes());
        hasher.bytes(&self.salt);
        BlockKey(hasher.finish())
    }
}

/// Feeds fields of known length to BLAKE3.
struct KeyHasher(blake3::Hasher);

impl KeyHasher {
    fn new(context: &str) -> Self {
        Self(blake3::Hasher::new_derive_key(context))
    }

    fn hash(&mut self, hash: &Hash256) {
        self.0.update(hash.as_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.update(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.update(&value.to_le_bytes());
    }

    fn u32s(&mut self, values: &[u32]) {
        self.u64(values.len() as u64);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.update(&bytes);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.u64(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn finish(self) -> Hash256 {
        Hash256(*self.0.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tessera_types::{GridThw, PositionSpan};

    fn hash(fill: u8) -> Hash256 {
        Hash256([fill; 32])
    }

    fn chain(block_size: u32) -> BlockKeyChain {
        BlockKeyChain::new(ModelFingerprint(hash(1)), NumericsId(hash(2)), block_size, "", [])
    }

    /// `text` tokens, then a span of `rows` visual tokens, and so on.
    fn prompt(text: u32, rows: u32, key: u8, seconds_per_grid: f64) -> Prompt {
        let (offset, num_tokens) = (text, rows);
        let span = MediaSpan {
            item: 0,
            kind: MediaKind::Video,
            offset,
            num_tokens,
            grid: GridThw { t: 1, h: 2, w: 2 * rows },
            seconds_per_grid,
            embedding_key: EmbeddingKey(hash(key)),
        };
        let tokens = [vec![7; text as usize], vec![9; rows as usize], vec![8; 5]].concat();
        let positions = vec![PositionSpan::Text { len: tokens.len() as u32 }];
        Prompt { tokens, media: vec![span], positions }
    }

    #[test]
    fn every_field_of_an_embedding_changes_its_key() {
        let vision =
            VisionIdentity { weights: ModelFingerprint(hash(1)), numerics: NumericsId(hash(2)) };
        let recipe = PixelRecipe::default();
        let (image, id, size) = (MediaKind::Image, MediaId(hash(3)), Size::new(56, 84));
        let key =
            |vision: &VisionIdentity, recipe: &PixelRecipe, kind, id, frames: &[u32], size| {
                embedding_key_of(vision, recipe, kind, id, frames, size)
            };
        let mut other_recipe = recipe;
        other_recipe.resize = tessera_media::ResizeRecipe::Pillow;
        let keys = [
            key(&vision, &recipe, image, id, &[], size),
            key(
                &VisionIdentity { weights: ModelFingerprint(hash(9)), ..vision },
                &recipe,
                image,
                id,
                &[],
                size,
            ),
            key(
                &VisionIdentity { numerics: NumericsId(hash(9)), ..vision },
                &recipe,
                image,
                id,
                &[],
                size,
            ),
            key(&vision, &other_recipe, image, id, &[], size),
            key(&vision, &recipe, MediaKind::Video, id, &[], size),
            key(&vision, &recipe, image, MediaId(hash(9)), &[], size),
            key(&vision, &recipe, image, id, &[0], size),
            key(&vision, &recipe, image, id, &[0, 1], size),
            key(&vision, &recipe, image, id, &[1, 0], size),
            key(&vision, &recipe, image, id, &[], Size::new(84, 56)),
            key(&vision, &recipe, image, id, &[], Size::new(56, 112)),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn every_field_of_a_block_changes_its_key() {
        let base = prompt(3, 6, 5, 1.0);
        let last = |chain: &BlockKeyChain, prompt: &Prompt| {
            *chain.keys(prompt, &[]).last().expect("a block")
        };
        let with = |adapter: &str, salt: &[u8], model: u8, numerics: u8, size: u32| {
            let (model, numerics) = (ModelFingerprint(hash(model)), NumericsId(hash(numerics)));
            BlockKeyChain::new(model, numerics, size, adapter, salt)
        };
        let mut keys = vec![
            last(&chain(4), &base),
            last(&with("a", b"", 1, 2, 4), &base),
            last(&with("", b"a", 1, 2, 4), &base),
            last(&with("", b"", 9, 2, 4), &base),
            last(&with("", b"", 1, 9, 4), &base),
            last(&with("", b"", 1, 2, 2), &base),
            last(&chain(4), &prompt(3, 6, 6, 1.0)),
            last(&chain(4), &prompt(3, 6, 5, 0.5)),
            last(&chain(4), &prompt(2, 6, 5, 1.0)),
        ];
        // Same tokens, another row of the embedding under them.
        let mut shifted = base.clone();
        shifted.media[0].offset -= 1;
        keys.push(last(&chain(4), &shifted));
        let mut shorter = base.clone();
        shorter.media[0].num_tokens -= 1;
        keys.push(last(&chain(4), &shorter));
        let mut early = base.clone();
        early.tokens[0] += 1;
        keys.push(last(&chain(4), &early));
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    proptest! {
        #[test]
        fn the_chain_is_the_same_however_it_is_computed(
            text in 0u32..20, rows in 1u32..30, output in proptest::collection::vec(0u32..9, 0..40),
            cut in 0usize..40, block_size in 1u32..9,
        ) {
            let chain = chain(block_size);
            let prompt = prompt(text, rows, 5, 1.5);
            let whole = chain.keys(&prompt, &output);
            prop_assert_eq!(whole.len(), (prompt.tokens.len() + output.len()) / block_size as usize);

            // Part of the output given as prompt.
            let cut = cut.min(output.len());
            let mut longer = prompt.clone();
            longer.tokens.extend(&output[..cut]);
            prop_assert_eq!(&chain.keys(&longer, &output[cut..]), &whole);

            // Block by block.
            let all: Vec<TokenId> = prompt.tokens.iter().chain(&output).copied().collect();
            let mut parent = chain.root();
            for (i, tokens) in all.chunks_exact(block_size as usize).enumerate() {
                parent = chain.next(parent, i as u32 * block_size, tokens, &prompt.media);
                prop_assert_eq!(parent, whole[i]);
            }
        }

        #[test]
        fn a_common_prefix_shares_its_keys_and_nothing_after(
            text in 0u32..20, at in 0usize..30, block_size in 1u32..6,
        ) {
            let (a, mut b) = (prompt(text, 9, 5, 1.0), prompt(text, 9, 5, 1.0));
            let at = at.min(b.tokens.len() - 1);
            b.tokens[at] += 1;
            let chain = chain(block_size);
            let (keys, others) = (chain.keys(&a, &[]), chain.keys(&b, &[]));
            let block = at / block_size as usize;
            for i in 0..keys.len() {
                prop_assert_eq!(keys[i] == others[i], i < block, "block {}", i);
            }
        }
    }
}
