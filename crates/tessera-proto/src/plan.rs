//! Step plans as messages: what a leader sends its followers.

use std::sync::Arc;

use tessera_types::{
    AdmittedSequence, BlockCopy, BlockId, Epoch, LateInputs, ScheduledSequence, SequenceId,
    SequenceSlot, StepId, StepPlan, TokenMask,
};

use crate::convert::{ConvertError, required};
use crate::decoder::v1 as decoder;

impl From<&StepPlan> for decoder::Plan {
    fn from(plan: &StepPlan) -> Self {
        let copies = plan.copy_blocks.iter();
        Self {
            epoch: plan.epoch.0,
            step: plan.step.0,
            released: plan.released.iter().map(|slot| slot.0).collect(),
            admitted: plan.admitted.iter().map(admitted).collect(),
            zero_blocks: ids(&plan.zero_blocks),
            copy_blocks: copies
                .map(|copy| decoder::BlockCopy { from: copy.from.0, to: copy.to.0 })
                .collect(),
            scheduled: plan.scheduled.iter().map(scheduled).collect(),
            table_digest: plan.table_digest,
        }
    }
}

fn ids(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|block| block.0).collect()
}

fn admitted(sequence: &AdmittedSequence) -> decoder::AdmittedSequence {
    decoder::AdmittedSequence {
        slot: sequence.slot.0,
        sequence: sequence.sequence.0,
        prompt: Some(sequence.prompt.as_ref().into()),
        output_token_ids: sequence.output.clone(),
        sampling: Some(sequence.sampling.as_ref().into()),
        eos_token_ids: sequence.eos_token_ids.to_vec(),
        seed: sequence.seed,
        num_computed_tokens: sequence.num_computed_tokens,
        block_table: ids(&sequence.block_table),
    }
}

fn scheduled(sequence: &ScheduledSequence) -> decoder::ScheduledSequence {
    decoder::ScheduledSequence {
        slot: sequence.slot.0,
        num_tokens: sequence.num_tokens,
        appended_blocks: ids(&sequence.appended_blocks),
        sample: sequence.sample,
    }
}

impl TryFrom<&decoder::Plan> for StepPlan {
    type Error = ConvertError;

    fn try_from(plan: &decoder::Plan) -> Result<Self, ConvertError> {
        let copies = plan.copy_blocks.iter();
        Ok(Self {
            epoch: Epoch(plan.epoch),
            step: StepId(plan.step),
            released: plan.released.iter().copied().map(SequenceSlot).collect(),
            admitted: plan.admitted.iter().map(admitted_from).collect::<Result<_, _>>()?,
            zero_blocks: blocks(&plan.zero_blocks),
            copy_blocks: copies
                .map(|copy| BlockCopy { from: BlockId(copy.from), to: BlockId(copy.to) })
                .collect(),
            scheduled: plan.scheduled.iter().map(scheduled_from).collect(),
            table_digest: plan.table_digest,
        })
    }
}

fn blocks(ids: &[u32]) -> Vec<BlockId> {
    ids.iter().copied().map(BlockId).collect()
}

fn admitted_from(sequence: &decoder::AdmittedSequence) -> Result<AdmittedSequence, ConvertError> {
    let prompt = required(sequence.prompt.as_ref(), "prompt")?;
    let sampling = required(sequence.sampling.as_ref(), "sampling")?;
    Ok(AdmittedSequence {
        slot: SequenceSlot(sequence.slot),
        sequence: SequenceId(sequence.sequence),
        prompt: Arc::new(prompt.try_into()?),
        output: sequence.output_token_ids.clone(),
        sampling: Arc::new(sampling.try_into()?),
        eos_token_ids: sequence.eos_token_ids.as_slice().into(),
        seed: sequence.seed,
        num_computed_tokens: sequence.num_computed_tokens,
        block_table: blocks(&sequence.block_table),
    })
}

fn scheduled_from(sequence: &decoder::ScheduledSequence) -> ScheduledSequence {
    ScheduledSequence {
        slot: SequenceSlot(sequence.slot),
        num_tokens: sequence.num_tokens,
        appended_blocks: blocks(&sequence.appended_blocks),
        sample: sequence.sample,
    }
}

impl decoder::Late {
    /// Late inputs of one step as a message.
    pub fn new(epoch: Epoch, step: StepId, late: &LateInputs) -> Self {
        let masks = late.masks.iter();
        Self {
            epoch: epoch.0,
            step: step.0,
            masks: masks
                .map(|(slot, mask)| decoder::SlotMask { slot: slot.0, words: mask.words.to_vec() })
                .collect(),
        }
    }

    /// The inputs a follower hands to its ranks.
    pub fn inputs(&self) -> LateInputs {
        let masks = self.masks.iter();
        LateInputs {
            masks: masks
                .map(|mask| {
                    (SequenceSlot(mask.slot), TokenMask { words: mask.words.as_slice().into() })
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tessera_types::{
        EmbeddingKey, GridThw, Hash256, MediaKind, MediaSpan, PositionSpan, Prompt, SamplingParams,
    };

    #[test]
    fn a_plan_survives_the_wire() {
        let prompt = Prompt {
            tokens: vec![5; 9],
            media: vec![MediaSpan {
                item: 0,
                kind: MediaKind::Video,
                offset: 2,
                num_tokens: 4,
                grid: GridThw { t: 2, h: 2, w: 4 },
                seconds_per_grid: 2.0 / 0.7,
                embedding_key: EmbeddingKey(Hash256([3; 32])),
            }],
            positions: vec![
                PositionSpan::Text { len: 2 },
                PositionSpan::Grid { t: 2, h: 1, w: 2, step: 5.714 },
                PositionSpan::Text { len: 3 },
            ],
        };
        let sampling = SamplingParams {
            logit_bias: vec![(4, -1.5)],
            stop_token_ids: vec![9],
            logprobs: Some(0),
            prompt_logprobs: Some(3),
            grammar: Some(tessera_types::Grammar::Choice(vec!["yes".to_owned(), "no".to_owned()])),
            ..SamplingParams::default()
        };
        let plan = StepPlan {
            epoch: Epoch(7),
            step: StepId(19),
            released: vec![SequenceSlot(3)],
            admitted: vec![AdmittedSequence {
                slot: SequenceSlot(2),
                sequence: SequenceId(u64::MAX),
                prompt: Arc::new(prompt),
                output: vec![1, 2],
                sampling: Arc::new(sampling),
                eos_token_ids: [151645, 151643].into(),
                seed: u64::MAX - 1,
                num_computed_tokens: 4,
                block_table: vec![BlockId(8)],
            }],
            zero_blocks: vec![BlockId(1)],
            copy_blocks: vec![BlockCopy { from: BlockId(1), to: BlockId(2) }],
            scheduled: vec![ScheduledSequence {
                slot: SequenceSlot(2),
                num_tokens: 7,
                appended_blocks: vec![BlockId(1), BlockId(6)],
                sample: true,
            }],
            table_digest: u64::MAX - 2,
        };
        let wire = decoder::Plan::from(&plan);
        assert_eq!(StepPlan::try_from(&wire), Ok(plan));
    }

    #[test]
    fn a_plan_with_a_broken_prompt_is_refused() {
        let mut wire = decoder::Plan::default();
        wire.admitted.push(decoder::AdmittedSequence::default());
        assert_eq!(
            StepPlan::try_from(&wire).map(|_| ()),
            Err(ConvertError::Missing { field: "prompt" })
        );
        wire.admitted[0].prompt = Some(decoder::Prompt::default());
        wire.admitted[0].sampling = Some(decoder::Sampling::default());
        assert!(matches!(StepPlan::try_from(&wire), Err(ConvertError::Prompt(_))));
    }
}
