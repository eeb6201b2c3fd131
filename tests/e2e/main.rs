//! Whole clusters on this machine, seen from outside: what clients get, what operators are told, what is
//! left behind.

mod bad_requests;
mod bench;
mod by_hand;
mod command_line;
mod concurrent;
mod constrained;
mod disconnect;
mod faces;
mod media;
mod overload;
mod parity;
mod random_weights;
mod sampling;
mod shutdown;
mod start_up;
mod urls;
