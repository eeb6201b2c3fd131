//! Starts real clusters for the tests in `e2e` and `faults` and talks to them as clients do.
//!
//! Invariants
//! - Nothing outlives its test: every process is killed with its descendants when its handle is dropped,
//!   and a cluster that lives in a static ends when the test process does, because its standard input
//!   closes.
//! - Every wait has a bound, and says what it waited for when the bound is reached.
//! - No test depends on how long something took.
//!
//! Modules: [`binary`] (the program under test), [`process`] and [`tree`] (processes, their logs,
//! children, ports), [`cluster`] (`tessera up`), [`roles`] (single roles), [`shared`] (clusters that
//! several tests use), [`etcd`], [`http`] and [`sse`] (a small HTTP client), [`grpc`], [`fixtures`],
//! [`golden`], [`chat`] (requests), [`readme`], [`ports`], [`wait`].

pub mod binary;
pub mod chat;
pub mod cluster;
pub mod etcd;
pub mod fixtures;
pub mod golden;
pub mod grpc;
pub mod http;
pub mod ports;
pub mod process;
pub mod readme;
pub mod roles;
pub mod shared;
pub mod sse;
pub mod tree;
pub mod wait;
