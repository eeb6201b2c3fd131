//! The values of the store: JSON with a schema number. A reader ignores fields it does not know, so
//! adding an optional field keeps the number; a change that old readers would misread raises it, and
//! they refuse the record by name.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tessera_types::{Epoch, Hash256, InstanceId, ModelFingerprint, NumericsId, Rank, TokenId};

use crate::error::ClusterError;
use crate::keys::GroupName;

/// A value that stands in the store.
pub trait Record: Serialize + DeserializeOwned {
    /// Name in errors.
    const NAME: &'static str;
    /// Newest schema that this build writes and reads.
    const SCHEMA: u32 = 1;

    /// What serde cannot express.
    fn check(&self) -> Result<(), ClusterError> {
        Ok(())
    }

    /// Bytes for the store.
    fn to_bytes(&self) -> Vec<u8> {
        let envelope = Envelope { schema: Some(u64::from(Self::SCHEMA)), record: self };
        serde_json::to_vec(&envelope).expect("records hold only maps with string keys")
    }

    /// Reads bytes from the store. A missing schema number means 1.
    fn from_bytes(bytes: &[u8]) -> Result<Self, ClusterError> {
        let malformed = |source| ClusterError::MalformedRecord { record: Self::NAME, source };
        let SchemaOnly { schema } = serde_json::from_slice(bytes).map_err(malformed)?;
        if schema > u64::from(Self::SCHEMA) {
            let supported = Self::SCHEMA;
            return Err(ClusterError::SchemaTooNew {
                record: Self::NAME,
                found: schema,
                supported,
            });
        }
        let record: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        record.check()?;
        Ok(record)
    }
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    schema: Option<u64>,
    #[serde(flatten)]
    record: &'a T,
}

#[derive(Deserialize)]
struct SchemaOnly {
    #[serde(default = "first_schema")]
    schema: u64,
}

fn first_schema() -> u64 {
    1
}

fn inconsistent<T: Record>(detail: impl Into<String>) -> ClusterError {
    ClusterError::InconsistentRecord { record: T::NAME, detail: detail.into() }
}

/// One process of the cluster, under its lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberInfo {
    pub instance: InstanceId,
    /// host:port of the process's gRPC server, as others reach it.
    pub address: String,
    /// Version and build of the binary, for people.
    #[serde(default)]
    pub build: String,
    /// What it serves; routers register none.
    #[serde(default)]
    pub model: Option<ModelIdentity>,
    #[serde(flatten)]
    pub role: MemberRole,
}

impl Record for MemberInfo {
    const NAME: &'static str = "member";

    fn check(&self) -> Result<(), ClusterError> {
        if self.address.is_empty() {
            return Err(inconsistent::<Self>("the address is empty"));
        }
        if self.model.is_none() && !matches!(self.role, MemberRole::Router) {
            return Err(inconsistent::<Self>("a worker names no model"));
        }
        if let MemberRole::Decoder(place) = &self.role {
            let end = u64::from(place.first_rank.0) + u64::from(place.num_ranks);
            if place.slot >= place.num_slots
                || place.num_ranks == 0
                || end > u64::from(place.world_size)
            {
                return Err(inconsistent::<Self>("slot or ranks lie outside the group"));
            }
        }
        Ok(())
    }
}

impl MemberInfo {
    /// The decoder's place, if this is a decoder.
    pub fn decoder(&self) -> Option<&DecoderMember> {
        match &self.role {
            MemberRole::Decoder(place) => Some(place),
            MemberRole::Router | MemberRole::Encoder(_) => None,
        }
    }

    /// The encoder's capacities, if this is an encoder.
    pub fn encoder(&self) -> Option<&EncoderMember> {
        match &self.role {
            MemberRole::Encoder(encoder) => Some(encoder),
            MemberRole::Router | MemberRole::Decoder(_) => None,
        }
    }
}

/// What a member serves. Two members may work together only if all four hashes agree where both
/// sides use them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// Name that clients use.
    pub name: String,
    pub language_fingerprint: ModelFingerprint,
    pub vision_fingerprint: ModelFingerprint,
    pub language_numerics: NumericsId,
    pub vision_numerics: NumericsId,
}

/// Role of a member with what only that role has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum MemberRole {
    Router,
    Encoder(EncoderMember),
    Decoder(DecoderMember),
}

/// Capacities of an encoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderMember {
    /// Kind of device, for people: `cpu`, `cuda:0`.
    pub device: String,
    /// Pixels that may be queued at most.
    pub max_queued_pixels: u64,
    /// Largest media item in pixels after resizing.
    pub max_item_pixels: u64,
    /// Bytes of embeddings kept.
    pub cache_bytes: u64,
}

/// A decoder's place in its group, and its capacities.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecoderMember {
    pub group: GroupName,
    /// Which contiguous run of ranks; slot 0 leads. Never changes while the process lives.
    pub slot: u32,
    pub num_slots: u32,
    pub first_rank: Rank,
    pub num_ranks: u32,
    /// Tensor-parallel degree of the group.
    pub world_size: u32,
    /// Kind of device, for people.
    pub device: String,
    /// Names the host whose slot lock this process holds. Of two instances with one slot and one host
    /// the later has the lock, so the earlier is dead even while its lease lives.
    #[serde(default)]
    pub slot_lock_host: Option<String>,
    /// Last epoch this process took part in and has left; 0 if none. Says to others that it is free.
    #[serde(default)]
    pub last_epoch: Epoch,
    pub capacity: DecoderCapacity,
}

/// What a decoder can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecoderCapacity {
    /// KV blocks that fit beside the weights; the group uses the minimum over its members.
    pub num_kv_blocks: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Sequences in one step.
    pub max_sequences: u32,
    /// Prompt plus output tokens of one sequence.
    pub max_model_len: u32,
}

/// The group's counter, the latest proposal and who stands accused. Changed by compare-and-swap,
/// never deleted. A number that is only proposed fences nobody.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EpochRecord {
    pub counter: Epoch,
    /// `None` when the number was taken only to accuse.
    pub spec: Option<EpochSpec>,
    /// Instances that were found frozen. They are not chosen until two good probes.
    #[serde(default)]
    pub excluded: Vec<InstanceId>,
}

impl Record for EpochRecord {
    const NAME: &'static str = "epoch";

    fn check(&self) -> Result<(), ClusterError> {
        match &self.spec {
            Some(spec) if spec.epoch != self.counter => {
                Err(inconsistent::<Self>("the proposal's number is not the counter"))
            }
            Some(spec) => spec.check_layout().map_err(inconsistent::<Self>),
            None => Ok(()),
        }
    }
}

/// One proposed incarnation of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochSpec {
    pub epoch: Epoch,
    /// In order of slots; entry 0 leads.
    pub slots: Vec<SlotAssignment>,
    pub world_size: u32,
    /// KV blocks of every rank, the minimum over members.
    pub num_kv_blocks: u32,
    pub proposer: InstanceId,
}

impl EpochSpec {
    /// The member that leads.
    pub fn leader(&self) -> &SlotAssignment {
        &self.slots[0]
    }

    /// All other members.
    pub fn followers(&self) -> &[SlotAssignment] {
        &self.slots[1..]
    }

    /// The assignment of `instance`.
    pub fn slot_of(&self, instance: InstanceId) -> Option<&SlotAssignment> {
        self.slots.iter().find(|slot| slot.instance == instance)
    }

    /// Identifies the proposal: a hash of its canonical JSON.
    pub fn digest(&self) -> Hash256 {
        let json = serde_json::to_vec(self).expect("a spec holds only maps with string keys");
        Hash256(*blake3::hash(&json).as_bytes())
    }

    /// Slots are numbered in order, cover the ranks without gaps, and name each instance once.
    fn check_layout(&self) -> Result<(), &'static str> {
        let mut next_rank = 0u64;
        for (i, slot) in self.slots.iter().enumerate() {
            if slot.slot as usize != i || u64::from(slot.first_rank.0) != next_rank {
                return Err("slots are out of order");
            }
            if slot.num_ranks == 0 {
                return Err("a slot has no ranks");
            }
            if self.slots[..i].iter().any(|other| other.instance == slot.instance) {
                return Err("an instance has two slots");
            }
            next_rank += u64::from(slot.num_ranks);
        }
        match next_rank == u64::from(self.world_size) && next_rank > 0 {
            true => Ok(()),
            false => Err("the slots do not cover the world"),
        }
    }
}

/// Who holds a slot in one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotAssignment {
    pub slot: u32,
    pub first_rank: Rank,
    pub num_ranks: u32,
    pub instance: InstanceId,
    /// host:port of its gRPC server.
    pub address: String,
    /// Revision of its member key when it was chosen. Activation demands that it still is.
    pub member_revision: i64,
}

/// A member can take part in an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyRecord {
    pub instance: InstanceId,
    pub epoch: Epoch,
    /// Blocks it allocated; equals the spec's.
    pub num_kv_blocks: u32,
}

impl Record for ReadyRecord {
    const NAME: &'static str = "ready";
}

/// The id from which the communicator of an epoch is made. It carries an address and a secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRecord {
    pub epoch: Epoch,
    #[serde(with = "hex_bytes")]
    pub id: Vec<u8>,
}

impl std::fmt::Debug for IdRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Whoever knows the id can join the communicator: it stays out of logs.
        write!(f, "IdRecord {{ epoch: {}, id: {} bytes }}", self.epoch, self.id.len())
    }
}

impl Record for IdRecord {
    const NAME: &'static str = "id";
}

/// What routers read: the one epoch of a group that may be given requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveRecord {
    pub epoch: Epoch,
    pub state: ActiveState,
    /// The leader.
    pub instance: InstanceId,
    /// host:port of the leader's gRPC server.
    pub address: String,
    pub spec_digest: Hash256,
    /// Every member, so that the next proposal can be held against this epoch.
    pub slots: Vec<SlotAssignment>,
    pub model: ModelIdentity,
    pub world_size: u32,
    pub capacity: DecoderCapacity,
}

impl Record for ActiveRecord {
    const NAME: &'static str = "active";
}

/// State of an active epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActiveState {
    Serving,
    /// Finishes what it has and takes nothing new.
    Draining,
}

/// Tokens that the canary prompt gives. Every group with the same weights and numerics must agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryRecord {
    pub token_ids: Vec<TokenId>,
}

impl Record for CanaryRecord {
    const NAME: &'static str = "canary";
}

mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let hex = String::deserialize(deserializer)?;
        if hex.len() % 2 != 0 || !hex.is_ascii() {
            return Err(de::Error::custom("not pairs of hex digits"));
        }
        let pair = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16);
        (0..hex.len() / 2).map(pair).collect::<Result<_, _>>().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
