//! The KV blocks of one epoch: reference counts, a free list in LRU order, and the prefix cache.
//!
//! A block with no reference is free. If its contents have a key it stays findable until the block is
//! taken again, and such blocks are taken last, least recently freed first. Who may drop a reference and
//! when (never while a step in flight names the block) is the scheduler's rule, not the pool's.

use std::collections::HashMap;

use tessera_types::{BlockId, BlockKey};

/// End of the free list's links.
const NIL: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Block {
    num_references: u32,
    key: Option<BlockKey>,
    /// Neighbours in the free list; meaningful while `num_references` is 0.
    previous: u32,
    next: u32,
}

/// All blocks of the KV cache.
#[derive(Debug, Clone)]
pub struct BlockPool {
    blocks: Vec<Block>,
    by_key: HashMap<BlockKey, BlockId>,
    /// Taken next.
    head: u32,
    /// Taken last.
    tail: u32,
    num_free: usize,
    num_evicted: u64,
}

impl BlockPool {
    /// A pool of free blocks without contents.
    pub fn new(num_blocks: u32) -> Self {
        let block = Block { num_references: 0, key: None, previous: NIL, next: NIL };
        let mut pool = Self {
            blocks: vec![block; num_blocks as usize],
            by_key: HashMap::new(),
            head: NIL,
            tail: NIL,
            num_free: 0,
            num_evicted: 0,
        };
        for index in 0..num_blocks {
            pool.push_back(index);
        }
        pool
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`BlockPool::take`] could give, cached ones included.
    pub fn num_free(&self) -> usize {
        self.num_free
    }

    /// Blocks taken although they held something that could be found, since construction.
    pub fn num_evicted(&self) -> u64 {
        self.num_evicted
    }

    /// Takes a free block and forgets what it held. `None`: every block is referenced.
    pub fn take(&mut self) -> Option<BlockId> {
        if self.head == NIL {
            return None;
        }
        let index = self.head;
        self.unlink(index);
        let block = &mut self.blocks[index as usize];
        block.num_references = 1;
        if let Some(key) = block.key.take() {
            self.by_key.remove(&key);
            self.num_evicted += 1;
        }
        Some(BlockId(index))
    }

    /// The block that holds `key`, without a new reference.
    pub fn lookup(&self, key: &BlockKey) -> Option<BlockId> {
        self.by_key.get(key).copied()
    }

    /// Whether nobody refers to the block.
    pub fn is_free(&self, block: BlockId) -> bool {
        self.blocks[block.index()].num_references == 0
    }

    /// Adds a reference to a block found by [`BlockPool::lookup`], reviving it if it was free.
    pub fn share(&mut self, block: BlockId) {
        if self.is_free(block) {
            self.unlink(block.0);
        }
        self.blocks[block.index()].num_references += 1;
    }

    /// Drops one reference. The last one frees the block: with a key to the end of the free list, without
    /// one to its front.
    pub fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.index()];
        assert!(entry.num_references > 0, "block {block} is released more often than taken");
        entry.num_references -= 1;
        if entry.num_references > 0 {
            return;
        }
        match entry.key {
            Some(_) => self.push_back(block.0),
            None => self.push_front(block.0),
        }
    }

    /// Makes the full contents of a referenced block findable. The first block with a key keeps it.
    pub fn register(&mut self, block: BlockId, key: BlockKey) {
        let entry = &mut self.blocks[block.index()];
        assert!(entry.num_references > 0, "block {block} is registered while free");
        if entry.key.is_none() && !self.by_key.contains_key(&key) {
            entry.key = Some(key);
            self.by_key.insert(key, block);
        }
    }

    fn unlink(&mut self, index: u32) {
        let Block { previous, next, .. } = self.blocks[index as usize];
        match previous {
            NIL => self.head = next,
            _ => self.blocks[previous as usize].next = next,
        }
        match next {
            NIL => self.tail = previous,
            _ => self.blocks[next as usize].previous = previous,
        }
        self.num_free -= 1;
    }

    fn push_back(&mut self, index: u32) {
        let tail = std::mem::replace(&mut self.tail, index);
        let block = &mut self.blocks[index as usize];
        (block.previous, block.next) = (tail, NIL);
        match tail {
            NIL => self.head = index,
            _ => self.blocks[tail as usize].next = index,
        }
        self.num_free += 1;
    }

    fn push_front(&mut self, index: u32) {
        let head = std::mem::replace(&mut self.head, index);
        let block = &mut self.blocks[index as usize];
        (block.previous, block.next) = (NIL, head);
        match head {
            NIL => self.tail = index,
            _ => self.blocks[head as usize].previous = index,
        }
        self.num_free += 1;
    }
}

#[cfg(test)]
mod tests {
    use tessera_types::Hash256;

    use super::*;

    fn key(n: u8) -> BlockKey {
        BlockKey(Hash256([n; 32]))
    }

    #[test]
    fn every_block_is_given_once() {
        let mut pool = BlockPool::new(3);
        let mut taken: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((taken.len(), pool.num_free()), (3, 0));
        taken.sort();
        taken.dedup();
        assert_eq!(taken.len(), 3);
        pool.release(taken[1]);
        assert_eq!(pool.take(), Some(taken[1]));
    }

    #[test]
    fn a_shared_block_is_free_after_its_last_release() {
        let mut pool = BlockPool::new(1);
        let block = pool.take().expect("a free block");
        pool.register(block, key(1));
        pool.share(pool.lookup(&key(1)).expect("registered"));
        pool.release(block);
        assert_eq!(pool.take(), None);
        pool.release(block);
        assert_eq!((pool.num_free(), pool.lookup(&key(1))), (1, Some(block)));
    }

    #[test]
    fn cached_blocks_go_last_and_least_recently_freed_first() {
        let mut pool = BlockPool::new(4);
        let blocks: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        for (i, &block) in blocks[..3].iter().enumerate() {
            pool.register(block, key(i as u8));
            pool.release(block);
        }
        pool.release(blocks[3]);
        assert_eq!(pool.take(), Some(blocks[3]), "the block without contents goes first");
        // A hit makes the oldest the most recently used.
        pool.share(blocks[0]);
        pool.release(blocks[0]);
        assert_eq!(pool.take(), Some(blocks[1]));
        assert_eq!(pool.lookup(&key(1)), None, "a taken block is forgotten");
        assert_eq!(pool.num_evicted(), 1);
        assert_eq!(
            [pool.take(), pool.take(), pool.take()],
            [Some(blocks[2]), Some(blocks[0]), None]
        );
    }

    #[test]
    fn the_first_block_with_a_key_keeps_it() {
        let mut pool = BlockPool::new(2);
        let (first, second) = (pool.take().expect("free"), pool.take().expect("free"));
        pool.register(first, key(7));
        pool.register(second, key(7));
        pool.release(second);
        assert_eq!(pool.lookup(&key(7)), Some(first));
        assert_eq!(pool.take(), Some(second));
        assert_eq!(pool.lookup(&key(7)), Some(first));
    }
}
