//! Where the beginning of a sequence is found: in the prefix cache, and in the blocks of a running
//! sequence that computes the same prompt.
//!
//! Blocks enter the prefix cache when their step was applied. Equal prompts that arrive together (the
//! choices of one request) would all be computed until then, so each running sequence is also findable by
//! the key of its first block outside the cache. What it has computed or scheduled is shared at once, in
//! the same step too: a layer writes the keys and values of all rows before any row reads, and steps run
//! in order. What it has not scheduled yet is computed in its row when the other one's turn comes (see
//! `admit`), so nobody waits for a turn of the other's, and nothing is left to wait for if the other one
//! ends, is preempted or lacks an embedding: the sequence then computes the rest by itself.
//!
//! Only full blocks are shared, and a shared block is never written, so no block is ever copied on write.
//! The partial last block of a prompt is computed once per sequence. Copying it would save fewer than
//! `block_size` rows per choice, as the last prompt row must be computed anyway to draw from, and would
//! need keys for partial contents and an owner that is kept from ending until the copy is made.

use tessera_types::{BlockId, SequenceSlot};

use crate::scheduler::Scheduler;
use crate::sequence::{Sequence, Stage};

/// Blocks that hold the beginning of a sequence.
pub(crate) struct PrefixHit {
    pub blocks: Vec<BlockId>,
    /// A running sequence that goes on with the same tokens.
    pub source: Option<PrefixSource>,
}

/// A running sequence with the same beginning.
#[derive(Clone, Copy)]
pub(crate) struct PrefixSource {
    pub slot: SequenceSlot,
    /// Leading blocks that both have in common and that the other may use.
    pub num_blocks: usize,
}

impl Scheduler {
    /// Blocks that hold the beginning of the sequence. At least one token is left to compute, as a step
    /// must have a row to draw from, and every row whose log probability is still to be reported.
    pub(crate) fn prefix_hit(&self, sequence: &Sequence) -> PrefixHit {
        let keys = &sequence.request.block_keys;
        let num_tokens = (sequence.len() - 1).min(sequence.first_unreported_row());
        let longest = (num_tokens / self.config.block_size as usize).min(keys.len());
        let cached = keys[..longest].iter().map_while(|key| self.pool.lookup(key));
        let mut blocks: Vec<_> = cached.collect();
        let next = keys[..longest].get(blocks.len());
        let owner = next.and_then(|key| self.frontiers.get(key));
        let owner = owner.filter(|slot| self.at(**slot).num_registered_blocks == blocks.len());
        let source = owner.map(|&slot| {
            let others = &self.at(slot).request.block_keys;
            // A key stands for everything up to its block, so equal ones come before unequal ones.
            let (mut low, mut high) = (blocks.len() + 1, longest.min(others.len()));
            while low < high {
                let middle = (low + high).div_ceil(2);
                match keys[middle - 1] == others[middle - 1] {
                    true => low = middle,
                    false => high = middle - 1,
                }
            }
            PrefixSource { slot, num_blocks: low }
        });
        if let Some(PrefixSource { slot, num_blocks }) = source {
            let owner = self.at(slot);
            let num_scheduled = owner.num_computed / self.config.block_size as usize;
            let shared = blocks.len()..num_scheduled.min(num_blocks).max(blocks.len());
            blocks.extend_from_slice(&owner.blocks[shared]);
        }
        PrefixHit { blocks, source }
    }

    /// Leading tokens that the sequence need not compute: those of the hit, and those that its source can
    /// compute without waiting for anything.
    pub(crate) fn num_covered(&self, hit: &PrefixHit) -> usize {
        let block_size = self.config.block_size as usize;
        let coming = hit.source.map_or(0, |source| {
            let owner = self.at(source.slot);
            source.num_blocks.min((owner.num_computed + owner.gap()) / block_size)
        });
        coming.max(hit.blocks.len()) * block_size
    }

    /// Makes a running sequence findable by the key of its first block outside the prefix cache. Of several
    /// with the same key the first is.
    pub(crate) fn enter_frontier(&mut self, slot: SequenceSlot) {
        let sequence = self.at(slot);
        let key = sequence.request.block_keys.get(sequence.num_registered_blocks);
        if let Some(&key) = key.filter(|_| sequence.stage == Stage::Running) {
            self.frontiers.entry(key).or_insert(slot);
        }
    }

    /// Undoes [`Scheduler::enter_frontier`], before the sequence's blocks are registered or it leaves.
    pub(crate) fn leave_frontier(&mut self, slot: SequenceSlot) {
        let sequence = self.at(slot);
        if let Some(key) = sequence.request.block_keys.get(sequence.num_registered_blocks)
            && self.frontiers.get(key) == Some(&slot)
        {
            let key = *key;
            self.frontiers.remove(&key);
        }
    }
}
