//! The id that rank 0 makes and publishes, and that every other rank connects by.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::wire::{ADDRESS_BYTES, read_address, write_address};

/// First byte of an id; another value is another layout.
const LAYOUT: u8 = 1;

/// Random bytes that tell one communicator from another at the same address.
pub(super) type Nonce = [u8; 16];

/// Where rank 0 listens, and a nonce that only members of the group have read from the store. Opaque to
/// those who carry it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommunicatorId {
    bytes: [u8; Self::NUM_BYTES],
}

impl CommunicatorId {
    /// Length of an id, below the 128 bytes that NCCL's takes.
    pub const NUM_BYTES: usize = 1 + ADDRESS_BYTES + size_of::<Nonce>();

    pub(super) fn new(address: SocketAddr, nonce: Nonce) -> Self {
        let mut bytes = [0; Self::NUM_BYTES];
        bytes[0] = LAYOUT;
        bytes[1..1 + ADDRESS_BYTES].copy_from_slice(&write_address(address));
        bytes[1 + ADDRESS_BYTES..].copy_from_slice(&nonce);
        Self { bytes }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads what [`CommunicatorId::as_bytes`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParseIdError> {
        let bytes: [u8; Self::NUM_BYTES] =
            bytes.try_into().map_err(|_| ParseIdError::Length { got: bytes.len() })?;
        if bytes[0] != LAYOUT {
            return Err(ParseIdError::Layout { got: bytes[0] });
        }
        match read_address(&bytes[1..1 + ADDRESS_BYTES]) {
            Some(address) if address.port() != 0 && !is_unspecified(address.ip()) => {
                Ok(Self { bytes })
            }
            _ => Err(ParseIdError::Address),
        }
    }

    /// Lower-case hex digits; [`FromStr`] reads them back.
    pub fn to_hex(&self) -> String {
        self.bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Where rank 0 listens.
    pub fn address(&self) -> SocketAddr {
        read_address(&self.bytes[1..1 + ADDRESS_BYTES]).expect("checked when the id was made")
    }

    pub(super) fn nonce(&self) -> Nonce {
        let nonce = &self.bytes[1 + ADDRESS_BYTES..];
        nonce.try_into().expect("the nonce is the last 16 bytes")
    }
}

fn is_unspecified(ip: IpAddr) -> bool {
    ip.is_unspecified() || ip == IpAddr::V6(Ipv6Addr::from_bits(0xFFFF_0000_0000))
}

impl fmt::Debug for CommunicatorId {
    /// Without the nonce, which is what admits a rank to the group.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CommunicatorId({})", self.address())
    }
}

impl FromStr for CommunicatorId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if text.len() != 2 * Self::NUM_BYTES || !text.is_ascii() {
            return Err(ParseIdError::Length { got: text.len() / 2 });
        }
        let byte = |i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16);
        let bytes: Result<Vec<u8>, _> = (0..Self::NUM_BYTES).map(byte).collect();
        Self::from_bytes(&bytes.map_err(|_| ParseIdError::Hex)?)
    }
}

/// Bytes or text that are no communicator id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    #[error("a communicator id has {} bytes, got {got}", CommunicatorId::NUM_BYTES)]
    Length { got: usize },
    #[error("unknown layout {got} of a communicator id")]
    Layout { got: u8 },
    #[error("a communicator id in text is hex digits")]
    Hex,
    #[error("the address in the communicator id cannot be connected to")]
    Address,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_bytes_and_hex() {
        for address in ["10.1.2.3:4567", "[fd00::1:2]:65535"] {
            let id = CommunicatorId::new(address.parse().unwrap(), [0xA5; 16]);
            assert_eq!(CommunicatorId::from_bytes(id.as_bytes()), Ok(id));
            assert_eq!(id.to_hex().parse(), Ok(id));
            assert_eq!(id.address().to_string(), address);
            assert_eq!(id.nonce(), [0xA5; 16]);
            assert!(!format!("{id:?}").contains("a5"), "the nonce is not for logs");
        }
        const { assert!(CommunicatorId::NUM_BYTES <= 128) };
    }

    #[test]
    fn a_malformed_id_is_refused() {
        let good = CommunicatorId::new("10.1.2.3:4567".parse().unwrap(), [1; 16]);
        let bytes = good.as_bytes();
        assert_eq!(CommunicatorId::from_bytes(&bytes[1..]), Err(ParseIdError::Length { got: 35 }));
        let mut layout = bytes.to_vec();
        layout[0] = 2;
        assert_eq!(CommunicatorId::from_bytes(&layout), Err(ParseIdError::Layout { got: 2 }));
        for address in ["0.0.0.0:1", "[::]:1", "10.1.2.3:0"] {
            let id = CommunicatorId::new(address.parse().unwrap(), [1; 16]);
            assert_eq!(CommunicatorId::from_bytes(id.as_bytes()), Err(ParseIdError::Address));
        }
        let hex = good.to_hex();
        assert_eq!(hex.replacen('0', "g", 1).parse::<CommunicatorId>(), Err(ParseIdError::Hex));
        assert!("é".repeat(36).parse::<CommunicatorId>().is_err());
        assert!(hex[2..].parse::<CommunicatorId>().is_err());
    }
}
