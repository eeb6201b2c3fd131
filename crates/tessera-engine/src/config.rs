//! Settings of the engine.

use std::time::Duration;

use tessera_scheduler::SchedulerConfig;
use tessera_types::TokenId;

use crate::error::EngineError;
use crate::grammar::GrammarVocabulary;

/// Bounds of the engine beside those of its scheduler.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    pub scheduler: SchedulerConfig,
    /// Columns of an embedding row.
    pub hidden_size: u32,
    /// Ids from here on are refused in prompts: the model has no row for them.
    pub vocab_size: u32,
    /// Tokens that end a sequence unless it says `ignore_eos`.
    pub eos_token_ids: Vec<TokenId>,
    /// What grammars are made of; without it sequences with a grammar are refused.
    pub grammar_vocabulary: Option<GrammarVocabulary>,
    /// Bytes of embeddings that rank 0 may hold, those under way included. A sequence waits for room
    /// before its media is asked for; one that alone exceeds the bound is refused.
    pub max_embedding_bytes: u64,
    /// Longest step that prefill may make: the token budget is fitted to it once, by
    /// [`crate::EngineHandle::warm_up`]. `None`: the budget is the scheduler's greatest.
    pub step_time_target: Option<Duration>,
    /// Commands that wait for the engine thread; one more is refused as busy.
    pub inbox_capacity: usize,
    /// How often a waiting engine looks at the epoch's abort flag.
    pub poll_interval: Duration,
    pub planted: PlantedFaults,
}

/// Bugs that tests and simulation plant to prove that they would be noticed. All off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlantedFaults {
    /// Report steps of an aborted epoch.
    pub skip_abort_flag: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            scheduler: SchedulerConfig::default(),
            hidden_size: 2048,
            vocab_size: 151_936,
            eos_token_ids: Vec::new(),
            grammar_vocabulary: None,
            max_embedding_bytes: 1 << 30,
            step_time_target: None,
            inbox_capacity: 4096,
            poll_interval: Duration::from_millis(50),
            planted: PlantedFaults::default(),
        }
    }
}

impl EngineConfig {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// [`EngineError::Config`] or [`EngineError::Scheduler`].
    pub fn validate(&self) -> Result<(), EngineError> {
        self.scheduler.validate()?;
        let positive = [
            ("hidden_size", u64::from(self.hidden_size)),
            ("vocab_size", u64::from(self.vocab_size)),
            ("max_embedding_bytes", self.max_embedding_bytes),
            ("inbox_capacity", self.inbox_capacity as u64),
            ("poll_interval", self.poll_interval.as_millis() as u64),
        ];
        match positive.iter().find(|(_, value)| *value == 0) {
            None => Ok(()),
            Some(&(field, _)) => Err(EngineError::Config { field }),
        }
    }

    /// Bytes of an embedding of `num_rows` rows, f32 on the host.
    pub fn embedding_bytes(&self, num_rows: u32) -> u64 {
        u64::from(num_rows) * u64::from(self.hidden_size) * size_of::<f32>() as u64
    }
}
