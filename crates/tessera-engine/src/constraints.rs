//! The engine's side of grammars: which sequences wait for one, where each of the others is in its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use tessera_types::{
    Grammar, LateInputs, SamplingParams, SequenceId, SequenceSlot, StepOutput, StepPlan, TokenId,
};

use crate::engine::Engine;
use crate::error::SequenceError;
use crate::grammar::{Compiled, Constraint, GrammarCompiler, GrammarError};

/// Work done for grammars since the engine began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GrammarLoad {
    /// Grammars compiled, refused ones included.
    pub num_compiled: u64,
    pub compile_time: Duration,
    pub num_masks: u64,
    pub mask_time: Duration,
}

/// A sequence that ends with an error of its grammar.
type Failure = (SequenceId, GrammarError);

/// Constraints of all sequences that the engine knows.
#[derive(Default)]
pub(crate) struct Constraints {
    /// `None`: the engine has no vocabulary.
    compiler: Option<GrammarCompiler>,
    /// Sequences that wait for a grammar, with the output that they came with.
    pending: HashMap<Arc<Grammar>, Vec<(SequenceId, Vec<TokenId>)>>,
    states: HashMap<SequenceId, Constraint>,
    /// Slots of constrained sequences, as of the last plan.
    slots: HashMap<SequenceSlot, SequenceId>,
    num_masks: u64,
    mask_time: Duration,
}

impl Constraints {
    pub fn new(compiler: Option<GrammarCompiler>) -> Self {
        Self { compiler, ..Self::default() }
    }

    /// Signals that [`Constraints::poll`] has something to give.
    pub fn ready(&self) -> Option<&Receiver<crate::grammar::Finished>> {
        self.compiler.as_ref().map(GrammarCompiler::finished)
    }

    /// Whether sequences with a grammar can be served at all.
    fn is_available(&self) -> bool {
        self.compiler.is_some()
    }

    /// Gives a sequence its constraint now (`true`), or later through [`Constraints::poll`].
    fn request(
        &mut self,
        sequence: SequenceId,
        grammar: Arc<Grammar>,
        output: Vec<TokenId>,
    ) -> Result<bool, GrammarError> {
        let compiler = self.compiler.as_mut().ok_or(GrammarError::Unavailable)?;
        if let Some(outcome) = compiler.get(&grammar) {
            let compiled = outcome?;
            return self.begin(sequence, &compiled, &output).map(|()| true);
        }
        match self.pending.get_mut(&grammar) {
            Some(waiting) => waiting.push((sequence, output)),
            None => {
                compiler.compile(Arc::clone(&grammar))?;
                self.pending.insert(grammar, vec![(sequence, output)]);
            }
        }
        Ok(false)
    }

    fn begin(
        &mut self,
        sequence: SequenceId,
        compiled: &Compiled,
        output: &[TokenId],
    ) -> Result<(), GrammarError> {
        self.states.insert(sequence, Constraint::new(compiled, output)?);
        Ok(())
    }

    /// Sequences whose grammar has become ready, or has turned out to be none.
    fn poll(&mut self) -> Vec<(SequenceId, Result<(), GrammarError>)> {
        let mut done = Vec::new();
        let Some(compiler) = &mut self.compiler else { return done };
        let mut outcomes: Vec<_> = std::iter::from_fn(|| compiler.poll()).collect();
        if compiler.is_gone() {
            tracing::error!("the thread that compiles grammars is gone");
            self.compiler = None;
            let left = self.pending.keys().cloned();
            outcomes.extend(left.map(|grammar| (grammar, Err(GrammarError::Unavailable))));
        }
        for (grammar, outcome) in outcomes {
            for (sequence, output) in self.pending.remove(&grammar).unwrap_or_default() {
                let begun = match &outcome {
                    Ok(compiled) => self.begin(sequence, compiled, &output),
                    Err(error) => Err(error.clone()),
                };
                done.push((sequence, begun));
            }
        }
        done
    }

    /// Advances by what a step drew.
    pub fn accept(&mut self, output: &StepOutput) -> Vec<Failure> {
        let mut failures = Vec::new();
        for drawn in &output.tokens {
            let Some(state) = self.states.get_mut(&drawn.sequence) else { continue };
            if let Err(error) = state.accept(drawn.token) {
                failures.push((drawn.sequence, error));
            }
        }
        failures
    }

    /// Masks of the rows that a plan draws. `is_alive`: sequences that have not ended since it was made.
    fn masks(
        &mut self,
        plan: &StepPlan,
        is_alive: impl Fn(SequenceId) -> bool,
    ) -> (LateInputs, Vec<Failure>) {
        self.note_slots(plan);
        let (mut late, mut failures) = (LateInputs::default(), Vec::new());
        if self.slots.is_empty() {
            return (late, failures);
        }
        let started = Instant::now();
        for scheduled in plan.scheduled.iter().filter(|scheduled| scheduled.sample) {
            let sequence = self.slots.get(&scheduled.slot).copied();
            let Some(sequence) = sequence.filter(|&sequence| is_alive(sequence)) else { continue };
            let Some(state) = self.states.get_mut(&sequence) else { continue };
            match state.mask() {
                Ok(mask) => late.masks.push((scheduled.slot, mask)),
                Err(error) => failures.push((sequence, error)),
            }
        }
        self.num_masks += late.masks.len() as u64;
        self.mask_time += started.elapsed();
        (late, failures)
    }

    fn note_slots(&mut self, plan: &StepPlan) {
        for slot in &plan.released {
            self.slots.remove(slot);
        }
        for admitted in &plan.admitted {
            if self.states.contains_key(&admitted.sequence) {
                self.slots.insert(admitted.slot, admitted.sequence);
            }
        }
    }

    /// Drops what a sequence has, or waits for.
    pub fn forget(&mut self, sequence: SequenceId) {
        if self.states.remove(&sequence).is_none() {
            let waiting = self.pending.values_mut();
            waiting.for_each(|waiting| waiting.retain(|(waiting, _)| *waiting != sequence));
        }
    }

    /// The epoch ended: no slot is taken any more. Compiled grammars stay.
    pub fn end_epoch(&mut self) {
        self.slots.clear();
    }

    pub fn load(&self) -> GrammarLoad {
        let totals = self.compiler.as_ref().map(GrammarCompiler::totals).unwrap_or_default();
        let (num_compiled, compile_time) = totals;
        let (num_masks, mask_time) = (self.num_masks, self.mask_time);
        GrammarLoad { num_compiled, compile_time, num_masks, mask_time }
    }
}

impl Engine {
    /// Refuses at once what no grammar could serve.
    pub(crate) fn check_grammar(&self, sampling: &SamplingParams) -> Result<(), SequenceError> {
        let Some(grammar) = &sampling.grammar else { return Ok(()) };
        grammar.validate().map_err(tessera_scheduler::AddError::from)?;
        if sampling.ignore_eos {
            return Err(GrammarError::IgnoreEos.into());
        }
        match self.constraints.is_available() {
            true => Ok(()),
            false => Err(GrammarError::Unavailable.into()),
        }
    }

    /// Gives a queued sequence its grammar, or holds it until there is one.
    pub(crate) fn constrain(
        &mut self,
        sequence: SequenceId,
        grammar: Grammar,
        output: Vec<TokenId>,
    ) {
        match self.constraints.request(sequence, Arc::new(grammar), output) {
            Ok(true) => {}
            Ok(false) => self.hold_for_grammar(sequence, true),
            Err(error) => self.end_with_error(sequence, error.into()),
        }
    }

    /// Lets go the sequences whose grammar has become ready.
    pub(crate) fn take_grammars(&mut self) {
        for (sequence, begun) in self.constraints.poll() {
            match begun {
                Ok(()) => self.hold_for_grammar(sequence, false),
                Err(error) => self.end_with_error(sequence, error.into()),
            }
        }
    }

    /// What the second half of a step must know. Called when the step before it was applied.
    pub(crate) fn late_inputs(&mut self, plan: &StepPlan) -> LateInputs {
        let scheduler = &self.scheduler;
        let (late, failures) =
            self.constraints.masks(plan, |sequence| scheduler.contains(sequence));
        self.fail_constrained(failures);
        late
    }

    /// Ends the sequences that can't follow their grammars. What a step in flight draws for them is dropped.
    pub(crate) fn fail_constrained(&mut self, failures: Vec<Failure>) {
        for (sequence, error) in failures {
            tracing::warn!(sequence = sequence.0, %error, "sequence left its grammar");
            self.end_with_error(sequence, error.into());
        }
    }
}

/// What ranks are told of the sampling: the grammar is the leader's alone, and decides in place of
/// `min_tokens` where the output may end. Prompt log probabilities are sent before the first output token, so
/// an attempt that comes with output does not compute them again, and may use the prefix cache.
pub(crate) fn sampling_of_ranks(
    mut sampling: Arc<SamplingParams>,
    output: &[TokenId],
) -> Arc<SamplingParams> {
    if sampling.grammar.is_some() {
        let sampling = Arc::make_mut(&mut sampling);
        (sampling.grammar, sampling.min_tokens) = (None, 0);
    }
    if sampling.prompt_logprobs.is_some() && !output.is_empty() {
        Arc::make_mut(&mut sampling).prompt_logprobs = None;
    }
    sampling
}
