//! The collectives as their callers see them, on both transports.

#![allow(clippy::unwrap_used)]

mod abort;
mod forming;
mod loss;
mod same_bits;
mod support;
