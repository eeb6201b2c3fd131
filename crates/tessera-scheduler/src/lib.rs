//! Which tokens are computed next: sequences, KV blocks and the plan of each step. A pure state machine
//! made from numbers: no clock, no I/O, no tensors, no threads.
//!
//! There are no phases. A sequence has tokens computed and tokens wanted, and a step spends one token
//! budget on closing the gaps. Chunked prefill, prefix hits, media spans that are cut anywhere and
//! recompute after preemption follow from that one rule.
//!
//! Invariants
//! - A plan never holds more than `max_tokens_per_step` tokens, and at most `pipeline_depth` plans are in
//!   flight (scheduled, not yet applied).
//! - A block or slot named by a step in flight is neither freed nor reused. A block enters the prefix
//!   cache only after the step that filled it was applied. Until then a sequence with the same beginning
//!   shares it from the running one that fills it.
//! - Within a priority no tenant gets ahead of another that waits by more than its running sequences and
//!   one admission cost. Making a plan takes time for what runs and what is admitted, not for what waits.
//! - A token is scheduled only if everything before it is computed or in the same plan, and no embedding
//!   it needs is missing.
//! - What was drawn is never drawn again: a preempted or moved sequence comes back with its output
//!   forced. The result of a step for a sequence that was found finished is dropped.
//! - The leader's [`SequenceTable`] and every rank's are fed by plans alone and agree digest by digest.
//!
//! Modules: [`config`] (limits), [`scheduler`] (the state machine's surface), `schedule` (how a plan is
//! made), `admit` (who gets a slot), `tenants` (whose turn it is), `queue` (who waits), `prefix` (what need
//! not be computed), `media` (which embeddings are asked for), `apply` (what a step's tokens change),
//! [`sequence`] (one request and its stop conditions), [`block_pool`] (reference-counted KV blocks and the
//! prefix cache), [`table`] (the sequence table every rank keeps), [`fake_model`] (a model made of hashes,
//! for tests and simulation), [`error`].

mod admit;
mod apply;
pub mod block_pool;
pub mod config;
pub mod error;
pub mod fake_model;
mod media;
mod prefix;
mod queue;
mod schedule;
pub mod scheduler;
pub mod sequence;
pub mod table;
mod tenants;

pub use block_pool::BlockPool;
pub use config::SchedulerConfig;
pub use error::{AddError, ApplyError, ConfigError, TableError};
pub use fake_model::{DrawRule, FakeModel, FakeModelError};
pub use scheduler::{Counters, Load, Scheduler, SequenceEvent};
pub use sequence::SequenceRequest;
pub use table::{SequenceTable, TableEntry, TableLimits};
