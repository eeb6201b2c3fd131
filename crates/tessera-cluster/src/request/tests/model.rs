//! Decoders and a network that do to a session whatever a case says, and an oracle that judges what the
//! session delivers. Each token carries the attempt that drew it, so that a stale one shows.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;

const NUM_CHOICES: u32 = 2;
const NUM_TOKENS: u32 = 6;

/// One thing that happens.
#[derive(Debug, Clone)]
pub enum Move {
    /// The open attempt of a choice draws its next token; the record waits in the network.
    Draw { choice: u32 },
    /// The network delivers one waiting record, and keeps a copy if `again`.
    Deliver { pick: usize, again: bool },
    /// The stream of the choice's open attempt breaks.
    Break { choice: u32 },
    /// An old attempt's stream reports its own break, late.
    BreakOld { choice: u32 },
    /// The decoder says that it is done.
    Finish { choice: u32 },
}

pub fn move_strategy() -> impl Strategy<Value = Move> {
    let choice = 0..NUM_CHOICES;
    prop_oneof![
        6 => choice.clone().prop_map(|choice| Move::Draw { choice }),
        6 => (any::<usize>(), prop::bool::weighted(0.2))
            .prop_map(|(pick, again)| Move::Deliver { pick, again }),
        1 => choice.clone().prop_map(|choice| Move::Break { choice }),
        1 => choice.clone().prop_map(|choice| Move::BreakOld { choice }),
        1 => choice.prop_map(|choice| Move::Finish { choice }),
    ]
}

#[derive(Debug, Clone, Copy)]
struct InFlight {
    choice: u32,
    attempt: Attempt,
    index: u32,
    token: TokenId,
}

#[derive(Debug, Default)]
struct Decoder {
    attempt: Attempt,
    /// Next index it will draw.
    next: u32,
}

/// What the oracle knows of one choice.
#[derive(Debug, Default)]
struct Truth {
    delivered: Vec<TokenId>,
    /// Latest attempt opened.
    attempt: Attempt,
    finished: bool,
}

pub struct Model {
    session: RequestSession,
    decoders: BTreeMap<u32, Decoder>,
    network: Vec<InFlight>,
    truth: BTreeMap<u32, Truth>,
    /// The planted bug: records of closed attempts are taken for the current one's.
    accept_old_attempts: bool,
    over: bool,
}

impl Model {
    pub fn new(accept_old_attempts: bool) -> Self {
        Self {
            session: session(u32::MAX, NUM_CHOICES, 0),
            decoders: (0..NUM_CHOICES).map(|c| (c, Decoder::default())).collect(),
            network: Vec::new(),
            truth: (0..NUM_CHOICES).map(|c| (c, Truth::default())).collect(),
            accept_old_attempts,
            over: false,
        }
    }

    /// Plays the moves, then lets every choice run to its end undisturbed.
    pub fn run(mut self, moves: &[Move]) -> Result<(), TestCaseError> {
        self.feed(Event::Start)?;
        for step in moves {
            self.play(step)?;
        }
        self.network.clear();
        for choice in 0..NUM_CHOICES {
            while !self.truth[&choice].finished {
                // A record that the network lost leaves a gap, which costs one more attempt.
                self.play(&Move::Draw { choice })?;
                self.play(&Move::Deliver { pick: 0, again: false })?;
                self.play(&Move::Finish { choice })?;
            }
            let expected = NUM_TOKENS as usize;
            prop_assert!(self.truth[&choice].delivered.len() <= expected);
        }
        prop_assert!(self.over, "the session never said that it was complete");
        Ok(())
    }

    fn play(&mut self, step: &Move) -> Result<(), TestCaseError> {
        match *step {
            Move::Draw { choice } => {
                let decoder = self.decoders.get_mut(&choice).unwrap();
                if decoder.next < NUM_TOKENS && !self.truth[&choice].finished {
                    let (attempt, index) = (decoder.attempt, decoder.next);
                    decoder.next += 1;
                    let token = attempt.0 * 100 + index;
                    self.network.push(InFlight { choice, attempt, index, token });
                }
                Ok(())
            }
            Move::Deliver { pick, again } => {
                if self.network.is_empty() {
                    return Ok(());
                }
                let pick = pick % self.network.len();
                let InFlight { choice, mut attempt, index, token } = self.network[pick];
                if !again {
                    self.network.remove(pick);
                }
                if self.accept_old_attempts {
                    attempt = self.truth[&choice].attempt;
                }
                let record = TokenRecord { token, logprobs: None };
                self.feed(Event::Token { choice, attempt, index, record })
            }
            Move::Break { choice } => self.feed(lost(choice, self.truth[&choice].attempt.0)),
            Move::BreakOld { choice } => {
                let old = self.truth[&choice].attempt.0.saturating_sub(1);
                self.feed(lost(choice, old))
            }
            Move::Finish { choice } => {
                let decoder = &self.decoders[&choice];
                if decoder.next < NUM_TOKENS {
                    return Ok(());
                }
                let (attempt, num_output_tokens) = (decoder.attempt, decoder.next);
                let reason = FinishReason::Length;
                self.feed(Event::Finished { choice, attempt, num_output_tokens, reason })
            }
        }
    }

    fn feed(&mut self, event: Event) -> Result<(), TestCaseError> {
        for action in self.session.on(event, MS) {
            prop_assert!(!self.over, "{action:?} after the end");
            self.judge(action)?;
        }
        Ok(())
    }

    fn judge(&mut self, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::Place { choice, .. } => {
                let target = target("g0", u64::from(self.truth[&choice].attempt.0) + 1);
                self.feed(Event::Placed { choice, target })?;
            }
            Action::OpenAttempt { choice, attempt, output, .. } => {
                let truth = self.truth.get_mut(&choice).unwrap();
                prop_assert!(attempt > truth.attempt, "an attempt was opened twice");
                prop_assert_eq!(&output, &truth.delivered, "forced output is what was delivered");
                truth.attempt = attempt;
                let next = output.len() as u32;
                self.decoders.insert(choice, Decoder { attempt, next });
                self.feed(Event::Accepted { choice, attempt })?;
            }
            Action::Deliver { choice, index, record } => {
                let truth = self.truth.get_mut(&choice).unwrap();
                prop_assert!(!truth.finished, "a token after the finish");
                prop_assert_eq!(index as usize, truth.delivered.len(), "lost or repeated");
                prop_assert_eq!(record.token % 100, index, "reordered");
                prop_assert_eq!(record.token / 100, truth.attempt.0, "from a closed attempt");
                truth.delivered.push(record.token);
            }
            Action::Finish { choice, .. } => {
                let truth = self.truth.get_mut(&choice).unwrap();
                prop_assert_eq!(truth.delivered.len(), NUM_TOKENS as usize, "tokens are missing");
                truth.finished = true;
            }
            Action::Complete => self.over = true,
            Action::Fail { error } => prop_assert!(false, "failed: {error}"),
            Action::CloseAttempt { .. } | Action::Encode { .. } | Action::SendMediaAt { .. } => {}
        }
        Ok(())
    }
}
