//! Which embeddings are asked for, when, and by whom.
//!
//! An embedding is asked for once while it is on its way, however many sequences want it: the others defer
//! to the first. When it has arrived, a deferring sequence that waits is tried again (it may be covered by
//! what the first one computes, else it asks for itself), and one that runs asks. If the first one ends
//! before, the next one asks at once.

use std::collections::HashMap;

use tessera_types::{EmbeddingKey, MediaSpan, SequenceId};

use crate::scheduler::{Place, Scheduler, SequenceEvent};
use crate::sequence::{MediaState, Sequence};

/// Sequences that want an embedding which was asked for and has not arrived: first the one that asked.
pub(crate) type MediaAsks = HashMap<EmbeddingKey, Vec<SequenceId>>;

impl Scheduler {
    /// The embedding of `item` is in place. `false`: no such sequence or item.
    pub fn media_arrived(&mut self, sequence: SequenceId, item: u32) -> bool {
        let Some(known) = self.sequence_mut(sequence) else { return false };
        let mut key = None;
        let spans = known.request.prompt.media.iter().zip(&mut known.media);
        for (span, state) in spans.filter(|(span, _)| span.item == item) {
            *state = MediaState::Arrived;
            key = Some(span.embedding_key);
        }
        let Some(key) = key else { return false };
        self.queue.update(sequence, |waiting| waiting.parked = false);
        self.end_ask(sequence, key, true);
        true
    }

    /// Asks for the embeddings that `num_covered` leading tokens do not cover and that nobody was asked for
    /// on behalf of this sequence, or defers to a sequence that has asked.
    pub(crate) fn ask_for_media(&mut self, id: SequenceId, num_covered: usize) {
        let mut asks = std::mem::take(&mut self.asks);
        let mut items = Vec::new();
        if let Some(sequence) = self.sequence_mut(id) {
            let spans = sequence.request.prompt.media.iter().zip(&mut sequence.media);
            let unasked = |(span, state): &(&MediaSpan, &mut MediaState)| {
                **state == MediaState::Covered && span.end() as usize > num_covered
            };
            for (span, state) in spans.filter(unasked) {
                let wanted_by = asks.entry(span.embedding_key).or_default();
                if !wanted_by.contains(&id) {
                    wanted_by.push(id);
                }
                *state = match wanted_by[0] == id {
                    true => MediaState::Needed,
                    false => MediaState::Deferred,
                };
                if *state == MediaState::Needed {
                    items.push(span.item);
                }
            }
        }
        self.asks = asks;
        if !items.is_empty() {
            self.events.push(SequenceEvent::MediaNeeded { sequence: id, items });
        }
    }

    /// A sequence that is gone asks for nothing any more.
    pub(crate) fn end_asks(&mut self, gone: &Sequence) {
        for span in &gone.request.prompt.media {
            self.end_ask(gone.id(), span.embedding_key, false);
        }
    }

    fn end_ask(&mut self, id: SequenceId, key: EmbeddingKey, arrived: bool) {
        let Some(wanted_by) = self.asks.get_mut(&key) else { return };
        if wanted_by[0] != id {
            wanted_by.retain(|&other| other != id);
            return;
        }
        let mut deferring = self.asks.remove(&key).unwrap_or_default();
        for other in deferring.drain(1..) {
            self.end_deferral(other, key, arrived);
        }
    }

    /// The one to which a sequence deferred has its embedding, or is gone.
    fn end_deferral(&mut self, id: SequenceId, key: EmbeddingKey, arrived: bool) {
        let Some(sequence) = self.sequence_mut(id) else { return };
        let spans = sequence.request.prompt.media.iter().zip(&mut sequence.media);
        let deferred = spans
            .filter(|(span, state)| span.embedding_key == key && **state == MediaState::Deferred);
        deferred.for_each(|(_, state)| *state = MediaState::Covered);
        let num_computed = sequence.num_computed;
        match self.places.get(&id) {
            Some(Place::Waiting) => {
                // It may be covered by now, and then asks for nothing.
                self.queue.update(id, |waiting| waiting.parked = false);
                if arrived {
                    return;
                }
                let sequence = self.queue.get(id).expect("places says that it waits");
                let num_covered = self.num_covered(&self.prefix_hit(sequence));
                self.ask_for_media(id, num_covered);
            }
            Some(Place::Slot(_)) => self.ask_for_media(id, num_computed),
            None => {}
        }
    }
}
