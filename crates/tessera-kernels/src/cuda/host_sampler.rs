//! Draws on the host, for groups whose ranks are joined by a communicator of the host: the logits come down, ranks
//! agree as on every other backend, and the tokens go up with the next step's inputs.

use tessera_collective::Communicator;
use tessera_types::{LateInputs, SequenceSlot, TokenId};

use crate::error::Result;
use crate::inputs::{Readback, SampleRow, SamplerSequence, ScoreRow, StepLimits};
use crate::reference::sampler::Sampler;

/// The host's table of sequences, and what the step at hand has drawn.
#[derive(Debug, Default)]
pub(super) struct HostSampler {
    table: Sampler,
    readback: Readback,
}

impl HostSampler {
    pub(super) fn new(limits: &StepLimits) -> Self {
        Self { table: Sampler::new(limits), readback: Readback::default() }
    }

    pub(super) fn admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        self.table.admit(sequence)
    }

    pub(super) fn release(&mut self, slot: SequenceSlot) {
        self.table.release(slot);
    }

    /// The token drawn last for a slot; `None` for a vacant one.
    pub(super) fn last_token(&self, slot: SequenceSlot) -> Option<TokenId> {
        self.table.last_sampled(slot).ok()
    }

    /// Draws one token per row of this rank's logits `[R, V/tp]`.
    pub(super) fn sample(
        &mut self,
        communicator: &mut Communicator,
        logits: &[f32],
        rows: &[SampleRow],
        late: &LateInputs,
    ) -> Result<()> {
        let tokens = self.table.sample(communicator, logits, rows, late, &one_by_one)?;
        self.readback.tokens.extend(tokens);
        Ok(())
    }

    pub(super) fn score(
        &mut self,
        communicator: &mut Communicator,
        logits: &[f32],
        rows: &[ScoreRow],
    ) -> Result<()> {
        let scores = self.table.score(communicator, logits, rows, &one_by_one)?;
        self.readback.scores.extend(scores);
        Ok(())
    }

    /// What the step gave so far.
    pub(super) fn take(&mut self) -> Readback {
        std::mem::take(&mut self.readback)
    }
}

fn one_by_one(rows: usize, body: &(dyn Fn(usize) + Sync)) {
    (0..rows).for_each(body);
}
