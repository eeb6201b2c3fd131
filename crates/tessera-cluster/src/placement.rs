//! Where work goes: pure functions of what is known.
//!
//! Media go by rendezvous hashing of their content, so that equal bytes meet the same encoder cache
//! from every router, bounded by load in pixels. Requests go to the group with the least work for them,
//! where a cached prefix counts as work already done, within a bound.

use tessera_types::{Hash256, InstanceId};

use crate::evidence::Verdict;

/// An encoder may hold this share more than its part of all pixels before the next in rank is taken
/// (consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam, 2016).
const LOAD_BOUND_PERCENT: u64 = 125;

/// An encoder to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderCandidate {
    pub instance: InstanceId,
    pub verdict: Verdict,
    /// Pixels queued or being encoded.
    pub queued_pixels: u64,
    pub max_queued_pixels: u64,
    /// Largest item it takes.
    pub max_item_pixels: u64,
    /// Already failed for this item.
    pub avoid: bool,
}

/// A decoder group to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupCandidate {
    pub verdict: Verdict,
    pub running: u32,
    pub waiting: u32,
    pub max_sequences: u32,
    pub kv_blocks: u32,
    pub kv_blocks_free: u32,
    /// Prompt tokens it probably holds in its prefix cache.
    pub cached_tokens: u32,
    /// Whether its numerics are those that a moved request prefers.
    pub preferred_numerics: bool,
    /// Already failed for this request.
    pub avoid: bool,
}

/// Indices of `instances` by rendezvous weight of `content`, best first (Thaler and Ravishankar, "A
/// name-based mapping scheme for rendezvous", 1996). Adding or removing an instance moves only what it
/// gains or loses.
pub fn rank_by_content(content: &Hash256, instances: &[InstanceId]) -> Vec<usize> {
    let weight = |instance: &InstanceId| {
        let mut hasher = blake3::Hasher::new_keyed(content.as_bytes());
        hasher.update(instance.0.as_bytes());
        *hasher.finalize().as_bytes()
    };
    let mut ranked: Vec<_> = instances.iter().enumerate().map(|(i, id)| (weight(id), i)).collect();
    ranked.sort_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|(_, i)| i).collect()
}

/// The encoder for an item of `pixels`, as an index; `None` if none may take it. Takes the best ranked
/// one within the load bound, then the least loaded, then one that is merely suspect.
pub fn choose_encoder(
    content: &Hash256,
    pixels: u64,
    candidates: &[EncoderCandidate],
) -> Option<usize> {
    let fits = |c: &EncoderCandidate| {
        let queue = c.queued_pixels.saturating_add(pixels) <= c.max_queued_pixels;
        // An idle encoder takes anything it can hold at all: a bound below one item would starve it.
        pixels <= c.max_item_pixels && (queue || c.queued_pixels == 0)
    };
    let best_verdict = |avoid: bool| {
        let usable = candidates.iter().filter(|c| c.avoid == avoid && fits(c));
        usable.map(|c| c.verdict).filter(|v| *v <= Verdict::Suspect).min()
    };
    let (avoid, verdict) =
        [false, true].into_iter().find_map(|a| best_verdict(a).map(|v| (a, v)))?;
    let eligible = |c: &EncoderCandidate| c.avoid == avoid && c.verdict == verdict && fits(c);
    let pool: Vec<&EncoderCandidate> = candidates.iter().filter(|c| c.verdict == verdict).collect();
    let total: u64 = pool.iter().map(|c| c.queued_pixels).sum::<u64>().saturating_add(pixels);
    let bound = (total / pool.len() as u64).saturating_mul(LOAD_BOUND_PERCENT).div_ceil(100);
    let instances: Vec<InstanceId> = candidates.iter().map(|c| c.instance).collect();
    let ranked = rank_by_content(content, &instances);
    let within = |i: &usize| candidates[*i].queued_pixels < bound.max(1);
    let mut eligible_ranked = ranked.iter().copied().filter(|&i| eligible(&candidates[i]));
    eligible_ranked
        .clone()
        .find(within)
        .or_else(|| eligible_ranked.by_ref().min_by_key(|&i| candidates[i].queued_pixels))
}

/// Encoders that keep an upload: the two best ranked that may be used.
pub fn choose_upload_homes(content: &Hash256, candidates: &[EncoderCandidate]) -> Vec<usize> {
    let instances: Vec<InstanceId> = candidates.iter().map(|c| c.instance).collect();
    let ranked = rank_by_content(content, &instances);
    ranked.into_iter().filter(|&i| candidates[i].verdict <= Verdict::Suspect).take(2).collect()
}

/// The group for a request, as an index; `None` if none may take it. `prompt_blocks` is what the prompt
/// needs at once. Order: verdict, preferred numerics, room now, least work; ties go round by `salt`, so
/// that idle groups share requests.
pub fn choose_group(prompt_blocks: u32, salt: u64, candidates: &[GroupCandidate]) -> Option<usize> {
    let len = candidates.len() as u64;
    let cost = |i: usize| {
        let c = &candidates[i];
        let has_room = c.kv_blocks_free >= prompt_blocks && c.running < c.max_sequences;
        let turn = (i as u64 + len - salt % len) % len;
        (c.verdict, !c.preferred_numerics, !has_room, work_of(c), turn)
    };
    let usable = |&i: &usize| {
        let c = &candidates[i];
        !c.avoid && c.verdict <= Verdict::Suspect && prompt_blocks <= c.kv_blocks
    };
    (0..candidates.len()).filter(usable).min_by_key(|&i| cost(i))
}

/// Sequences ahead of a new one, in hundredths. A cached prefix is worth up to one sequence per 512
/// tokens and no more than two, so that affinity never piles requests on one group while others idle.
fn work_of(candidate: &GroupCandidate) -> i64 {
    let queued = i64::from(candidate.running) + 2 * i64::from(candidate.waiting);
    let credit = (i64::from(candidate.cached_tokens) * 100 / 512).min(200);
    queued * 100 - credit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(queued_pixels: u64) -> EncoderCandidate {
        EncoderCandidate {
            instance: InstanceId::random(),
            verdict: Verdict::Ready,
            queued_pixels,
            max_queued_pixels: 10_000_000,
            max_item_pixels: 5_000_000,
            avoid: false,
        }
    }

    fn group(running: u32) -> GroupCandidate {
        GroupCandidate {
            verdict: Verdict::Ready,
            running,
            waiting: 0,
            max_sequences: 64,
            kv_blocks: 1000,
            kv_blocks_free: 500,
            cached_tokens: 0,
            preferred_numerics: false,
            avoid: false,
        }
    }

    fn content(i: u32) -> Hash256 {
        Hash256(*blake3::hash(&i.to_le_bytes()).as_bytes())
    }

    #[test]
    fn losing_an_encoder_moves_only_its_own_items() {
        let all: Vec<InstanceId> = (0..5).map(|_| InstanceId::random()).collect();
        let fewer = &all[..4];
        let mut counts = [0; 5];
        for i in 0..1000 {
            let before = rank_by_content(&content(i), &all)[0];
            counts[before] += 1;
            if before != 4 {
                assert_eq!(rank_by_content(&content(i), fewer)[0], before);
            }
        }
        assert!(counts.iter().all(|&n| n > 120), "uneven: {counts:?}");
    }

    #[test]
    fn equal_content_meets_the_same_encoder_until_it_is_overloaded() {
        let mut encoders = [encoder(0), encoder(0), encoder(0)];
        let home = choose_encoder(&content(1), 1000, &encoders).unwrap();
        assert_eq!(choose_encoder(&content(1), 1000, &encoders), Some(home));
        encoders[home].queued_pixels = 1_000_000;
        let second = choose_encoder(&content(1), 1000, &encoders).unwrap();
        assert_ne!(second, home);
        assert_eq!(second, rank_of(&encoders)[1]);
    }

    fn rank_of(encoders: &[EncoderCandidate]) -> Vec<usize> {
        let instances: Vec<InstanceId> = encoders.iter().map(|e| e.instance).collect();
        rank_by_content(&content(1), &instances)
    }

    #[test]
    fn no_encoder_exceeds_its_bound_under_skewed_content() {
        let mut encoders = [encoder(0), encoder(0), encoder(0), encoder(0)];
        for _ in 0..400 {
            let i = choose_encoder(&content(7), 1000, &encoders).unwrap();
            encoders[i].queued_pixels += 1000;
        }
        let most = encoders.iter().map(|e| e.queued_pixels).max().unwrap();
        assert!(most <= 126_000, "the hottest encoder holds {most} of 400000 pixels");
    }

    #[test]
    fn full_failed_and_unfit_encoders_are_passed_over() {
        let mut encoders = [encoder(9_999_500), encoder(0), encoder(0)];
        encoders[1].verdict = Verdict::Out;
        encoders[2].max_item_pixels = 10;
        assert_eq!(choose_encoder(&content(3), 1000, &encoders), None);
        encoders[1].verdict = Verdict::Suspect;
        assert_eq!(choose_encoder(&content(3), 1000, &encoders), Some(1));
        encoders[1].avoid = true;
        assert_eq!(choose_encoder(&content(3), 1000, &encoders), Some(1), "nobody else is left");
        assert_eq!(choose_encoder(&content(3), 1000, &[]), None);
    }

    #[test]
    fn the_less_loaded_group_wins_unless_a_prefix_is_worth_it() {
        let mut groups = [group(5), group(3)];
        assert_eq!(choose_group(1, 0, &groups), Some(1));
        groups[0].cached_tokens = 2048;
        groups[0].running = 4;
        assert_eq!(choose_group(1, 0, &groups), Some(0));
        groups[0].running = 30;
        groups[0].cached_tokens = 1_000_000;
        assert_eq!(choose_group(1, 0, &groups), Some(1), "affinity is bounded");
    }

    #[test]
    fn idle_groups_take_turns_and_unusable_ones_are_skipped() {
        let mut groups = [group(0), group(0), group(0)];
        let turns: Vec<_> = (0..6).map(|salt| choose_group(1, salt, &groups).unwrap()).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
        groups[0].verdict = Verdict::Draining;
        groups[1].avoid = true;
        groups[2].kv_blocks_free = 0;
        groups[2].running = 64;
        assert_eq!(choose_group(1, 0, &groups), Some(2), "a full group queues");
        assert_eq!(choose_group(1001, 0, &groups), None, "it could never fit");
        assert_eq!(choose_group(1, 0, &[]), None);
    }

    #[test]
    fn a_moved_request_prefers_equal_numerics() {
        let mut groups = [group(0), group(9)];
        groups[1].preferred_numerics = true;
        assert_eq!(choose_group(1, 0, &groups), Some(1));
    }

    #[test]
    fn uploads_live_on_two_encoders() {
        let encoders = [encoder(0), encoder(0), encoder(0)];
        let homes = choose_upload_homes(&content(1), &encoders);
        assert_eq!(homes, rank_of(&encoders)[..2]);
    }
}
