//! The engine: turns of schedule, forward, collect, sample, report; the ranks that compute them; and the
//! handle by which async code talks to both.
//!
//! Invariants
//! - One thread owns the engine and one thread each rank; they meet in bounded channels only.
//! - A token is reported only after its step completed on every local rank and the epoch's abort flag was
//!   read as clear. An epoch that ends discards whole steps, fails its sequences, and leaves weights and
//!   embeddings in place.
//! - What crosses from leader to followers is the plan, new sequences in full and then differences. Each
//!   rank checks epoch, step number and table digest; a difference ends the epoch.
//! - Embeddings live on rank 0 only, within a byte bound that is reserved before they are asked for.
//! - No branch on model kind, backend or tensor-parallel degree.
//!
//! Modules: [`engine`] (the turn), `requests` (its side of every sequence), [`handle`] (commands, for async code), [`stream`] (events of one
//! sequence), [`executor`] (the two halves of a step), [`group`] (the executor of local ranks plus
//! followers), [`follower`] (ranks fed by a plan stream), [`local_ranks`] (the rank threads of this
//! process), [`rank`] (one rank's work), [`rank_thread`], [`batch`] (a plan as backend inputs), `embeddings` (what rank 0
//! holds), [`grammar`] and `constraints` (structured output), [`canary`], [`warm_up`], [`fake`] (an executor made of hashes), [`config`], [`error`].

pub mod batch;
pub mod canary;
pub mod config;
mod constraints;
mod embeddings;
pub mod engine;
pub mod error;
pub mod executor;
pub mod fake;
pub mod follower;
pub mod grammar;
pub mod group;
pub mod handle;
pub mod local_ranks;
pub mod rank;
pub mod rank_thread;
mod requests;
pub mod stream;
pub mod warm_up;

pub use canary::Canary;
pub use config::{EngineConfig, PlantedFaults};
pub use constraints::GrammarLoad;
pub use engine::{Clock, Engine, EngineThread, Observer, Turn};
pub use error::{EngineError, ExecutorError, RankError, SequenceError, SubmitError};
pub use executor::{EpochStart, Executor, PlanSink, PlanSinkError};
pub use fake::FakeExecutor;
pub use follower::{Follower, FollowerAck};
pub use grammar::{GrammarError, GrammarVocabulary};
pub use group::GroupExecutor;
pub use handle::{EngineHandle, EngineLoad, EpochEnd, Submission};
pub use local_ranks::LocalRanks;
pub use rank::{RankSpec, RankWorker};
pub use rank_thread::{RankHandle, RankInfo, RankProgress};
pub use stream::{Event, EventSink, SinkError, Timings};
pub use warm_up::WarmUp;
