//! Every operation of a backend against a naive twin in f64, on random inputs. Written over the trait,
//! so that each backend runs the same tests.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod attention;
mod captured;
mod dense;
mod embed;
mod failures;
mod loading;
mod same_bits;
mod sampling;
mod support;
mod vision;
