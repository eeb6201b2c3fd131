//! Why an epoch ended, and whom that accuses.

use std::fmt;

use tessera_types::{Epoch, InstanceId, StepId};

/// The end of one epoch, told exactly once by the machine that noticed first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochEnd {
    pub epoch: Epoch,
    pub reason: EndReason,
}

/// What was noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// The plan stream to or from this member closed or broke.
    StreamBroken { member: InstanceId, detail: String },
    /// Nothing was heard from this member for the silence time-out.
    Frozen { member: InstanceId },
    /// This member reports, but its ranks do not advance although they have work.
    Stuck { member: InstanceId },
    /// All ranks stopped advancing at the same place.
    AllStuck,
    /// A plan was not the one that follows the last.
    StepGap { expected: StepId, got: StepId },
    /// A message contradicts the protocol: a foreign epoch, counters that run back.
    ProtocolViolation { member: InstanceId, detail: String },
    /// Sequence tables of leader and follower differ.
    TableMismatch { step: StepId },
    /// The other side, or our own engine, gave the epoch up.
    Aborted { by: InstanceId, detail: String },
    /// The communicator could not be made or failed.
    CommunicatorFailed { detail: String },
    /// The canary prompt gave other tokens than it must.
    CanaryFailed { detail: String },
    /// The epoch was not active in time; these members never became ready.
    FormingTimeout { missing: Vec<InstanceId> },
    /// A member vanished or registered anew while the epoch was forming.
    MemberChanged { member: InstanceId },
    /// The store holds a later proposal, so this epoch can never become active.
    Superseded { by: Epoch },
    /// The store refused the activation: something it rests on had changed.
    ActivationRefused,
    /// A later epoch of the group is active.
    Fenced { by: Epoch },
    /// The group was drained.
    Drained,
}

impl EndReason {
    /// Members that the reason speaks against.
    pub fn accused(&self) -> Vec<InstanceId> {
        match self {
            Self::StreamBroken { member, .. }
            | Self::Frozen { member }
            | Self::Stuck { member }
            | Self::ProtocolViolation { member, .. } => vec![*member],
            Self::FormingTimeout { missing } => missing.clone(),
            _ => Vec::new(),
        }
    }

    /// Whether the accused runs on but does not work, so that only exclusion helps.
    pub fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen { .. } | Self::Stuck { .. })
    }

    /// Short stable name, for metrics and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::StreamBroken { .. } => "stream_broken",
            Self::Frozen { .. } => "frozen",
            Self::Stuck { .. } => "stuck",
            Self::AllStuck => "all_stuck",
            Self::StepGap { .. } => "step_gap",
            Self::ProtocolViolation { .. } => "protocol_violation",
            Self::TableMismatch { .. } => "table_mismatch",
            Self::Aborted { .. } => "aborted",
            Self::CommunicatorFailed { .. } => "communicator_failed",
            Self::CanaryFailed { .. } => "canary_failed",
            Self::FormingTimeout { .. } => "forming_timeout",
            Self::MemberChanged { .. } => "member_changed",
            Self::Superseded { .. } => "superseded",
            Self::ActivationRefused => "activation_refused",
            Self::Fenced { .. } => "fenced",
            Self::Drained => "drained",
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StreamBroken { member, detail } => {
                write!(f, "plan stream with {member} broke: {detail}")
            }
            Self::Frozen { member } => write!(f, "{member} is silent"),
            Self::Stuck { member } => write!(f, "{member} reports but does not advance"),
            Self::AllStuck => f.write_str("no rank advances"),
            Self::StepGap { expected, got } => {
                write!(f, "expected step {expected}, got step {got}")
            }
            Self::ProtocolViolation { member, detail } => {
                write!(f, "{member} broke the protocol: {detail}")
            }
            Self::TableMismatch { step } => write!(f, "sequence tables differ at step {step}"),
            Self::Aborted { by, detail } => write!(f, "{by} aborted: {detail}"),
            Self::CommunicatorFailed { detail } => write!(f, "communicator failed: {detail}"),
            Self::CanaryFailed { detail } => write!(f, "canary failed: {detail}"),
            Self::FormingTimeout { missing } => {
                write!(f, "not active in time, {} members not ready", missing.len())
            }
            Self::MemberChanged { member } => write!(f, "{member} changed while forming"),
            Self::Superseded { by } => write!(f, "superseded by proposal {by}"),
            Self::ActivationRefused => f.write_str("the store refused the activation"),
            Self::Fenced { by } => write!(f, "epoch {by} is active"),
            Self::Drained => f.write_str("drained"),
        }
    }
}
