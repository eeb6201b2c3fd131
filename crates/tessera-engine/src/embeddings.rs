//! Which embeddings rank 0 holds, and for whom: an accounting in bytes. The rows themselves are with the
//! executor.
//!
//! A sequence reserves room for all its embeddings at once and before any is asked for, so two sequences
//! can't each hold half of what both need. An embedding that no sequence needs any more stays until its
//! room is wanted, least recently used first; it outlives epochs.

use std::collections::{BTreeMap, HashMap};

use tessera_types::EmbeddingKey;

#[derive(Debug)]
struct Entry {
    bytes: u64,
    /// Sequences that need it.
    num_pins: u32,
    /// The rows have arrived.
    is_present: bool,
    /// Key in `unpinned` while nobody needs it.
    last_use: u64,
}

/// Reserved and present embeddings within a bound of bytes.
#[derive(Debug)]
pub(crate) struct EmbeddingStore {
    max_bytes: u64,
    used_bytes: u64,
    entries: HashMap<EmbeddingKey, Entry>,
    /// Present embeddings that nobody needs, least recently used first.
    unpinned: BTreeMap<u64, EmbeddingKey>,
    num_uses: u64,
}

impl EmbeddingStore {
    pub fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            used_bytes: 0,
            entries: HashMap::new(),
            unpinned: BTreeMap::new(),
            num_uses: 0,
        }
    }

    /// Bytes present or reserved.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Pins every item of one sequence, given by key and bytes without repetition. Returns the embeddings
    /// that were evicted to make room; `None`: there is no room now, and nothing changed.
    pub fn reserve(&mut self, items: &[(EmbeddingKey, u64)]) -> Option<Vec<EmbeddingKey>> {
        let is_new = |(key, _): &&(EmbeddingKey, u64)| !self.entries.contains_key(key);
        let wanted: u64 = items.iter().filter(is_new).map(|(_, bytes)| bytes).sum();
        let kept = |key: &EmbeddingKey| items.iter().any(|(item, _)| item == key);
        let evictable = self.unpinned.values().filter(|key| !kept(key));
        let evictable: u64 = evictable.map(|key| self.entries[key].bytes).sum();
        if self.used_bytes - evictable + wanted > self.max_bytes {
            return None;
        }
        for &(key, bytes) in items {
            self.pin(key, bytes);
        }
        let mut evicted = Vec::new();
        while self.used_bytes > self.max_bytes {
            let (_, key) = self.unpinned.pop_first().expect("enough was evictable");
            self.forget(key);
            evicted.push(key);
        }
        Some(evicted)
    }

    /// The rows of `key` are here. `false`: nobody waits for them.
    pub fn arrived(&mut self, key: EmbeddingKey) -> bool {
        match self.entries.get_mut(&key) {
            Some(entry) if !entry.is_present => {
                entry.is_present = true;
                true
            }
            _ => false,
        }
    }

    pub fn is_present(&self, key: EmbeddingKey) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.is_present)
    }

    /// One sequence less needs `key`. A reservation that nobody needs is given up.
    pub fn unpin(&mut self, key: EmbeddingKey) {
        let entry = self.entries.get_mut(&key).expect("pinned by reserve");
        entry.num_pins -= 1;
        if entry.num_pins > 0 {
            return;
        }
        match entry.is_present {
            true => {
                self.num_uses += 1;
                entry.last_use = self.num_uses;
                self.unpinned.insert(self.num_uses, key);
            }
            false => self.forget(key),
        }
    }

    fn pin(&mut self, key: EmbeddingKey, bytes: u64) {
        let entry = self.entries.entry(key).or_insert_with(|| {
            self.used_bytes += bytes;
            Entry { bytes, num_pins: 0, is_present: false, last_use: 0 }
        });
        entry.num_pins += 1;
        self.unpinned.remove(&entry.last_use);
    }

    fn forget(&mut self, key: EmbeddingKey) {
        let entry = self.entries.remove(&key).expect("a known embedding");
        self.used_bytes -= entry.bytes;
    }
}

#[cfg(test)]
mod tests {
    use tessera_types::Hash256;

    use super::*;

    fn key(n: u8) -> EmbeddingKey {
        EmbeddingKey(Hash256([n; 32]))
    }

    #[test]
    fn room_is_reserved_for_all_or_none() {
        let mut store = EmbeddingStore::new(100);
        assert_eq!(store.reserve(&[(key(1), 40), (key(2), 30)]), Some(vec![]));
        assert_eq!(store.reserve(&[(key(2), 30), (key(3), 31)]), None);
        assert_eq!(store.used_bytes(), 70, "a refusal changes nothing");
        assert_eq!(store.reserve(&[(key(2), 30), (key(3), 30)]), Some(vec![]));
        store.unpin(key(1));
        assert_eq!(store.used_bytes(), 60, "what never arrived is given up");
        store.unpin(key(2));
        assert_eq!(store.used_bytes(), 60, "another sequence still needs it");
    }

    #[test]
    fn what_nobody_needs_is_kept_and_evicted_by_age() {
        let mut store = EmbeddingStore::new(100);
        for n in [1, 2, 3] {
            assert_eq!(store.reserve(&[(key(n), 30)]), Some(vec![]));
            assert!(store.arrived(key(n)) && !store.arrived(key(n)));
        }
        store.unpin(key(2));
        store.unpin(key(1));
        store.unpin(key(3));
        assert!([1, 2, 3].iter().all(|&n| store.is_present(key(n))));
        // A hit makes the oldest pinned again.
        assert_eq!(store.reserve(&[(key(2), 30), (key(4), 30)]), Some(vec![key(1)]));
        assert_eq!(store.reserve(&[(key(5), 61)]), None);
        assert_eq!(store.reserve(&[(key(5), 40)]), Some(vec![key(3)]));
        assert!(store.is_present(key(2)));
        assert_eq!(store.used_bytes(), 100);
    }

    #[test]
    fn rows_that_nobody_waits_for_are_refused() {
        let mut store = EmbeddingStore::new(10);
        assert!(!store.arrived(key(1)));
        assert_eq!(store.reserve(&[(key(1), 11)]), None);
    }
}
