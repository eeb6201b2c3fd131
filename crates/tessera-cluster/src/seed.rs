//! Seeds of choices. The router draws one effective seed per request; choice `i` draws with
//! H(seed, i), so that choices differ, and a moved or resumed choice goes on with the same draws.

/// Weyl increment of SplitMix64: 2^64 divided by the golden ratio, made odd.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Seed of choice `choice` (from 0) of a request with effective seed `seed`: output `choice` of the
/// SplitMix64 generator started at `seed` (Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", 2014). Part of the wire contract: it must never change.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    mix64(seed.wrapping_add(GOLDEN_GAMMA.wrapping_mul(u64::from(choice) + 1)))
}

/// The output function of SplitMix64, a bijection on 64 bits.
pub(crate) fn mix64(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_the_published_outputs_of_splitmix64() {
        // Reference outputs for state 0 and for state 1234567.
        let zero: Vec<u64> = (0..3).map(|i| choice_seed(0, i)).collect();
        assert_eq!(zero, [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f]);
        let other: Vec<u64> = (0..3).map(|i| choice_seed(1_234_567, i)).collect();
        assert_eq!(
            other,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }
}
