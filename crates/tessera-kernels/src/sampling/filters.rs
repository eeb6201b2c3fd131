//! Filters: each sets the logits it drops to −∞. All of them keep the most likely token.

use std::cmp::Ordering;

use tessera_types::{TokenId, TokenMask};

use super::math::{exp, ln, max, sum_exp};

/// Candidates ranked at first when only `top_p` limits them; nuclei are mostly smaller.
const FIRST_RANKED: usize = 256;

/// Bars every token that the mask does not allow, of the tokens from `first_token` on.
pub fn apply_mask(logits: &mut [f32], first_token: TokenId, mask: &TokenMask) {
    const BITS: usize = u64::BITS as usize;
    let mut rest = logits;
    let mut token = first_token as usize;
    while !rest.is_empty() {
        let (word, bit) = (token / BITS, token % BITS);
        let (group, others) = rest.split_at_mut((BITS - bit).min(rest.len()));
        (rest, token) = (others, token + group.len());
        let allowed = mask.words.get(word).copied().unwrap_or(0);
        if allowed == u64::MAX {
            continue;
        }
        for (bit, logit) in (bit..).zip(group) {
            if allowed >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Divides by `temperature`, which is above zero.
pub fn apply_temperature(logits: &mut [f32], temperature: f32) {
    if temperature != 1.0 {
        logits.iter_mut().for_each(|logit| *logit /= temperature);
    }
}

/// Drops tokens less likely than `min_p` times the most likely one. 0 keeps all.
pub fn apply_min_p(logits: &mut [f32], min_p: f32) {
    if min_p <= 0.0 {
        return;
    }
    let threshold = max(logits) + ln(f64::from(min_p)) as f32;
    for logit in logits.iter_mut().filter(|logit| **logit < threshold) {
        *logit = f32::NEG_INFINITY;
    }
}

/// Keeps the `top_k` most likely tokens, exactly so among equals too: the lower id stays. 0 keeps all.
pub fn apply_top_k(logits: &mut [f32], top_k: usize) {
    if top_k == 0 || top_k >= logits.len() {
        return;
    }
    let mut candidates = candidates(logits);
    if top_k >= candidates.len() {
        return;
    }
    candidates.select_nth_unstable_by(top_k - 1, |&a, &b| rank(logits, a, b));
    bar(logits, &candidates[top_k..]);
}

/// Keeps the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al.
/// 2020); among equals the lower id comes first. The token that crosses the line stays.
pub fn apply_top_p(logits: &mut [f32], top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let max = max(logits);
    let target = f64::from(top_p) * sum_exp(logits, max);
    let mut candidates = candidates(logits);
    let (mut ranked, mut mass) = (0, 0.0);
    let mut width = FIRST_RANKED;
    // Ranks the next few, then four times as many, until the target is reached: a full sort of the
    // vocabulary is rarely needed.
    while ranked < candidates.len() {
        let end = candidates.len().min(ranked + width);
        let rest = &mut candidates[ranked..];
        if end - ranked < rest.len() {
            rest.select_nth_unstable_by(end - ranked - 1, |&a, &b| rank(logits, a, b));
        }
        rest[..end - ranked].sort_unstable_by(|&a, &b| rank(logits, a, b));
        for i in ranked..end {
            mass += f64::from(exp(logits[candidates[i] as usize] - max));
            if mass >= target {
                return bar(logits, &candidates[i + 1..]);
            }
        }
        (ranked, width) = (end, 4 * width);
    }
}

/// Tokens that are not barred, by ascending id.
fn candidates(logits: &[f32]) -> Vec<TokenId> {
    let allowed = |&(_, &logit): &(usize, &f32)| logit > f32::NEG_INFINITY;
    logits.iter().enumerate().filter(allowed).map(|(token, _)| token as TokenId).collect()
}

/// The more likely token first, then the lower id. Logits hold no NaN.
fn rank(logits: &[f32], a: TokenId, b: TokenId) -> Ordering {
    let by_logit = logits[b as usize].partial_cmp(&logits[a as usize]);
    by_logit.unwrap_or(Ordering::Equal).then(a.cmp(&b))
}

fn bar(logits: &mut [f32], tokens: &[TokenId]) {
    for &token in tokens {
        logits[token as usize] = f32::NEG_INFINITY;
    }
}
