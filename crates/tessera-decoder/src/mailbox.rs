//! News for the lifecycle from threads and streams that must not wait for it.
//!
//! Bounded by what can be posted: each source posts at most a few letters per epoch, and the next epoch
//! begins only after the lifecycle has read them.

use std::sync::{Mutex, PoisonError};

use tessera_cluster::EpochEnd;
use tessera_types::Epoch;
use tokio::sync::Notify;

/// Something the lifecycle must act upon.
#[derive(Debug)]
pub(crate) enum Letter {
    /// Every follower's plan stream is open.
    AllConnected { epoch: Epoch },
    /// The plan-stream machine ended the epoch.
    Ended(EpochEnd),
    /// The engine has left its epoch.
    EngineEnded(tessera_engine::EpochEnd),
    /// A follower was asked to leave, so the group drains.
    DrainAsked,
}

/// Unread letters.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Vec<Letter>>,
    arrived: Notify,
}

impl Mailbox {
    /// Never waits.
    pub fn post(&self, letter: Letter) {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
        self.arrived.notify_one();
    }

    /// Waits until there are letters and takes them all. Safe to cancel.
    pub async fn take(&self) -> Vec<Letter> {
        loop {
            let letters =
                std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner));
            if !letters.is_empty() {
                return letters;
            }
            self.arrived.notified().await;
        }
    }
}
