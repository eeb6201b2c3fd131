//! The CUDA backend: own kernels, products by cuBLASLt, one stream per rank.
//!
//! Foundation: `library` (what the machine has), `device` ([`GpuInfo`], one GPU as one rank uses it), `memory`, `event`,
//! `graph_capture`, `module` (the kernels and how one is launched).
#![allow(unsafe_code)]

mod device;
mod event;
mod graph_capture;
mod library;
mod memory;
mod module;

pub use self::device::GpuInfo;
pub use self::library::Library;
pub use self::module::{KernelResources, ModuleImage, modules};
