//! The scheduler against the fake model: small situations by hand, and random histories.

mod properties;
mod scheduling;
mod sharing;
mod support;
mod tenants;
