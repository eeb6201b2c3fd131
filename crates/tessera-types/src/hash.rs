//! 256-bit content hashes. This crate defines their form; `tessera-processor` computes all that a
//! request needs (one owner, so router, encoder and decoder can never disagree).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// 256 bits, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Hash256(pub [u8; 32]);

impl Hash256 {
    /// The raw bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Reads exactly 32 bytes; `None` for any other length.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for Hash256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight digits identify a hash in a log; the whole of it is in Display.
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("…")
    }
}

/// The text is not 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a 256-bit hash in hex: expected 64 hex digits, got {length} characters")]
pub struct ParseHashError {
    length: usize,
}

impl FromStr for Hash256 {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseHashError { length: text.chars().count() };
        if text.len() != 64 || !text.is_ascii() {
            return Err(error());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| error())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Hash256 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash256 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

macro_rules! hash_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Hash256);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = ParseHashError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

hash_newtype!(
    /// Hash of the raw bytes of a media item as the client sent them.
    MediaId
);
hash_newtype!(
    /// Names one embedding exactly: weights, numerics, media, frames, size and recipe (ENGINE §4).
    EmbeddingKey
);
hash_newtype!(
    /// Names the contents of one full KV block and, through its parent, of all before it (ENGINE §4).
    BlockKey
);
hash_newtype!(
    /// Identifies a checkpoint (config and weights). Vision and language weights have one each.
    ModelFingerprint
);
hash_newtype!(
    /// Identifies everything that may change bits: build, backend, ISA path, dtypes, weight format, KV
    /// dtype, TP degree, reduction order, deterministic flag (ENGINE §3).
    NumericsId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_survives_its_own_text() {
        let mut bytes = [0u8; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (i * 37 + 11) as u8;
        }
        let hash = Hash256(bytes);
        assert_eq!(hash.to_string().parse::<Hash256>(), Ok(hash));
    }

    #[test]
    fn a_malformed_hash_is_refused() {
        for text in ["", "00", &"g".repeat(64), &"0".repeat(63), &"0".repeat(65), &"é".repeat(32)]
        {
            assert!(text.parse::<Hash256>().is_err(), "{text:?} parsed");
        }
    }
}
