//! Newtypes for everything that is counted or named. Each is `Copy` (or cheap to clone), ordered and
//! hashable, so that it can key a map and appear in a log field.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A vocabulary id. Ids above the last real token exist in padded vocabularies and decode to nothing.
pub type TokenId = u32;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $name {
            /// The id as an index into a table.
            pub fn index(self) -> usize {
                self.0 as usize
            }

            /// The id that follows. Counters never wrap in practice; wrapping would be a bug.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("a counter does not reach its maximum"))
            }
        }
    };
}

counter!(
    /// Position of a rank in a tensor-parallel group; rank 0 is the leader's first rank.
    Rank(u32)
);
counter!(
    /// One incarnation of a decoder group (CLUSTER §1). Grows by compare-and-swap in the store, never
    /// shrinks; 0 means "none yet".
    Epoch(u64)
);
counter!(
    /// Number of a step inside one epoch; the first step is 1.
    StepId(u64)
);
counter!(
    /// The engine's name for a sequence; unique for the life of a decoder process.
    SequenceId(u64)
);
counter!(
    /// Row of the sequence table a running sequence occupies. Reused after release.
    SequenceSlot(u32)
);
counter!(
    /// One block of the paged KV cache.
    BlockId(u32)
);
counter!(
    /// Whom a request is for, as a hash of the tenant's name; 0 is everyone without one. Tenants share a
    /// decoder group fairly.
    TenantId(u64)
);
counter!(
    /// Which try at a request this is; the first is 1. Opening attempt k + 1 closes k for ever.
    Attempt(u32)
);

/// Name of one process incarnation, drawn at random at each start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(pub Uuid);

impl InstanceId {
    /// A fresh random id. The only source of randomness in this crate.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// Parses the hyphenated form that [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().map(Self)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
