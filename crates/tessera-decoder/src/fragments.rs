//! Plans larger than one chunk. A step that admits many long prompts exceeds what one message may hold, so
//! it travels in pieces, in order on the same stream.

use prost::Message;
use tessera_proto::MAX_CHUNK_BYTES;
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::leader_message::Message as Content;

/// Largest plan: every sequence of a step with a prompt as long as models have contexts.
const MAX_PLAN_BYTES: usize = 256 << 20;

/// The messages that carry `plan`: itself, or its pieces.
pub(crate) fn split(plan: pb::Plan) -> Vec<pb::LeaderMessage> {
    let message = |content| pb::LeaderMessage { message: Some(content) };
    if plan.encoded_len() <= MAX_CHUNK_BYTES {
        return vec![message(Content::Plan(plan))];
    }
    let encoded = plan.encode_to_vec();
    let num_pieces = encoded.len().div_ceil(MAX_CHUNK_BYTES);
    let piece = |(i, data): (usize, &[u8])| {
        let fragment = pb::PlanFragment { data: data.to_vec().into(), last: i + 1 == num_pieces };
        message(Content::Fragment(fragment))
    };
    encoded.chunks(MAX_CHUNK_BYTES).enumerate().map(piece).collect()
}

/// Why pieces do not make a plan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FragmentError {
    #[error("more than {MAX_PLAN_BYTES} bytes")]
    TooLarge,
    #[error("not a plan")]
    Malformed(#[from] prost::DecodeError),
}

/// Pieces of one plan, as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    encoded: Vec<u8>,
}

impl Fragments {
    /// The plan, once its last piece is here.
    ///
    /// # Errors
    /// The pieces are too many or make no plan.
    pub fn add(&mut self, fragment: pb::PlanFragment) -> Result<Option<pb::Plan>, FragmentError> {
        if self.encoded.len() + fragment.data.len() > MAX_PLAN_BYTES {
            return Err(FragmentError::TooLarge);
        }
        self.encoded.extend_from_slice(&fragment.data);
        if !fragment.last {
            return Ok(None);
        }
        let encoded = std::mem::take(&mut self.encoded);
        Ok(Some(pb::Plan::decode(encoded.as_slice())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(num_tokens: u32) -> pb::Plan {
        let prompt = pb::Prompt { token_ids: (0..num_tokens).collect(), ..pb::Prompt::default() };
        let sequence = pb::AdmittedSequence { prompt: Some(prompt), ..Default::default() };
        pb::Plan { epoch: 3, step: 9, admitted: vec![sequence; 4], ..pb::Plan::default() }
    }

    #[test]
    fn a_plan_of_any_size_arrives_whole() {
        for num_tokens in [1, 100_000, 500_000] {
            let plan = plan(num_tokens);
            let messages = split(plan.clone());
            assert!(messages.iter().all(|m| m.encoded_len() <= MAX_CHUNK_BYTES + 64));
            let (mut fragments, mut arrived) = (Fragments::default(), None);
            for message in messages {
                assert!(arrived.is_none(), "something follows the last piece");
                arrived = match message.message.expect("set") {
                    Content::Plan(plan) => Some(plan),
                    Content::Fragment(piece) => fragments.add(piece).expect("a piece"),
                    other => panic!("{other:?}"),
                };
            }
            assert_eq!(arrived, Some(plan));
        }
    }

    #[test]
    fn pieces_without_end_or_sense_are_refused() {
        let mut fragments = Fragments::default();
        let piece = |last| pb::PlanFragment { data: vec![0xff; 64 << 20].into(), last };
        for _ in 0..4 {
            assert!(matches!(fragments.add(piece(false)), Ok(None)));
        }
        assert!(matches!(fragments.add(piece(false)), Err(FragmentError::TooLarge)));
        let noise = pb::PlanFragment { data: vec![0xff; 8].into(), last: true };
        assert!(matches!(Fragments::default().add(noise), Err(FragmentError::Malformed(_))));
    }
}
