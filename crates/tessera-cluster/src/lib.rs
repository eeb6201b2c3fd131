//! Every protocol decision of a Tessera cluster, as state machines without I/O.
//!
//! Purpose: who belongs to a group, when an epoch begins and ends, which endpoint may be used, which
//! token of which attempt counts, how a process leaves. Services and threads only carry events in and
//! actions out.
//!
//! Conventions
//! - A machine has `on(event, now) -> Vec<Action>`. `now` is a [`std::time::Duration`] since any fixed
//!   origin of the process, on a clock that counts suspended time and never goes back.
//! - `deadline()` says when the machine wants `Event::Tick` at the latest if nothing else happens.
//! - All randomness and all ids are passed in; two machines fed the same events do the same.
//!
//! Invariants
//! - No clock, socket, task, environment or `unsafe`.
//! - No process executes plans of two epochs; no communicator mixes epochs; no attempt carries tokens
//!   of two epochs; at most one `active` record per group.
//! - Epochs and attempts are compared here and nowhere else.
//!
//! Modules: [`keys`] and [`records`] (what stands in the store), [`formation`] (how a group agrees on
//! its next epoch), [`leader`] and [`follower`] (the plan stream of one epoch), [`progress`] (frozen,
//! stuck or merely busy), [`epoch_end`] (why an epoch ended), [`fence`] (refusing other incarnations),
//! [`request`] (a request across attempts),
//! [`seed`], [`view`] and [`evidence`] (what a router believes), [`placement`] (routing policies),
//! [`lease_keeper`] (how a
//! member keeps its lease), [`drain`] (how a process leaves), [`config`], [`error`].

pub mod config;
pub mod drain;
pub mod epoch_end;
pub mod error;
pub mod evidence;
pub mod fence;
pub mod follower;
pub mod formation;
pub mod keys;
pub mod leader;
pub mod lease_keeper;
pub mod placement;
pub mod progress;
pub mod records;
pub mod request;
pub mod seed;
pub mod view;

pub use config::{
    DrainConfig, EvidenceConfig, FormationConfig, SessionConfig, StreamConfig, ViewConfig,
};
pub use drain::Drain;
pub use epoch_end::{EndReason, EpochEnd};
pub use error::ClusterError;
pub use evidence::{EndpointEvidence, Verdict};
pub use fence::{Fence, Refusal};
pub use follower::Follower;
pub use formation::Formation;
pub use keys::{ClusterName, GroupName, Keys, StoreKey};
pub use leader::Leader;
pub use lease_keeper::LeaseKeeper;
pub use records::{
    ActiveRecord, ActiveState, CanaryRecord, DecoderCapacity, DecoderMember, EncoderMember,
    EpochRecord, EpochSpec, IdRecord, MemberInfo, MemberRole, ModelIdentity, ReadyRecord, Record,
    SlotAssignment,
};
pub use request::RequestSession;
pub use seed::choice_seed;
pub use view::View;
