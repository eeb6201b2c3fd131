//! Sampling: logits are gathered over ranks, rank 0 draws, all ranks learn the token.

use tessera_collective::Communicator;
use tessera_types::{LateInputs, Rank, SampledToken, SequenceSlot, TokenId, TokenLogprobs};

use super::collective;
use crate::error::{KernelError, Result};
use crate::inputs::{SampleRow, SamplerSequence, StepLimits};
use crate::sampling::logprobs::logprob;
use crate::sampling::{Draw, SamplerState, process_row};

/// Sent in place of a token that could not be drawn, so that no rank waits for it.
const NO_TOKEN: TokenId = TokenId::MAX;

/// The table of running sequences as the sampler sees it, indexed by slot.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    num_real_tokens: usize,
    table: Vec<Option<SamplerSlot>>,
}

#[derive(Debug)]
struct SamplerSlot {
    /// The token drawn last, or the last of those that came with the sequence.
    last: TokenId,
    /// What edits and draws need; read on rank 0.
    state: SamplerState,
}

/// Logits of all ranks, `[rows, num_real_tokens]`.
struct GatheredLogits {
    values: Vec<f32>,
    width: usize,
}

impl GatheredLogits {
    fn rows_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values.chunks_exact_mut(self.width)
    }
}

impl Sampler {
    pub(crate) fn new(max: &StepLimits) -> Self {
        let table = (0..max.max_sequences).map(|_| None).collect();
        Self { num_real_tokens: max.num_real_tokens as usize, table }
    }

    pub(crate) fn last_sampled(&self, slot: SequenceSlot) -> Result<TokenId> {
        let row = self.table.get(slot.index()).and_then(Option::as_ref);
        row.map(|row| row.last).ok_or(KernelError::VacantSlot { slot })
    }

    pub(crate) fn admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        let slot = sequence.slot;
        let row = self.table.get_mut(slot.index()).ok_or(KernelError::VacantSlot { slot })?;
        let last = sequence.output.last().or(sequence.prompt.last());
        let last = *last.ok_or_else(|| KernelError::Input {
            field: "prompt",
            reason: format!("the sequence of slot {slot} is empty"),
        })?;
        *row = Some(SamplerSlot { last, state: SamplerState::new(&sequence) });
        Ok(())
    }

    pub(crate) fn release(&mut self, slot: SequenceSlot) {
        if let Some(row) = self.table.get_mut(slot.index()) {
            *row = None;
        }
    }

    /// Draws one token per row of the local logits `[R, V/tp]`.
    pub(crate) fn sample(
        &mut self,
        communicator: &mut Communicator,
        logits: &[f32],
        rows: &[SampleRow],
        late: &LateInputs,
    ) -> Result<Vec<SampledToken>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.gather("sample", communicator, logits, rows.len())?;
        let mut tokens = vec![NO_TOKEN; rows.len()];
        let mut logprobs = vec![None; rows.len()];
        let mut outcome = Ok(());
        if communicator.rank() == Rank(0) {
            outcome = self.draw(logits, rows, late, &mut tokens, &mut logprobs);
        }
        // Also after a failed draw: the other ranks are waiting.
        communicator.broadcast_u32(&mut tokens, Rank(0)).map_err(collective("sample"))?;
        outcome?;
        let results = rows.iter().zip(tokens).zip(logprobs);
        results.map(|((row, token), logprobs)| self.take(row, token, logprobs)).collect()
    }

    fn draw(
        &self,
        mut logits: GatheredLogits,
        rows: &[SampleRow],
        late: &LateInputs,
        tokens: &mut [TokenId],
        logprobs: &mut [Option<TokenLogprobs>],
    ) -> Result<()> {
        let width = logits.width;
        for (i, (row, logits)) in rows.iter().zip(logits.rows_mut()).enumerate() {
            let slot = row.slot;
            let entry = self.table.get(slot.index()).and_then(Option::as_ref);
            let state = &entry.ok_or(KernelError::VacantSlot { slot })?.state;
            let mask = late.masks.iter().find(|(masked, _)| *masked == slot).map(|(_, mask)| mask);
            let drawn = process_row(logits, state, mask, row.output_index, width);
            let drawn = drawn.map_err(|source| KernelError::Draw { slot, source })?;
            let Draw { token, logprobs: row_logprobs } = drawn;
            (tokens[i], logprobs[i]) = (token, row_logprobs);
        }
        Ok(())
    }

    /// Makes a drawn token the slot's last one.
    fn take(
        &mut self,
        row: &SampleRow,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<SampledToken> {
        let SampleRow { slot, sequence, .. } = *row;
        if token == NO_TOKEN {
            return Err(KernelError::DrawElsewhere { slot });
        }
        let entry = self.table.get_mut(slot.index()).and_then(Option::as_mut);
        let entry = entry.ok_or(KernelError::VacantSlot { slot })?;
        entry.last = token;
        entry.state.record(token);
        Ok(SampledToken { slot, sequence, token, logprobs })
    }

    /// Log probability of each row's target.
    pub(crate) fn score(
        &self,
        communicator: &mut Communicator,
        logits: &[f32],
        targets: &[TokenId],
    ) -> Result<Vec<f32>> {
        let mut logits = self.gather("score_rows", communicator, logits, targets.len())?;
        let (expected, operation) = (logits.width, "score_rows");
        if let Some(target) = targets.iter().find(|target| **target as usize >= expected) {
            let found = *target as usize;
            return Err(KernelError::Shape { operation, what: "target", expected, found });
        }
        Ok(logits.rows_mut().zip(targets).map(|(row, target)| logprob(row, *target)).collect())
    }

    /// All ranks' logits of the real tokens. Rows of the vocabulary's padding are left out, which is what
    /// −inf would make of them.
    fn gather(
        &self,
        operation: &'static str,
        communicator: &mut Communicator,
        local: &[f32],
        rows: usize,
    ) -> Result<GatheredLogits> {
        let (world_size, width) = (communicator.world_size() as usize, self.num_real_tokens);
        let shard = local.len() / rows.max(1);
        if shard * world_size < width || width == 0 {
            let (what, expected, found) = ("vocabulary", width, shard * world_size);
            return Err(KernelError::Shape { operation, what, expected, found });
        }
        let mut gathered = vec![0.0; local.len() * world_size];
        communicator.all_gather(local, &mut gathered).map_err(collective(operation))?;
        let mut values = Vec::with_capacity(rows * width);
        for row in 0..rows {
            for rank in 0..world_size {
                let real = width.saturating_sub(rank * shard).min(shard);
                let from = (rank * rows + row) * shard;
                values.extend_from_slice(&gathered[from..from + real]);
            }
        }
        Ok(GatheredLogits { values, width })
    }
}
