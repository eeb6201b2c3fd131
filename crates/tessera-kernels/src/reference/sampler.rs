//! Sampling: logits are gathered over ranks, rank 0 draws, all ranks learn the token.

use tessera_collective::Communicator;
use tessera_types::{LateInputs, Rank, SampledToken, SequenceSlot, TokenId};

use super::collective;
use crate::error::{KernelError, Result};
use crate::inputs::{SampleRow, SamplerSequence, StepLimits};

/// The table of running sequences as the sampler sees it.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    num_real_tokens: usize,
    /// Indexed by slot; the token drawn last, or the last forced one.
    last_sampled: Vec<Option<TokenId>>,
}

impl Sampler {
    pub(super) fn new(max: &StepLimits) -> Self {
        Self {
            num_real_tokens: max.num_real_tokens as usize,
            last_sampled: vec![None; max.max_sequences as usize],
        }
    }

    pub(super) fn last_sampled(&self, slot: SequenceSlot) -> Result<TokenId> {
        self.last_sampled
            .get(slot.index())
            .copied()
            .flatten()
            .ok_or(KernelError::VacantSlot { slot })
    }

    pub(super) fn admit(&mut self, sequence: SamplerSequence<'_>) -> Result<()> {
        let slot = sequence.slot;
        let row =
            self.last_sampled.get_mut(slot.index()).ok_or(KernelError::VacantSlot { slot })?;
        *row = sequence.output.last().or(sequence.prompt.last()).copied();
        Ok(())
    }

    pub(super) fn release(&mut self, slot: SequenceSlot) {
        if let Some(row) = self.last_sampled.get_mut(slot.index()) {
            *row = None;
        }
    }

    /// Draws one token per row of the local logits `[R, V/tp]`.
    pub(super) fn sample(
        &mut self,
        communicator: &mut Communicator,
        logits: &[f32],
        rows: &[SampleRow],
        _late: &LateInputs,
    ) -> Result<Vec<SampledToken>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.gather(communicator, logits, rows.len(), "sample")?;
        let mut tokens = vec![0u32; rows.len()];
        if communicator.rank() == Rank(0) {
            for (token, logits) in tokens.iter_mut().zip(logits.chunks_exact(self.num_real_tokens))
            {
                let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
                *token = best.map_or(0, |(token, _)| token as TokenId);
            }
        }
        communicator.broadcast_u32(&mut tokens, Rank(0)).map_err(collective("sample"))?;
        let mut sampled = Vec::with_capacity(rows.len());
        for (row, token) in rows.iter().zip(tokens) {
            let slot = row.slot;
            let last =
                self.last_sampled.get_mut(slot.index()).ok_or(KernelError::VacantSlot { slot })?;
            *last = Some(token);
            sampled.push(SampledToken { slot, sequence: row.sequence, token, logprobs: None });
        }
        Ok(sampled)
    }

    /// Log probability of each row's target.
    pub(super) fn score(
        &self,
        communicator: &mut Communicator,
        logits: &[f32],
        targets: &[TokenId],
    ) -> Result<Vec<f32>> {
        let logits = self.gather(communicator, logits, targets.len(), "score_rows")?;
        let rows = logits.chunks_exact(self.num_real_tokens.max(1)).zip(targets);
        rows.map(|(logits, target)| log_probability(logits, *target)).collect()
    }

    /// All ranks' logits of the real tokens, `[R, num_real_tokens]`. Rows of the vocabulary's padding are
    /// left out, which is what −inf would make of them.
    fn gather(
        &self,
        communicator: &mut Communicator,
        local: &[f32],
        rows: usize,
        operation: &'static str,
    ) -> Result<Vec<f32>> {
        let world_size = communicator.world_size() as usize;
        let shard = local.len() / rows.max(1);
        if shard * world_size < self.num_real_tokens || self.num_real_tokens == 0 {
            let (what, expected, found) = ("vocabulary", self.num_real_tokens, shard * world_size);
            return Err(KernelError::Shape { operation, what, expected, found });
        }
        let mut gathered = vec![0.0; local.len() * world_size];
        communicator.all_gather(local, &mut gathered).map_err(collective(operation))?;
        let mut out = Vec::with_capacity(rows * self.num_real_tokens);
        for row in 0..rows {
            for rank in 0..world_size {
                let first = rank * shard;
                let real = self.num_real_tokens.saturating_sub(first).min(shard);
                let from = (rank * rows + row) * shard;
                out.extend_from_slice(&gathered[from..from + real]);
            }
        }
        Ok(out)
    }
}

fn log_probability(logits: &[f32], target: TokenId) -> Result<f32> {
    let Some(logit) = logits.get(target as usize) else {
        let (expected, found) = (logits.len(), target as usize);
        return Err(KernelError::Shape {
            operation: "score_rows",
            what: "target",
            expected,
            found,
        });
    };
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    Ok((f64::from(logit - max) - sum.ln()) as f32)
}
