//! Chooses where work goes, by the policies of [`tessera_cluster::placement`], among endpoints whose
//! weights and numerics fit together.

use std::sync::Arc;
use std::time::Duration;

use tessera_cluster::placement::{EncoderCandidate, GroupCandidate, choose_encoder, choose_group};
use tessera_cluster::request::Target;
use tessera_cluster::view::{EncoderStatus, GroupStatus};
use tessera_cluster::{GroupName, ModelIdentity, Verdict};
use tessera_types::{Epoch, InstanceId, MediaId, ModelFingerprint, NumericsId};

use super::{Shared, State, Upstream};
use crate::clock;

/// What the keys of a request are made of, and how much fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) model: ModelIdentity,
    /// Prompt and output tokens of the largest group of this identity.
    pub(crate) max_model_len: u32,
}

impl Identity {
    /// For conversations that are only to be tokenized.
    pub(crate) fn unknown() -> Self {
        let model = ModelIdentity {
            name: String::new(),
            language_fingerprint: ModelFingerprint::default(),
            vision_fingerprint: ModelFingerprint::default(),
            language_numerics: NumericsId::default(),
            vision_numerics: NumericsId::default(),
        };
        Self { model, max_model_len: u32::MAX }
    }
}

/// A request that looks for a group.
#[derive(Debug)]
pub(crate) struct GroupQuery<'a> {
    pub(crate) identity: &'a ModelIdentity,
    pub(crate) prompt_tokens: u32,
    pub(crate) max_tokens: u32,
    pub(crate) avoid: &'a [(GroupName, Epoch)],
    pub(crate) prefer: Option<NumericsId>,
}

/// There is no encoder for an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoEncoder {
    /// Whether there may be one later.
    pub(crate) retryable: bool,
    /// Whether none is known at all.
    pub(crate) is_unknown: bool,
    pub(crate) detail: &'static str,
}

/// An encoder chosen for an item, whose pixels count as queued there until this is dropped.
#[derive(Debug)]
pub(crate) struct EncoderChoice {
    pub(crate) instance: InstanceId,
    pub(crate) address: String,
    pixels: u64,
    shared: Arc<Shared>,
}

impl Drop for EncoderChoice {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(in_flight) = state.pixels_in_flight.get_mut(&self.instance) {
            *in_flight = in_flight.saturating_sub(self.pixels);
        }
    }
}

impl Upstream {
    /// The identity that new requests are rendered for: that of the best group.
    ///
    /// # Errors
    /// Says why no group can be used.
    pub(crate) fn identity(&self) -> Result<Identity, String> {
        let now = clock::now();
        let mut state = self.shared.state();
        let groups = served_groups(&mut state, &self.shared.model_name, now)?;
        let best = groups.iter().min_by_key(|group| group.verdict);
        let mut model = best.expect("served groups are not empty").record.model.clone();
        let same = groups.iter().filter(|group| same_weights(&group.record.model, &model));
        let max_model_len = same.map(|group| group.record.capacity.max_model_len).max();
        // Only encoders know how embeddings are computed. With several kinds the best one decides, the
        // same for requests at the same time, so that their embeddings can be shared.
        let encoders = state.view.encoders(now).filter_map(|encoder| {
            let theirs = encoder.member.model.as_ref()?;
            same_weights(theirs, &model).then_some((encoder.verdict, theirs.vision_numerics))
        });
        if let Some((_, numerics)) = encoders.min() {
            model.vision_numerics = numerics;
        }
        Ok(Identity { model, max_model_len: max_model_len.unwrap_or(0) })
    }

    /// Whether a request would succeed now.
    ///
    /// # Errors
    /// Says what is missing.
    pub(crate) fn check_ready(&self) -> Result<(), String> {
        let now = clock::now();
        let mut state = self.shared.state();
        let groups = served_groups(&mut state, &self.shared.model_name, now)?;
        let Some(group) = groups.iter().find(|group| group.verdict == Verdict::Ready) else {
            return Err("no decoder group is ready".to_owned());
        };
        let model = group.record.model.clone();
        if !self.shared.config.require_encoder {
            return Ok(());
        }
        let mut encoders = state.view.encoders(now);
        let fits = |e: &EncoderStatus<'_>| {
            e.member.model.as_ref().is_some_and(|theirs| same_weights(theirs, &model))
        };
        let is_ready = |e: &EncoderStatus<'_>| e.verdict == Verdict::Ready && fits(e);
        match encoders.any(|encoder| is_ready(&encoder)) {
            true => Ok(()),
            false => Err("no encoder is ready".to_owned()),
        }
    }

    /// Whether an encoder that works for us is not to be waited for: gone, silent or broken.
    pub(crate) fn encoder_is_out(&self, instance: InstanceId) -> bool {
        self.with_view(|view, now| {
            let found = view.encoders(now).find(|encoder| encoder.member.instance == instance);
            found.is_none_or(|encoder| encoder.verdict == Verdict::Out)
        })
    }

    /// The group for a request.
    ///
    /// # Errors
    /// Says why there is none.
    pub(crate) fn choose_group(&self, query: &GroupQuery<'_>) -> Result<Target, String> {
        let turn = self.next_turn();
        let mut state = self.shared.state();
        let mut groups = served_groups(&mut state, &self.shared.model_name, clock::now())?;
        groups.retain(|group| same_weights(&group.record.model, query.identity));
        if groups.is_empty() {
            return Err("no decoder group has the weights the request was prepared for".to_owned());
        }
        let wanted = query.prompt_tokens.saturating_add(query.max_tokens);
        groups.retain(|group| wanted <= group.record.capacity.max_model_len);
        if groups.is_empty() {
            return Err("no decoder group has a context this long".to_owned());
        }
        let block_size = groups.iter().map(|group| group.record.capacity.block_size).min();
        let prompt_blocks = query.prompt_tokens.div_ceil(block_size.unwrap_or(1).max(1));
        let candidates: Vec<_> = groups.iter().map(|group| candidate(group, query)).collect();
        let chosen = choose_group(prompt_blocks, turn, &candidates)
            .ok_or_else(|| "no decoder group takes requests now".to_owned())?;
        let GroupStatus { name, record, epoch, .. } = groups[chosen];
        Ok(Target {
            group: name.clone(),
            epoch,
            instance: record.instance,
            address: record.address.clone(),
            numerics: record.model.language_numerics,
            // Records do not tell it, so nothing is promised of the bits after a move.
            deterministic: false,
        })
    }

    /// The encoder for an item of `pixels` after resizing, at none of the addresses in `avoid` if there
    /// is another.
    ///
    /// # Errors
    /// Says why there is none.
    pub(crate) fn choose_encoder(
        &self,
        media_id: MediaId,
        pixels: u64,
        identity: &ModelIdentity,
        avoid: &[String],
    ) -> Result<EncoderChoice, NoEncoder> {
        let mut state = self.shared.state();
        let State { view, pixels_in_flight, mismatched, .. } = &mut *state;
        let mut encoders: Vec<_> = view.encoders(clock::now()).collect();
        let known = encoders.len();
        encoders.retain(|encoder| {
            let fits = serves(encoder, identity);
            if !fits && mismatched.insert(encoder.member.instance) {
                log_mismatch("encoder", encoder.member.instance, &encoder.member.address);
            }
            fits
        });
        let in_flight = |encoder: &EncoderStatus<'_>| {
            pixels_in_flight.get(&encoder.member.instance).copied().unwrap_or(0)
        };
        let candidates: Vec<_> = encoders
            .iter()
            .map(|encoder| EncoderCandidate {
                instance: encoder.member.instance,
                verdict: encoder.verdict,
                queued_pixels: encoder.load.queued_pixels.max(in_flight(encoder)),
                max_queued_pixels: encoder.encoder.max_queued_pixels,
                max_item_pixels: encoder.encoder.max_item_pixels,
                avoid: avoid.contains(&encoder.member.address),
            })
            .collect();
        let Some(chosen) = choose_encoder(&media_id.0, pixels, &candidates) else {
            let too_large = candidates.iter().all(|encoder| encoder.max_item_pixels < pixels);
            let (retryable, detail) = match (known, candidates.len()) {
                (0, _) => (true, "no encoder is known"),
                (_, 0) => (true, "no encoder has the weights of the decoder groups"),
                _ if too_large => (false, "it has more pixels than any encoder takes"),
                _ => (true, "no encoder has room for it now"),
            };
            return Err(NoEncoder { retryable, is_unknown: known == 0, detail });
        };
        let member = encoders[chosen].member;
        let (instance, address) = (member.instance, member.address.clone());
        *pixels_in_flight.entry(instance).or_default() += pixels;
        Ok(EncoderChoice { instance, address, pixels, shared: Arc::clone(&self.shared) })
    }
}

/// Groups that serve this router's model with the pinned weights; never empty. The first weights seen are
/// pinned until no group has them any more.
fn served_groups<'a>(
    state: &'a mut State,
    model_name: &str,
    now: Duration,
) -> Result<Vec<GroupStatus<'a>>, String> {
    let State { view, pinned, mismatched, .. } = state;
    let mut groups: Vec<_> = view.groups(now).collect();
    if groups.is_empty() {
        return Err("no decoder group is known".to_owned());
    }
    let named = |group: &GroupStatus<'_>| group.record.model.name == model_name;
    let weights = |group: &GroupStatus<'_>| group.record.model.language_fingerprint;
    let is_pinned = |pin| groups.iter().any(|group| named(group) && weights(group) == pin);
    if !pinned.is_some_and(is_pinned) {
        let best = groups.iter().filter(|group| named(group)).min_by_key(|group| group.verdict);
        *pinned = best.map(weights);
    }
    groups.retain(|group| {
        let fits = named(group) && Some(weights(group)) == *pinned;
        if !fits && mismatched.insert(group.record.instance) {
            let served = &group.record.model.name;
            tracing::error!(
                group = %group.name, served, expected = model_name,
                "decoder group serves another model or other weights, it is not used"
            );
        }
        fits
    });
    match groups.is_empty() {
        true => Err(format!("no decoder group serves {model_name:?}")),
        false => Ok(groups),
    }
}

fn candidate(group: &GroupStatus<'_>, query: &GroupQuery<'_>) -> GroupCandidate {
    let capacity = &group.record.capacity;
    GroupCandidate {
        verdict: group.verdict,
        running: group.load.running,
        waiting: group.load.waiting,
        max_sequences: capacity.max_sequences,
        kv_blocks: capacity.num_kv_blocks,
        kv_blocks_free: group.load.kv_blocks_free,
        cached_tokens: 0,
        preferred_numerics: query.prefer == Some(group.record.model.language_numerics),
        avoid: query.avoid.contains(&(group.name.clone(), group.epoch)),
    }
}

/// Whether both have the same vision tower. A group takes embeddings of any numerics.
fn same_weights(a: &ModelIdentity, b: &ModelIdentity) -> bool {
    a.vision_fingerprint == b.vision_fingerprint
}

/// Whether the encoder makes just the embeddings that a request's keys name.
fn serves(encoder: &EncoderStatus<'_>, identity: &ModelIdentity) -> bool {
    encoder.member.model.as_ref().is_some_and(|model| {
        same_weights(model, identity) && model.vision_numerics == identity.vision_numerics
    })
}

fn log_mismatch(role: &str, instance: InstanceId, address: &str) {
    tracing::error!(
        role,
        %instance,
        address,
        "vision weights or numerics differ from those of the decoder groups, it is not used"
    );
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
