//! Qwen2.5-VL, once: configuration, weights, tensor-parallel splits, the decoder and the vision tower,
//! over any [`tessera_kernels::Backend`].
//!
//! Invariants
//! - No branch on backend or tensor-parallel degree in the forward passes; splits change shapes only.
//! - A rank reads only its own slices of a checkpoint, and names file and tensor when one is wrong.
//! - Every tensor a part needs is checked (present, shape, type) before the first is loaded.
//! - Random weights are a function of (seed, published tensor name, index in the whole tensor), so all
//!   splits and backends agree.
//! - The residual stream is f32. The vision tower is replicated, never split.
//!
//! Modules: [`config`] (config.json), [`split`] (what each rank holds), [`source`] (which model is served),
//! [`weights`] (checkpoints, pre-sharded ones, random weights, fingerprints), [`progress`] (of loading),
//! [`tensors`] (published names and shapes), [`parallel`] (column-, row- and vocab-parallel linears), `specs`
//! (what a rank loads), [`decoder`], [`vision`], [`numerics`] (ids of what may change bits), [`error`].

pub mod config;
pub mod decoder;
pub mod error;
pub mod numerics;
pub mod parallel;
pub mod progress;
pub mod source;
mod specs;
pub mod split;
pub mod tensors;
pub mod vision;
pub mod weights;

pub use config::{ModelConfig, TextConfig, VisionConfig};
pub use decoder::Decoder;
pub use error::{ModelError, Result};
pub use progress::{LoadMeter, LoadProgress};
pub use source::ModelSource;
pub use split::{Shard, SplitError, TpSplit};
pub use vision::{VisionItem, VisionTower, WindowOrder, window_order};
pub use weights::{ShardJob, ShardObserver, WeightSource, Weights, write_shards};
