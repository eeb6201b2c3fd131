//! The draw: Gumbel-max with a counter-based generator.
//!
//! Token t of a row scores `logit(t) − ln(−ln u(t))`, and the highest score wins, which draws t with
//! probability softmax(logits)(t) (Gumbel 1954; Maddison et al. 2014). `u(t)` is word t mod 4 of
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed
//! as its key and `[t / 4, output index, 0, 0]` as its counter. So a token's score needs nothing but its
//! own logit: ranks may draw over their own part of the vocabulary and compare the winners.

use tessera_types::TokenId;

use super::math::{exp, ln};

/// No score exceeds its logit by more: −ln(−ln(1 − 2^−33)) is 22.87.
const MAX_NOISE: f64 = 23.0;

/// Which draw this is. The seed holds the choice already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    pub seed: u64,
    /// Number of output tokens before this one.
    pub output_index: u32,
}

/// A token and its perturbed logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub token: TokenId,
    pub score: f64,
}

impl Candidate {
    /// The order in which candidates win, whatever order they are compared in.
    pub fn beats(&self, other: &Self) -> bool {
        self.score > other.score || (self.score == other.score && self.token < other.token)
    }
}

/// Index of the highest logit, the lowest among equals; `None` when all are −∞.
pub fn argmax(logits: &[f32]) -> Option<TokenId> {
    let max = super::math::max(logits);
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&logit| logit == max).map(|at| at as TokenId)
}

/// The winner over `logits` of the tokens from `first_token` on; `None` when all are −∞.
///
/// Starts from the highest logit, since its score tells for most others, without their logarithms, that
/// they can't win.
pub fn gumbel_argmax(logits: &[f32], first_token: TokenId, key: DrawKey) -> Option<Candidate> {
    let likeliest = argmax(logits)?;
    let mut noise = Noise::new(key);
    let mut best = candidate(logits[likeliest as usize], first_token + likeliest, &mut noise);
    for (i, &logit) in logits.iter().enumerate() {
        let gap = best.score - f64::from(logit);
        if gap > MAX_NOISE {
            continue;
        }
        // A win needs −ln u ≤ e^−gap, and −ln u is at least 1 − u. The factor covers rounding.
        let token = first_token + i as TokenId;
        let win_below = f64::from(exp(-gap as f32)) * 1.000_01;
        if 1.0 - noise.uniform(token) > win_below {
            continue;
        }
        let challenger = candidate(logit, token, &mut noise);
        if challenger.beats(&best) {
            best = challenger;
        }
    }
    Some(best)
}

/// One token's score.
pub fn gumbel_score(logit: f32, token: TokenId, key: DrawKey) -> f64 {
    candidate(logit, token, &mut Noise::new(key)).score
}

fn candidate(logit: f32, token: TokenId, noise: &mut Noise) -> Candidate {
    let score = f64::from(logit) - ln(-ln(noise.uniform(token)));
    Candidate { token, score }
}

/// Uniform numbers by token; keeps the last block, as four neighbours share one.
struct Noise {
    key: DrawKey,
    block: u32,
    words: [u32; 4],
}

impl Noise {
    fn new(key: DrawKey) -> Self {
        let mut noise = Self { key, block: 0, words: [0; 4] };
        noise.words = noise.generate(0);
        noise
    }

    /// In (0, 1): the middles of 2^32 equal parts.
    fn uniform(&mut self, token: TokenId) -> f64 {
        let block = token / 4;
        if block != self.block {
            (self.block, self.words) = (block, self.generate(block));
        }
        const PART: f64 = 1.0 / 4_294_967_296.0;
        (f64::from(self.words[token as usize % 4]) + 0.5) * PART
    }

    fn generate(&self, block: u32) -> [u32; 4] {
        let key = [self.key.seed as u32, (self.key.seed >> 32) as u32];
        philox_4x32_10([block, self.key.output_index, 0, 0], key)
    }
}

/// Philox4x32-10, as in Random123's `philox.h`.
fn philox_4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product_0 = u64::from(counter[0]) * 0xD251_1F53;
        let product_1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (product_1 >> 32) as u32 ^ counter[1] ^ key[0],
            product_1 as u32,
            (product_0 >> 32) as u32 ^ counter[3] ^ key[1],
            product_0 as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123.
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(
            philox_4x32_10([0; 4], [0; 2]),
            [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]
        );
        assert_eq!(
            philox_4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]
        );
        assert_eq!(
            philox_4x32_10(
                [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
                [0xA409_3822, 0x299F_31D0]
            ),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals() {
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY, -1e30]), Some(1));
        assert_eq!(argmax(&[0.5, 2.0, -1.0, 2.0]), Some(1));
        assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
    }

    /// Every token's score, without shortcuts.
    fn obvious(logits: &[f32], first_token: TokenId, key: DrawKey) -> Option<Candidate> {
        let mut best: Option<Candidate> = None;
        for (i, &logit) in logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY) {
            let token = first_token + i as TokenId;
            let challenger = Candidate { token, score: gumbel_score(logit, token, key) };
            if best.is_none_or(|best| challenger.beats(&best)) {
                best = Some(challenger);
            }
        }
        best
    }

    fn row(len: u32, spread: f32, salt: u32) -> Vec<f32> {
        let hash = |i: u32| philox_4x32_10([i, salt, 1, 1], [5, 5])[0] as f32 / u32::MAX as f32;
        (0..len).map(|i| (hash(i) - 0.5) * spread).collect()
    }

    #[test]
    fn the_shortcuts_change_nothing() {
        for output_index in 0..60 {
            for spread in [0.0, 1.0, 20.0, 80.0] {
                let mut logits = row(1003, spread, output_index);
                logits[7] = f32::NEG_INFINITY;
                let key = DrawKey { seed: 0xDEAD_BEEF_0BAD_F00D, output_index };
                assert_eq!(gumbel_argmax(&logits, 0, key), obvious(&logits, 0, key));
            }
        }
    }

    #[test]
    fn shards_in_any_order_agree_with_the_whole() {
        for output_index in 0..40 {
            let logits = row(1000, 8.0, output_index);
            let key = DrawKey { seed: 42, output_index };
            let whole = gumbel_argmax(&logits, 0, key).unwrap();
            for cut in [1, 250, 333, 999] {
                let (low, high) = logits.split_at(cut);
                let mut shards = [
                    gumbel_argmax(high, cut as u32, key).unwrap(),
                    gumbel_argmax(low, 0, key).unwrap(),
                ];
                for _ in 0..2 {
                    shards.reverse();
                    let winner = if shards[0].beats(&shards[1]) { shards[0] } else { shards[1] };
                    assert_eq!(winner, whole);
                }
            }
        }
    }

    #[test]
    fn nothing_is_drawn_where_nothing_is_allowed() {
        let key = DrawKey { seed: 1, output_index: 0 };
        assert_eq!(gumbel_argmax(&[f32::NEG_INFINITY; 9], 0, key), None);
        let mut one = [f32::NEG_INFINITY; 9];
        one[8] = -3e38;
        assert_eq!(gumbel_argmax(&one, 100, key).unwrap().token, 108);
    }
}
