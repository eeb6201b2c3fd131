//! One request on the router, across attempts (CLUSTER §3).
//!
//! Invariants
//! - A token record is taken only if its attempt is the choice's current one and its index is the next;
//!   so no token is lost, repeated, reordered or stale, whatever the network delivers.
//! - Opening attempt k + 1 of a choice closes attempt k for ever.
//! - What was delivered is forced on the next attempt, never drawn again.
//! - Only unfinished choices move, each a bounded number of times; then the request fails with a typed
//!   retryable error.
//! - Exactly one of `Complete` and `Fail` is emitted, and nothing after it.

use std::time::Duration;

use tessera_types::{Attempt, EmbeddingKey, Epoch, FinishReason, TokenId};

use crate::config::SessionConfig;
use crate::keys::GroupName;
use crate::seed::choice_seed;

mod media;
mod messages;

use media::MediaBook;
pub use messages::{
    Action, AttemptFailure, Continuation, Event, MediaItem, SessionError, SessionSpec, Target,
    TokenRecord,
};

/// The machine.
#[derive(Debug)]
pub struct RequestSession {
    config: SessionConfig,
    deadline: Option<Duration>,
    choices: Vec<Choice>,
    media: MediaBook,
    over: bool,
}

#[derive(Debug)]
struct Choice {
    seed: u64,
    /// Latest attempt opened; 0 before the first.
    attempt: Attempt,
    stage: Stage,
    output: Vec<TokenId>,
    moves: u32,
    refusals: u32,
    /// Epochs that failed this choice.
    avoid: Vec<(GroupName, Epoch)>,
    /// Epochs that had no room; worth another try after a wait.
    full: Vec<(GroupName, Epoch)>,
    /// What to report if no other place is found.
    last_error: Option<SessionError>,
    /// Target of the last attempt that was admitted, and what moves did to the bits since.
    ran_at: Option<Target>,
    continuation: Continuation,
}

#[derive(Debug, Clone, PartialEq)]
enum Stage {
    New,
    Placing {
        since: Duration,
    },
    /// No place was found; ask again at `at`.
    Waiting {
        since: Duration,
        at: Duration,
    },
    Open {
        target: Target,
        accepted: bool,
    },
    Done,
}

impl RequestSession {
    /// A session for `spec`; it does nothing before `Start`.
    pub fn new(config: SessionConfig, spec: SessionSpec) -> Self {
        let choice = |i: u32| Choice {
            seed: choice_seed(spec.seed, i),
            attempt: Attempt(0),
            stage: Stage::New,
            output: spec.resumed.get(i as usize).cloned().unwrap_or_default(),
            moves: 0,
            refusals: 0,
            avoid: Vec::new(),
            full: Vec::new(),
            last_error: None,
            ran_at: None,
            continuation: Continuation::Undisturbed,
        };
        Self {
            deadline: spec.deadline,
            choices: (0..spec.num_choices).map(choice).collect(),
            media: MediaBook::new(&spec.media, config.max_encodes_per_item),
            config,
            over: false,
        }
    }

    /// Output of a choice so far, resumed tokens included.
    pub fn output(&self, choice: u32) -> &[TokenId] {
        self.choices.get(choice as usize).map_or(&[], |choice| &choice.output)
    }

    /// Whether a choice is what the undisturbed run would have given.
    pub fn continuation(&self, choice: u32) -> Continuation {
        let choice = self.choices.get(choice as usize);
        choice.map_or(Continuation::Undisturbed, |choice| choice.continuation)
    }

    /// Whether `Complete` or `Fail` was emitted.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// When `Tick` is wanted at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        if self.over {
            return None;
        }
        let retries = self.choices.iter().filter_map(|choice| match choice.stage {
            Stage::Waiting { at, .. } => Some(at),
            _ => None,
        });
        retries.chain(self.deadline).min()
    }

    /// Advances the machine.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.over {
            return actions;
        }
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.expire(&mut actions);
        } else {
            self.apply(event, now, &mut actions);
            self.retry_places(now, &mut actions);
        }
        if !self.over && self.choices.iter().all(|choice| choice.stage == Stage::Done) {
            self.over = true;
            actions.push(Action::Complete);
        }
        actions
    }

    fn apply(&mut self, event: Event, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::Start => self.start(now, actions),
            Event::Placed { choice, target } => self.on_placed(choice, target, actions),
            Event::NoPlace { choice, detail, retry_after } => {
                self.on_no_place(choice, detail, retry_after, now, actions);
            }
            Event::Accepted { choice, attempt } => self.on_accepted(choice, attempt),
            Event::Token { choice, attempt, index, record } => {
                self.on_token(choice, attempt, index, record, now, actions);
            }
            Event::Finished { choice, attempt, num_output_tokens, reason } => {
                self.on_finished(choice, attempt, num_output_tokens, reason, now, actions);
            }
            Event::AttemptFailed { choice, attempt, failure } => {
                if self.is_current(choice, attempt) {
                    self.on_failure(choice, failure, now, actions);
                }
            }
            Event::MediaNeeded { choice, attempt, items } => {
                if self.is_current(choice, attempt) {
                    let outcome = self.media.on_needed(choice, attempt, &items, actions);
                    self.check_media(outcome, actions);
                }
            }
            Event::Encoded { item, endpoint, key } => self.on_encoded(item, endpoint, key, actions),
            Event::EncodeFailed { item, endpoint, retryable, detail } => {
                let outcome =
                    self.media.on_encode_failed(item, endpoint, retryable, detail, actions);
                self.check_media(outcome, actions);
            }
            Event::StopChoice { choice, reason } => self.stop_choice(choice, reason, actions),
            Event::Cancel => self.finish_all(FinishReason::Cancelled, actions),
            Event::Tick => {}
        }
    }

    fn start(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let outcome = self.media.start(actions);
        self.check_media(outcome, actions);
        for choice in 0..self.choices.len() {
            if self.choices[choice].stage == Stage::New {
                self.place(choice, now, now, actions);
            }
        }
    }

    fn place(&mut self, choice: usize, since: Duration, now: Duration, actions: &mut Vec<Action>) {
        debug_assert!(since <= now);
        let state = &mut self.choices[choice];
        state.stage = Stage::Placing { since };
        let prefer = state.ran_at.as_ref().map(|target| target.numerics);
        let avoid = state.avoid.iter().chain(&state.full).cloned().collect();
        actions.push(Action::Place { choice: choice as u32, avoid, prefer });
    }

    fn on_placed(&mut self, choice: u32, target: Target, actions: &mut Vec<Action>) {
        let Some(state) = self.choices.get_mut(choice as usize) else { return };
        if !matches!(state.stage, Stage::Placing { .. }) {
            return;
        }
        state.attempt = state.attempt.next();
        state.stage = Stage::Open { target: target.clone(), accepted: false };
        let (attempt, output, seed) = (state.attempt, state.output.clone(), state.seed);
        actions.push(Action::OpenAttempt { choice, attempt, target, output, seed });
    }

    fn on_no_place(
        &mut self,
        choice: u32,
        detail: String,
        retry_after: Option<Duration>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(state) = self.choices.get_mut(choice as usize) else { return };
        let Stage::Placing { since } = state.stage else { return };
        // A request that has run waits for the next epoch; a new one is refused at once, with a hint.
        let may_wait = state.moves > 0 && now < since + self.config.max_place_wait;
        if may_wait {
            let at = now + self.config.place_interval;
            state.stage = Stage::Waiting { since, at };
            state.full.clear();
            return;
        }
        let retry_after = retry_after.unwrap_or(self.config.retry_after);
        let error = state.last_error.take();
        self.fail(error.unwrap_or(SessionError::NoPlace { detail, retry_after }), actions);
    }

    fn retry_places(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for choice in 0..self.choices.len() {
            if let Stage::Waiting { since, at } = self.choices[choice].stage
                && now >= at
                && !self.over
            {
                self.place(choice, since, now, actions);
            }
        }
    }

    /// The rule of the whole file: nothing counts that does not come from the current attempt.
    fn is_current(&self, choice: u32, attempt: Attempt) -> bool {
        let state = self.choices.get(choice as usize);
        state.is_some_and(|s| s.attempt == attempt && matches!(s.stage, Stage::Open { .. }))
    }

    fn on_accepted(&mut self, choice: u32, attempt: Attempt) {
        if !self.is_current(choice, attempt) {
            return;
        }
        let state = &mut self.choices[choice as usize];
        if let Stage::Open { target, accepted } = &mut state.stage
            && !*accepted
        {
            *accepted = true;
            let target = target.clone();
            state.note_place(target);
        }
    }

    fn on_token(
        &mut self,
        choice: u32,
        attempt: Attempt,
        index: u32,
        record: TokenRecord,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if !self.is_current(choice, attempt) {
            return;
        }
        self.on_accepted(choice, attempt);
        let state = &mut self.choices[choice as usize];
        let next = state.output.len() as u32;
        if index < next {
            return;
        }
        if index > next {
            let detail = format!("output {index} arrived where {next} was due");
            return self.abandon(choice, detail, now, actions);
        }
        state.output.push(record.token);
        actions.push(Action::Deliver { choice, index, record });
    }

    fn on_finished(
        &mut self,
        choice: u32,
        attempt: Attempt,
        num_output_tokens: u32,
        reason: FinishReason,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if !self.is_current(choice, attempt) {
            return;
        }
        self.on_accepted(choice, attempt);
        let received = self.choices[choice as usize].output.len();
        if num_output_tokens as usize != received {
            let detail = format!("finished with {num_output_tokens} tokens, {received} arrived");
            return self.abandon(choice, detail, now, actions);
        }
        self.choices[choice as usize].stage = Stage::Done;
        self.media.forget(choice);
        actions.push(Action::Finish { choice, reason });
    }

    /// The attempt broke the protocol: it is closed, and counts as lost.
    fn abandon(&mut self, choice: u32, detail: String, now: Duration, actions: &mut Vec<Action>) {
        let attempt = self.choices[choice as usize].attempt;
        actions.push(Action::CloseAttempt { choice, attempt });
        self.on_failure(choice, AttemptFailure::Lost { detail }, now, actions);
    }

    fn on_failure(
        &mut self,
        choice: u32,
        failure: AttemptFailure,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let state = &mut self.choices[choice as usize];
        let Stage::Open { target, accepted } = &state.stage else { return };
        let (accepted, place) = (*accepted, (target.group.clone(), target.epoch));
        self.media.forget(choice);
        let retry_after = self.config.retry_after;
        let has_run = state.ran_at.is_some();
        let error = match failure {
            AttemptFailure::Rejected { reason, field, detail } => {
                return self.fail(SessionError::Rejected { reason, field, detail }, actions);
            }
            AttemptFailure::Overloaded { retry_after: hint } => {
                state.full.push(place);
                SessionError::Overloaded { retry_after: hint.unwrap_or(retry_after) }
            }
            AttemptFailure::Lost { detail } | AttemptFailure::Refused { detail } => {
                state.avoid.push(place);
                match has_run {
                    true => SessionError::GroupLost { detail, retry_after },
                    false => SessionError::NoPlace { detail, retry_after },
                }
            }
        };
        let (spent, budget) = match accepted {
            true => (&mut state.moves, self.config.max_moves),
            false => (&mut state.refusals, self.config.max_refusals),
        };
        if *spent >= budget {
            return self.fail(error, actions);
        }
        *spent += 1;
        state.last_error = Some(error);
        self.place(choice as usize, now, now, actions);
    }

    fn on_encoded(
        &mut self,
        item: u32,
        endpoint: String,
        key: EmbeddingKey,
        actions: &mut Vec<Action>,
    ) {
        let choices = &self.choices;
        let is_current = |choice: u32, attempt| {
            let state = choices.get(choice as usize);
            state.is_some_and(|s: &Choice| {
                s.attempt == attempt && matches!(s.stage, Stage::Open { .. })
            })
        };
        let outcome = self.media.on_encoded(item, endpoint, key, is_current, actions);
        self.check_media(outcome, actions);
    }

    fn check_media(&mut self, outcome: Result<(), media::MediaFailure>, out: &mut Vec<Action>) {
        let retry_after = self.config.retry_after;
        let error = match outcome {
            Ok(()) => return,
            Err(media::MediaFailure { item, detail, retryable: true }) => {
                SessionError::MediaUnavailable { item, detail, retry_after }
            }
            Err(media::MediaFailure { item, detail, retryable: false }) => {
                SessionError::MediaRejected { item, detail }
            }
        };
        self.fail(error, out);
    }

    fn stop_choice(&mut self, choice: u32, reason: FinishReason, actions: &mut Vec<Action>) {
        let Some(state) = self.choices.get_mut(choice as usize) else { return };
        if state.stage == Stage::Done {
            return;
        }
        if matches!(state.stage, Stage::Open { .. }) {
            actions.push(Action::CloseAttempt { choice, attempt: state.attempt });
        }
        state.stage = Stage::Done;
        self.media.forget(choice);
        actions.push(Action::Finish { choice, reason });
    }

    fn finish_all(&mut self, reason: FinishReason, actions: &mut Vec<Action>) {
        for choice in 0..self.choices.len() as u32 {
            self.stop_choice(choice, reason, actions);
        }
    }

    fn expire(&mut self, actions: &mut Vec<Action>) {
        let began = self.choices.iter().any(|c| !c.output.is_empty() || c.stage == Stage::Done);
        match began {
            true => self.finish_all(FinishReason::DeadlineExceeded, actions),
            false => self.fail(SessionError::DeadlineExceeded, actions),
        }
    }

    fn fail(&mut self, error: SessionError, actions: &mut Vec<Action>) {
        if self.over {
            return;
        }
        self.over = true;
        for (choice, state) in self.choices.iter_mut().enumerate() {
            if matches!(state.stage, Stage::Open { .. }) {
                let (choice, attempt) = (choice as u32, state.attempt);
                actions.push(Action::CloseAttempt { choice, attempt });
            }
            state.stage = Stage::Done;
        }
        actions.push(Action::Fail { error });
    }
}

impl Choice {
    /// Notes where the choice runs now, and whether the bits go on unchanged.
    fn note_place(&mut self, target: Target) {
        if let Some(before) = &self.ran_at
            && !self.output.is_empty()
        {
            let equal =
                before.numerics == target.numerics && before.deterministic && target.deterministic;
            self.continuation = match (equal, self.continuation) {
                (false, _) | (_, Continuation::Resampled) => Continuation::Resampled,
                _ => Continuation::Exact,
            };
        }
        self.ran_at = Some(target);
    }
}

#[cfg(test)]
mod tests;
