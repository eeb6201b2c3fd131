//! The engine over an executor made of hashes, and over real ranks of the reference backend.

mod turns;
