//! The engine over an executor made of hashes, and over real ranks of the reference backend.

mod golden;
mod grammars;
mod outputs;
mod ranks;
mod turns;
