//! The bytes of the protocol: addresses, the greeting of a connection, and the header of a message.
//! Numbers are little-endian. All structures have a fixed length; the lengths inside a header are only
//! ever compared with the expected ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tessera_types::{Epoch, Rank};

use super::id::Nonce;
use crate::error::Refusal;
use crate::operation::{Operation, OperationKind};

/// Family, 16 bytes of IP, port.
pub(super) const ADDRESS_BYTES: usize = 19;

pub(super) fn write_address(address: SocketAddr) -> [u8; ADDRESS_BYTES] {
    let mut bytes = [0; ADDRESS_BYTES];
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes[0] = 4;
            bytes[1..5].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes[0] = 6;
            bytes[1..17].copy_from_slice(&ip.octets());
        }
    }
    bytes[17..].copy_from_slice(&address.port().to_le_bytes());
    bytes
}

/// Reads [`ADDRESS_BYTES`] bytes; `None` for an unknown family.
pub(super) fn read_address(bytes: &[u8]) -> Option<SocketAddr> {
    let ip = match bytes[0] {
        4 => IpAddr::V4(Ipv4Addr::from(array::<4>(bytes, 1))),
        6 => IpAddr::V6(Ipv6Addr::from(array::<16>(bytes, 1))),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_le_bytes(array(bytes, 17))))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("structures have fixed lengths")
}

/// First bytes of every connection. Anything else is a stranger, to whom nothing is answered.
const GREETING: [u8; 8] = *b"TESSERAC";
const VERSION: u32 = 1;

/// What the connecting rank says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hello {
    pub nonce: Nonce,
    pub epoch: Epoch,
    pub world_size: u32,
    pub rank: Rank,
    /// Where this rank listens for ranks above it.
    pub listen: SocketAddr,
}

impl Hello {
    pub(super) const NUM_BYTES: usize = 12 + 16 + 8 + 4 + 4 + ADDRESS_BYTES;

    pub(super) fn encode(&self) -> [u8; Self::NUM_BYTES] {
        let mut bytes = [0; Self::NUM_BYTES];
        bytes[..8].copy_from_slice(&GREETING);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.nonce);
        bytes[28..36].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.world_size.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.rank.0.to_le_bytes());
        bytes[44..].copy_from_slice(&write_address(self.listen));
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::NUM_BYTES]) -> Result<Self, BadHello> {
        if bytes[..8] != GREETING {
            return Err(BadHello::Stranger);
        }
        if u32::from_le_bytes(array(bytes, 8)) != VERSION {
            return Err(BadHello::Version);
        }
        Ok(Self {
            nonce: array(bytes, 12),
            epoch: Epoch(u64::from_le_bytes(array(bytes, 28))),
            world_size: u32::from_le_bytes(array(bytes, 36)),
            rank: Rank(u32::from_le_bytes(array(bytes, 40))),
            listen: read_address(&bytes[44..]).ok_or(BadHello::Stranger)?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadHello {
    Stranger,
    Version,
}

/// The answer to a [`Hello`]: welcome, or why not.
pub(super) const REPLY_BYTES: usize = 8;
const REPLY: [u8; 7] = *b"TESSREP";

pub(super) fn encode_reply(answer: Result<(), Refusal>) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..7].copy_from_slice(&REPLY);
    bytes[7] = match answer {
        Ok(()) => 0,
        Err(Refusal::WrongNonce) => 1,
        Err(Refusal::WrongEpoch) => 2,
        Err(Refusal::WrongWorldSize) => 3,
        Err(Refusal::WrongRank) => 4,
        Err(Refusal::RankTaken) => 5,
        Err(Refusal::WrongVersion) => 6,
    };
    bytes
}

/// `None` when the bytes are no reply.
pub(super) fn decode_reply(bytes: &[u8; REPLY_BYTES]) -> Option<Result<(), Refusal>> {
    if bytes[..7] != REPLY {
        return None;
    }
    Some(match bytes[7] {
        0 => Ok(()),
        1 => Err(Refusal::WrongNonce),
        2 => Err(Refusal::WrongEpoch),
        3 => Err(Refusal::WrongWorldSize),
        4 => Err(Refusal::WrongRank),
        5 => Err(Refusal::RankTaken),
        6 => Err(Refusal::WrongVersion),
        _ => return None,
    })
}

const MESSAGE: [u8; 4] = *b"TSRM";

/// Most bytes of an abort's reason that travel.
pub(super) const MAX_REASON_BYTES: usize = 256;

/// What precedes every payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Header {
    /// A part of a collective. `payload_bytes` follow.
    Data { operation: Operation, payload_bytes: u64 },
    /// The sender has failed or was aborted; at most [`MAX_REASON_BYTES`] of reason follow.
    Abort { epoch: Epoch, reason_bytes: u64 },
}

impl Header {
    pub(super) const NUM_BYTES: usize = 48;

    pub(super) fn encode(&self) -> [u8; Self::NUM_BYTES] {
        let (code, root, epoch, sequence, num_bytes, payload) = match *self {
            Self::Data { operation: o, payload_bytes } => {
                (kind_code(o.kind), o.root.0, o.epoch.0, o.sequence, o.num_bytes, payload_bytes)
            }
            Self::Abort { epoch, reason_bytes } => (ABORT_CODE, 0, epoch.0, 0, 0, reason_bytes),
        };
        let mut bytes = [0; Self::NUM_BYTES];
        bytes[..4].copy_from_slice(&MESSAGE);
        bytes[4..8].copy_from_slice(&code.to_le_bytes());
        bytes[8..12].copy_from_slice(&root.to_le_bytes());
        bytes[16..24].copy_from_slice(&epoch.to_le_bytes());
        bytes[24..32].copy_from_slice(&sequence.to_le_bytes());
        bytes[32..40].copy_from_slice(&num_bytes.to_le_bytes());
        bytes[40..48].copy_from_slice(&payload.to_le_bytes());
        bytes
    }

    /// `None` when the bytes are no header.
    pub(super) fn decode(bytes: &[u8; Self::NUM_BYTES]) -> Option<Self> {
        if bytes[..4] != MESSAGE {
            return None;
        }
        let code = u32::from_le_bytes(array(bytes, 4));
        let epoch = Epoch(u64::from_le_bytes(array(bytes, 16)));
        let payload_bytes = u64::from_le_bytes(array(bytes, 40));
        if code == ABORT_CODE {
            return Some(Self::Abort { epoch, reason_bytes: payload_bytes });
        }
        let operation = Operation {
            kind: kind_of(code)?,
            root: Rank(u32::from_le_bytes(array(bytes, 8))),
            epoch,
            sequence: u64::from_le_bytes(array(bytes, 24)),
            num_bytes: u64::from_le_bytes(array(bytes, 32)),
        };
        Some(Self::Data { operation, payload_bytes })
    }
}

const ABORT_CODE: u32 = 0xAB;

fn kind_code(kind: OperationKind) -> u32 {
    match kind {
        OperationKind::AllReduce => 1,
        OperationKind::AllGather => 2,
        OperationKind::Broadcast => 3,
        OperationKind::Barrier => 4,
    }
}

fn kind_of(code: u32) -> Option<OperationKind> {
    Some(match code {
        1 => OperationKind::AllReduce,
        2 => OperationKind::AllGather,
        3 => OperationKind::Broadcast,
        4 => OperationKind::Barrier,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_survive_their_bytes() {
        let hello = Hello {
            nonce: [9; 16],
            epoch: Epoch(u64::MAX - 1),
            world_size: 8,
            rank: Rank(7),
            listen: "[fe80::1]:80".parse().unwrap(),
        };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));

        let kinds = [
            OperationKind::AllReduce,
            OperationKind::AllGather,
            OperationKind::Broadcast,
            OperationKind::Barrier,
        ];
        for kind in kinds {
            let operation =
                Operation { kind, root: Rank(3), epoch: Epoch(4), sequence: 5, num_bytes: 6 };
            let header = Header::Data { operation, payload_bytes: 7 };
            assert_eq!(Header::decode(&header.encode()), Some(header));
        }
        let abort = Header::Abort { epoch: Epoch(4), reason_bytes: 11 };
        assert_eq!(Header::decode(&abort.encode()), Some(abort));

        for code in 0..7 {
            let mut bytes = encode_reply(Ok(()));
            bytes[7] = code;
            let reply = decode_reply(&bytes).unwrap();
            assert_eq!(encode_reply(reply), bytes);
        }
    }

    #[test]
    fn other_bytes_are_not_taken_for_ours() {
        assert_eq!(Hello::decode(&[b'G'; Hello::NUM_BYTES]), Err(BadHello::Stranger));
        let mut old = Hello {
            nonce: [0; 16],
            epoch: Epoch(1),
            world_size: 2,
            rank: Rank(1),
            listen: "10.0.0.1:1".parse().unwrap(),
        }
        .encode();
        old[8] = 200;
        assert_eq!(Hello::decode(&old), Err(BadHello::Version));
        assert_eq!(Header::decode(&[0; Header::NUM_BYTES]), None);
        let mut header = Header::Abort { epoch: Epoch(1), reason_bytes: 0 }.encode();
        header[4] = 0x77;
        assert_eq!(Header::decode(&header), None);
        assert_eq!(decode_reply(b"HTTP/1.1"), None);
        assert_eq!(decode_reply(b"TESSREP\x09"), None);
    }
}
