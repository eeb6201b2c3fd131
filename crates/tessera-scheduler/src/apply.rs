//! What the output of a step changes.

use tessera_types::{FinishReason, SampledToken, SequenceSlot, StepId, StepOutput};

use crate::error::ApplyError;
use crate::scheduler::{InFlight, InFlightRow, Scheduler, SequenceEvent, finished};
use crate::sequence::Stage;

impl Scheduler {
    /// Takes the output of the oldest step in flight: tokens become output, full blocks enter the prefix
    /// cache, and what no step names any more is freed. Results for sequences that ended since the step
    /// was scheduled are dropped. After an error the epoch must end.
    pub fn apply(&mut self, output: StepOutput) -> Result<(), ApplyError> {
        self.check_output(&output)?;
        let InFlight { step, rows } = self.in_flight.pop_front().expect("check_output found it");
        let mut tokens = output.tokens.into_iter();
        for row in rows {
            let token = if row.sample { tokens.next() } else { None };
            self.apply_row(&row, token);
        }
        // Only now: a slot that leaves must stand until its own row was applied.
        self.applied_step = step;
        self.empty_left_slots();
        Ok(())
    }

    fn check_output(&self, output: &StepOutput) -> Result<(), ApplyError> {
        let (step, expected) = (output.step, self.in_flight.front());
        let Some(in_flight) = expected.filter(|in_flight| in_flight.step == step) else {
            let expected = expected.map(|in_flight| in_flight.step);
            return Err(ApplyError::UnexpectedStep { expected, got: step });
        };
        let samples = || in_flight.rows.iter().filter(|row| row.sample);
        let (expected, got) = (samples().count(), output.tokens.len());
        if expected != got {
            return Err(ApplyError::WrongCount { step, expected, got });
        }
        let mut pairs = samples().zip(&output.tokens).enumerate();
        match pairs.find(|(_, (row, token))| !self.belongs(row.slot, token)) {
            None => Ok(()),
            Some((index, (row, token))) => {
                let (expected, got) = (row.slot, token.slot);
                Err(ApplyError::WrongSlot { step, index, expected, got })
            }
        }
    }

    fn belongs(&self, slot: SequenceSlot, token: &SampledToken) -> bool {
        slot == token.slot && self.at(slot).id() == token.sequence
    }

    fn apply_row(&mut self, row: &InFlightRow, token: Option<SampledToken>) {
        self.register_blocks(row);
        let Some(token) = token else { return };
        let sequence = self.at_mut(row.slot);
        sequence.num_pending -= 1;
        if sequence.stage == Stage::Ending {
            return;
        }
        let output_index = sequence.output.len();
        sequence.output.push(token.token);
        let reason = sequence.stop_reason(output_index);
        let id = sequence.id();
        self.events.push(SequenceEvent::Token {
            sequence: id,
            output_index: output_index as u32,
            token: token.token,
            logprobs: token.logprobs,
        });
        if let Some(reason) = reason {
            self.finish(row.slot, reason);
        }
    }

    fn finish(&mut self, slot: SequenceSlot, reason: FinishReason) {
        let sequence = self.at(slot);
        let (id, event) = (sequence.id(), finished(sequence, reason));
        self.events.push(event);
        self.places.remove(&id);
        self.leave(slot, Stage::Ending);
    }

    /// Prompt blocks that the step filled enter the prefix cache.
    fn register_blocks(&mut self, row: &InFlightRow) {
        let block_size = self.config.block_size as usize;
        let sequence = self.slots[row.slot.index()].as_mut().expect("a step in flight names it");
        let keys = &sequence.request.block_keys;
        let num_full = (row.num_computed / block_size).min(keys.len());
        let filled = sequence.num_registered_blocks..num_full.max(sequence.num_registered_blocks);
        for (&block, &key) in sequence.blocks[filled.clone()].iter().zip(&keys[filled.clone()]) {
            self.pool.register(block, key);
        }
        sequence.num_registered_blocks = filled.end;
    }

    /// Step of the last output applied.
    pub fn applied_step(&self) -> StepId {
        self.applied_step
    }
}
