//! Where the embeddings of a request are: not asked for, being encoded, or at an encoder.

use std::collections::{BTreeMap, BTreeSet};

use tessera_types::{Attempt, EmbeddingKey};

use super::{Action, MediaItem};

/// An item that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MediaFailure {
    pub item: u32,
    pub detail: String,
    /// Whether a later request may fare better.
    pub retryable: bool,
}

#[derive(Debug)]
enum Location {
    Unasked,
    Encoding,
    At(String),
}

#[derive(Debug)]
struct Item {
    key: EmbeddingKey,
    eager: bool,
    location: Location,
    encodes: u32,
    avoid: Vec<String>,
    /// Attempts that asked and have no answer yet.
    waiting: BTreeSet<(u32, Attempt)>,
    /// What each choice's attempt was told last.
    told: BTreeMap<u32, (Attempt, String)>,
}

/// All items of one request.
#[derive(Debug)]
pub(super) struct MediaBook {
    items: Vec<Item>,
    max_encodes: u32,
}

impl MediaBook {
    pub fn new(items: &[MediaItem], max_encodes: u32) -> Self {
        let item = |item: &MediaItem| Item {
            key: item.embedding_key,
            eager: item.eager,
            location: Location::Unasked,
            encodes: 0,
            avoid: Vec::new(),
            waiting: BTreeSet::new(),
            told: BTreeMap::new(),
        };
        Self { items: items.iter().map(item).collect(), max_encodes }
    }

    /// Encodes what need not be asked for.
    pub fn start(&mut self, actions: &mut Vec<Action>) -> Result<(), MediaFailure> {
        for index in 0..self.items.len() as u32 {
            let item = &self.items[index as usize];
            if item.eager && matches!(item.location, Location::Unasked) {
                self.encode(index, String::new(), actions)?;
            }
        }
        Ok(())
    }

    /// An open attempt lacks these items. Asking again for what it was told means that the pull failed
    /// or that the embedding was dropped since: the item is encoded again.
    pub fn on_needed(
        &mut self,
        choice: u32,
        attempt: Attempt,
        items: &[u32],
        actions: &mut Vec<Action>,
    ) -> Result<(), MediaFailure> {
        for &index in items {
            let Some(item) = self.items.get_mut(index as usize) else {
                let detail = "the decoder asked for an item that the request does not have".into();
                return Err(MediaFailure { item: index, detail, retryable: true });
            };
            let told = item.told.get(&choice).filter(|(told_to, _)| *told_to == attempt);
            let failed_at = told.map(|(_, endpoint)| endpoint.clone());
            match (&item.location, failed_at) {
                (Location::At(endpoint), Some(failed)) if *endpoint == failed => {
                    item.avoid.push(failed.clone());
                    item.waiting.insert((choice, attempt));
                    self.encode(index, format!("its embedding was lost at {failed}"), actions)?;
                }
                (Location::At(endpoint), _) => {
                    let endpoint = endpoint.clone();
                    item.tell(choice, attempt, index, endpoint, actions);
                }
                (Location::Encoding, _) => {
                    item.waiting.insert((choice, attempt));
                }
                (Location::Unasked, _) => {
                    item.waiting.insert((choice, attempt));
                    self.encode(index, String::new(), actions)?;
                }
            }
        }
        Ok(())
    }

    /// An encoder holds the item; everyone who still waits is told.
    pub fn on_encoded(
        &mut self,
        index: u32,
        endpoint: String,
        key: EmbeddingKey,
        is_current: impl Fn(u32, Attempt) -> bool,
        actions: &mut Vec<Action>,
    ) -> Result<(), MediaFailure> {
        let Some(item) = self.items.get_mut(index as usize) else { return Ok(()) };
        if !matches!(item.location, Location::Encoding) {
            return Ok(());
        }
        if item.key != key {
            let detail = format!("the encoder at {endpoint} has other weights or numerics");
            return self.on_encode_failed(index, Some(endpoint), true, detail, actions);
        }
        item.location = Location::At(endpoint.clone());
        for (choice, attempt) in std::mem::take(&mut item.waiting) {
            if is_current(choice, attempt) {
                item.tell(choice, attempt, index, endpoint.clone(), actions);
            }
        }
        Ok(())
    }

    /// An encoder could not do it.
    pub fn on_encode_failed(
        &mut self,
        index: u32,
        endpoint: Option<String>,
        retryable: bool,
        detail: String,
        actions: &mut Vec<Action>,
    ) -> Result<(), MediaFailure> {
        let Some(item) = self.items.get_mut(index as usize) else { return Ok(()) };
        if !matches!(item.location, Location::Encoding) {
            return Ok(());
        }
        if !retryable {
            return Err(MediaFailure { item: index, detail, retryable });
        }
        item.avoid.extend(endpoint);
        self.encode(index, detail, actions)
    }

    /// The choice's attempt is over: nobody waits for it, and the next one was told nothing.
    pub fn forget(&mut self, choice: u32) {
        for item in &mut self.items {
            item.waiting.retain(|&(waiting, _)| waiting != choice);
            item.told.remove(&choice);
        }
    }

    fn encode(
        &mut self,
        index: u32,
        last_failure: String,
        actions: &mut Vec<Action>,
    ) -> Result<(), MediaFailure> {
        let item = &mut self.items[index as usize];
        if item.encodes >= self.max_encodes {
            return Err(MediaFailure { item: index, detail: last_failure, retryable: true });
        }
        item.encodes += 1;
        item.location = Location::Encoding;
        actions.push(Action::Encode { item: index, avoid: item.avoid.clone() });
        Ok(())
    }
}

impl Item {
    fn tell(
        &mut self,
        choice: u32,
        attempt: Attempt,
        index: u32,
        endpoint: String,
        actions: &mut Vec<Action>,
    ) {
        self.told.insert(choice, (attempt, endpoint.clone()));
        let key = self.key;
        actions.push(Action::SendMediaAt { choice, attempt, item: index, endpoint, key });
    }
}
