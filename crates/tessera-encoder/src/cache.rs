//! The content-addressed embedding cache: least recently used, bounded in bytes.
//!
//! An embedding whose location was given to a decoder is *held*: it is not evicted until it was pulled
//! or its hold ran out, so that a locator is never broken by later traffic. Time is passed in.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tessera_types::{EmbeddingKey, Hash256};

/// Visual rows of one media item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Embedding {
    pub key: EmbeddingKey,
    pub num_rows: u32,
    pub num_cols: u32,
    /// BLAKE3 of `values`.
    pub digest: Hash256,
    /// Row-major little-endian f32, `[num_rows, num_cols]`.
    pub values: Bytes,
}

impl Embedding {
    /// Packs rows `[num_rows, num_cols]`.
    pub fn new(key: EmbeddingKey, num_cols: u32, rows: &[f32]) -> Self {
        let mut bytes = Vec::with_capacity(rows.len() * 4);
        rows.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
        let num_rows = (rows.len() / num_cols.max(1) as usize) as u32;
        let digest = Hash256(*blake3::hash(&bytes).as_bytes());
        Self { key, num_rows, num_cols, digest, values: bytes.into() }
    }
}

/// Every byte is held by embeddings that wait to be pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the embedding cache has no room for {bytes} bytes: {held_bytes} of {capacity_bytes} wait to be pulled"
)]
pub struct CacheFull {
    pub bytes: u64,
    pub held_bytes: u64,
    pub capacity_bytes: u64,
}

/// See the module documentation.
#[derive(Debug)]
pub struct EmbeddingCache {
    capacity_bytes: u64,
    used_bytes: u64,
    entries: HashMap<EmbeddingKey, Entry>,
    /// Use counter to key; the front is the least recently used.
    order: BTreeMap<u64, EmbeddingKey>,
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    embedding: Arc<Embedding>,
    used_at: u64,
    /// Protected from eviction before this time, unless pulled.
    held_until: Duration,
}

impl EmbeddingCache {
    /// An empty cache for at most `capacity_bytes` of values.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            used_bytes: 0,
            entries: HashMap::new(),
            order: BTreeMap::new(),
            uses: 0,
        }
    }

    /// Bytes of values held now.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Bytes of values it may hold.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Looks an embedding up for a requester that will have it pulled until `hold_until`.
    pub fn locate(&mut self, key: &EmbeddingKey, hold_until: Duration) -> Option<Arc<Embedding>> {
        let entry = self.entries.get_mut(key)?;
        entry.held_until = entry.held_until.max(hold_until);
        let embedding = entry.embedding.clone();
        self.touch(key);
        Some(embedding)
    }

    /// Hands an embedding to the decoder that pulls it; its hold ends.
    pub fn pull(&mut self, key: &EmbeddingKey) -> Option<Arc<Embedding>> {
        let entry = self.entries.get_mut(key)?;
        entry.held_until = Duration::ZERO;
        let embedding = entry.embedding.clone();
        self.touch(key);
        Some(embedding)
    }

    /// Keeps an embedding until at least `hold_until`, evicting others that are free to go.
    ///
    /// # Errors
    /// What is held leaves no room; nothing was evicted.
    pub fn insert(
        &mut self,
        embedding: Arc<Embedding>,
        now: Duration,
        hold_until: Duration,
    ) -> Result<(), CacheFull> {
        let key = embedding.key;
        if self.locate(&key, hold_until).is_some() {
            return Ok(());
        }
        let bytes = embedding.values.len() as u64;
        self.make_room(bytes, now)?;
        self.uses += 1;
        self.order.insert(self.uses, key);
        self.used_bytes += bytes;
        let entry = Entry { embedding, used_at: self.uses, held_until: hold_until };
        self.entries.insert(key, entry);
        Ok(())
    }

    /// Embeddings that were located and not pulled, whose holds still run.
    pub fn num_held(&self, now: Duration) -> usize {
        self.entries.values().filter(|entry| entry.held_until > now).count()
    }

    fn make_room(&mut self, bytes: u64, now: Duration) -> Result<(), CacheFull> {
        let capacity_bytes = self.capacity_bytes;
        let held = self.entries.values().filter(|entry| entry.held_until > now);
        let held_bytes: u64 = held.map(|entry| entry.embedding.values.len() as u64).sum();
        if held_bytes + bytes > capacity_bytes {
            return Err(CacheFull { bytes, held_bytes, capacity_bytes });
        }
        while self.used_bytes + bytes > capacity_bytes {
            let victim = self
                .order
                .iter()
                .find(|(_, key)| self.entries[*key].held_until <= now)
                .map(|(&used_at, &key)| (used_at, key));
            let (used_at, key) = victim.expect("what is not held suffices, as checked above");
            self.order.remove(&used_at);
            if let Some(entry) = self.entries.remove(&key) {
                self.used_bytes -= entry.embedding.values.len() as u64;
            }
        }
        Ok(())
    }

    fn touch(&mut self, key: &EmbeddingKey) {
        if let Some(entry) = self.entries.get_mut(key) {
            self.order.remove(&entry.used_at);
            self.uses += 1;
            entry.used_at = self.uses;
            self.order.insert(self.uses, *key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);
    const LATER: Duration = Duration::from_secs(160);

    fn key(n: u8) -> EmbeddingKey {
        EmbeddingKey(Hash256([n; 32]))
    }

    fn embedding(n: u8) -> Arc<Embedding> {
        Arc::new(Embedding::new(key(n), 2, &[f32::from(n); 4]))
    }

    #[test]
    fn values_are_little_endian_rows_with_their_digest() {
        let embedding = embedding(3);
        assert_eq!((embedding.num_rows, embedding.num_cols), (2, 2));
        assert_eq!(embedding.values[..4], 3f32.to_le_bytes());
        assert_eq!(&embedding.digest.0, blake3::hash(&embedding.values).as_bytes());
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut cache = EmbeddingCache::new(32);
        for n in [1, 2] {
            cache.insert(embedding(n), NOW, NOW).expect("room");
        }
        assert!(cache.pull(&key(1)).is_some());
        cache.insert(embedding(3), NOW, NOW).expect("room");
        assert!(cache.pull(&key(2)).is_none(), "2 was used longest ago");
        assert!(cache.pull(&key(1)).is_some());
        assert_eq!(cache.used_bytes(), 32);
    }

    #[test]
    fn what_waits_to_be_pulled_is_not_evicted() {
        let mut cache = EmbeddingCache::new(32);
        cache.insert(embedding(1), NOW, LATER).expect("room");
        cache.insert(embedding(2), NOW, LATER).expect("room");
        let refused = cache.insert(embedding(3), NOW, LATER);
        assert_eq!(refused, Err(CacheFull { bytes: 16, held_bytes: 32, capacity_bytes: 32 }));
        assert_eq!(cache.num_held(NOW), 2);
        assert!(cache.pull(&key(1)).is_some(), "a pull ends the hold");
        cache.insert(embedding(3), NOW, LATER).expect("room after the pull");
        assert!(cache.locate(&key(1), LATER).is_none());
        assert!(cache.locate(&key(2), LATER).is_some());
        cache.insert(embedding(4), LATER, LATER).expect("holds have run out");
    }

    #[test]
    fn inserting_twice_counts_once() {
        let mut cache = EmbeddingCache::new(32);
        cache.insert(embedding(1), NOW, NOW).expect("room");
        cache.insert(embedding(1), NOW, LATER).expect("known");
        assert_eq!((cache.used_bytes(), cache.num_held(NOW)), (16, 1));
    }
}
