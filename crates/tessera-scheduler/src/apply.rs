//! What the output of a step changes.

use tessera_types::{FinishReason, PromptLogprobs, SampledToken, SequenceSlot, StepId, StepOutput};

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
        let mut prompt_logprobs = output.prompt_logprobs.into_iter();
        for row in rows {
            if !row.scored.is_empty() {
                let scored = prompt_logprobs.next().expect("check_output compared them");
                self.apply_prompt_logprobs(row.slot, scored);
            }
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
            None => check_prompt_logprobs(in_flight, &output.prompt_logprobs),
            Some((index, (row, token))) => {
                let (expected, got) = (row.slot, token.slot);
                Err(ApplyError::WrongSlot { step, index, expected, got })
            }
        }
    }

    fn belongs(&self, slot: SequenceSlot, token: &SampledToken) -> bool {
        slot == token.slot && self.at(slot).id() == token.sequence
    }

    /// Reports those that were not reported before: a preempted sequence computes rows again.
    fn apply_prompt_logprobs(&mut self, slot: SequenceSlot, scored: PromptLogprobs) {
        let sequence = self.at_mut(slot);
        if sequence.stage == Stage::Ending {
            return;
        }
        let PromptLogprobs { first_token, mut tokens, .. } = scored;
        let reported = sequence.num_reported_logprobs;
        let known = (reported - first_token as usize).min(tokens.len());
        tokens.drain(..known);
        if tokens.is_empty() {
            return;
        }
        sequence.num_reported_logprobs += tokens.len();
        let (sequence, first_token) = (sequence.id(), reported as u32);
        self.events.push(SequenceEvent::PromptLogprobs { sequence, first_token, tokens });
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
        let sequence = self.at(row.slot);
        let num_full = (row.num_computed / block_size).min(sequence.request.block_keys.len());
        if num_full <= sequence.num_registered_blocks {
            return;
        }
        self.leave_frontier(row.slot);
        let sequence = self.slots[row.slot.index()].as_mut().expect("a step in flight names it");
        let filled = sequence.num_registered_blocks..num_full;
        let keys = &sequence.request.block_keys[filled.clone()];
        for (&block, &key) in sequence.blocks[filled].iter().zip(keys) {
            self.pool.register(block, key);
        }
        sequence.num_registered_blocks = num_full;
        self.enter_frontier(row.slot);
    }

    /// Step of the last output applied.
    pub fn applied_step(&self) -> StepId {
        self.applied_step
    }
}

/// Exactly the prompt tokens that the step scores, in plan order.
fn check_prompt_logprobs(
    in_flight: &InFlight,
    prompt_logprobs: &[PromptLogprobs],
) -> Result<(), ApplyError> {
    let range = |scored: &PromptLogprobs| {
        let first = scored.first_token as usize;
        first..first + scored.tokens.len()
    };
    let rows = || in_flight.rows.iter().filter(|row| !row.scored.is_empty());
    let same = |(row, got): (&InFlightRow, &PromptLogprobs)| {
        row.slot == got.slot && row.scored == range(got)
    };
    if rows().count() == prompt_logprobs.len() && rows().zip(prompt_logprobs).all(same) {
        return Ok(());
    }
    Err(ApplyError::WrongPromptLogprobs {
        step: in_flight.step,
        expected: rows().map(|row| (row.slot, row.scored.clone())).collect(),
        got: prompt_logprobs.iter().map(|got| (got.slot, range(got))).collect(),
    })
}
