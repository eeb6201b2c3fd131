//! What each rank of a tensor-parallel group holds (ENGINE §5). Pure arithmetic over shapes.

use std::ops::Range;

use tessera_types::Rank;

use crate::config::TextConfig;

/// MLP and vocabulary are cut in runs of this many, the width of a BF16 tile.
const UNIT: usize = 16;

/// A rank's run of an axis, and the length it is padded to with zeros, equal on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub range: Range<usize>,
    pub padded: usize,
}

impl Shard {
    /// The whole axis on one rank.
    pub fn whole(len: usize) -> Self {
        Self { range: 0..len, padded: len }
    }

    /// An axis cut into equal runs of whole units; the last ranks may hold padding in part or only.
    pub fn of_units(len: usize, unit: usize, rank: usize, world_size: usize) -> Self {
        let padded = len.div_ceil(unit * world_size) * unit;
        Self { range: (rank * padded).min(len)..((rank + 1) * padded).min(len), padded }
    }

    /// The same run of an axis `by` times as long: heads to rows.
    #[must_use]
    pub fn scaled(&self, by: usize) -> Self {
        Self { range: self.range.start * by..self.range.end * by, padded: self.padded * by }
    }
}

/// A tensor-parallel degree that the model's shapes don't allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SplitError {
    #[error(
        "tensor parallel degree {world_size} is impossible with {num_kv_heads} KV heads: it must divide \
         them or be a multiple of them"
    )]
    Degree { world_size: u32, num_kv_heads: usize },
    #[error("rank {rank} does not exist in a group of {world_size}")]
    Rank { rank: Rank, world_size: u32 },
}

/// One rank's share of the language model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpSplit {
    pub rank: Rank,
    pub world_size: u32,
    /// Query heads, in whole groups of their KV head; padded with zero heads.
    pub query_heads: Shard,
    /// KV heads; a head is on several ranks when there are more ranks than KV heads.
    pub kv_heads: Range<usize>,
    /// Rows of gate and up, columns of down.
    pub mlp: Shard,
    /// Rows of the embedding table and of the head.
    pub vocab: Shard,
}

impl TpSplit {
    /// The share of `rank` in a group of `world_size`.
    ///
    /// # Errors
    /// A degree that neither divides the KV heads nor is a multiple of them; a rank out of range.
    pub fn new(config: &TextConfig, rank: Rank, world_size: u32) -> Result<Self, SplitError> {
        if rank.0 >= world_size {
            return Err(SplitError::Rank { rank, world_size });
        }
        let (index, ranks, kv) = (rank.index(), world_size as usize, config.num_kv_heads);
        let group = config.num_heads / kv;
        let (kv_heads, query_heads) = if kv.is_multiple_of(ranks) {
            let per_rank = kv / ranks;
            let kv_heads = index * per_rank..(index + 1) * per_rank;
            let query = kv_heads.start * group..kv_heads.end * group;
            (kv_heads, Shard { padded: query.len(), range: query })
        } else if ranks.is_multiple_of(kv) {
            let sharing = ranks / kv;
            let (head, part) = (index / sharing, index % sharing);
            let padded = group.div_ceil(sharing);
            let within = |at: usize| head * group + (at * padded).min(group);
            (head..head + 1, Shard { range: within(part)..within(part + 1), padded })
        } else {
            return Err(SplitError::Degree { world_size, num_kv_heads: kv });
        };
        Ok(Self {
            rank,
            world_size,
            query_heads,
            kv_heads,
            mlp: Shard::of_units(config.intermediate_size, UNIT, index, ranks),
            vocab: Shard::of_units(config.vocab_size, UNIT, index, ranks),
        })
    }

    /// The KV heads as a run without padding.
    pub fn kv_shard(&self) -> Shard {
        Shard { range: self.kv_heads.clone(), padded: self.kv_heads.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, kv: usize, intermediate: usize, vocab: usize) -> TextConfig {
        TextConfig {
            hidden_size: heads * 128,
            num_layers: 1,
            num_heads: heads,
            num_kv_heads: kv,
            head_dim: 128,
            intermediate_size: intermediate,
            vocab_size: vocab,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            mrope_section: [16, 24, 24],
            yarn: None,
            max_position_embeddings: 4096,
            tie_word_embeddings: false,
        }
    }

    fn splits(config: &TextConfig, world_size: u32) -> Result<Vec<TpSplit>, SplitError> {
        (0..world_size).map(|rank| TpSplit::new(config, Rank(rank), world_size)).collect()
    }

    /// 3B, 7B, 72B and shapes that divide badly.
    fn models() -> [TextConfig; 6] {
        [
            config(16, 2, 11008, 151936),
            config(28, 4, 18944, 152064),
            config(64, 8, 29568, 152064),
            config(14, 2, 300, 2176),
            config(2, 1, 172, 2177),
            config(15, 3, 7, 31),
        ]
    }

    type Axis = fn(&TpSplit) -> &Shard;

    #[test]
    fn ranks_cover_every_axis_once_in_order() {
        for config in models() {
            for world_size in 1..=16 {
                let Ok(splits) = splits(&config, world_size) else { continue };
                let axes: [(Axis, usize); 3] = [
                    (|split| &split.query_heads, config.num_heads),
                    (|split| &split.mlp, config.intermediate_size),
                    (|split| &split.vocab, config.vocab_size),
                ];
                for (axis, len) in axes {
                    let mut next = 0;
                    for split in &splits {
                        let shard = axis(split);
                        assert_eq!(shard.range.start, next, "{config:?} at TP {world_size}");
                        assert!(shard.range.len() <= shard.padded);
                        assert_eq!(
                            shard.padded,
                            axis(&splits[0]).padded,
                            "ranks hold equal shapes"
                        );
                        next = shard.range.end;
                    }
                    assert_eq!(next, len);
                }
            }
        }
    }

    #[test]
    fn every_query_head_meets_its_own_kv_head() {
        for config in models() {
            let group = config.num_heads / config.num_kv_heads;
            for world_size in 1..=16 {
                let Ok(splits) = splits(&config, world_size) else { continue };
                for split in splits {
                    // The backend pairs local query head j with local KV head j / (padded / kv heads).
                    let local_group = split.query_heads.padded / split.kv_heads.len();
                    for (local, head) in split.query_heads.range.clone().enumerate() {
                        assert_eq!(split.kv_heads.start + local / local_group, head / group);
                    }
                }
            }
        }
    }

    #[test]
    fn units_stay_whole() {
        for config in models() {
            for split in splits(&config, config.num_kv_heads as u32).unwrap() {
                assert!(
                    split.mlp.padded.is_multiple_of(UNIT)
                        && split.vocab.padded.is_multiple_of(UNIT)
                );
            }
        }
    }

    #[test]
    fn seven_b_at_eight_ranks_pads_every_second_rank() {
        let config = config(28, 4, 18944, 152064);
        let heads: Vec<_> =
            splits(&config, 8).unwrap().into_iter().map(|s| s.query_heads).collect();
        assert!(heads.iter().all(|shard| shard.padded == 4));
        assert_eq!(
            heads.iter().map(|s| s.range.len()).collect::<Vec<_>>(),
            [4, 3, 4, 3, 4, 3, 4, 3]
        );
        assert_eq!(heads[1].range, 4..7);
    }

    #[test]
    fn impossible_degrees_are_refused() {
        let seven = config(28, 4, 18944, 152064);
        for world_size in [3, 5, 6, 7, 9, 10] {
            let error = TpSplit::new(&seven, Rank(0), world_size).unwrap_err();
            assert_eq!(error, SplitError::Degree { world_size, num_kv_heads: 4 });
        }
        let error = TpSplit::new(&seven, Rank(4), 4).unwrap_err();
        assert_eq!(error, SplitError::Rank { rank: Rank(4), world_size: 4 });
        assert!(TpSplit::new(&seven, Rank(0), 0).is_err());
    }
}
