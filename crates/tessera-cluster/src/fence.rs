//! Refusing what belongs to another incarnation. Every stream that enters a decoder names cluster,
//! group and epoch, and this is the one place where they are compared.

use tessera_types::{Epoch, InstanceId};

use crate::keys::{ClusterName, GroupName};

/// The incarnation that a process has joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    pub cluster: ClusterName,
    pub group: GroupName,
    /// Epoch joined; 0 while in none.
    pub epoch: Epoch,
}

/// Why a stream was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("this is cluster {ours}, not {theirs}")]
    ForeignCluster { ours: String, theirs: String },
    #[error("this is group {ours}, not {theirs}")]
    ForeignGroup { ours: String, theirs: String },
    #[error("epoch {theirs} is over, this process is in epoch {ours}")]
    StaleEpoch { ours: Epoch, theirs: Epoch },
    #[error("epoch {theirs} has not begun here, this process is in epoch {ours}")]
    UnknownEpoch { ours: Epoch, theirs: Epoch },
    #[error("{instance} is not a follower in this epoch's slot {slot}")]
    NotAMember { instance: InstanceId, slot: u32 },
    #[error("{instance} has already opened its plan stream in this epoch")]
    AlreadyOpened { instance: InstanceId },
    #[error("the epoch has ended")]
    Ended,
}

impl Refusal {
    /// Whether the sender may succeed later, or elsewhere, with fresher knowledge.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::StaleEpoch { .. } | Self::UnknownEpoch { .. } | Self::Ended)
    }
}

impl Fence {
    /// Accepts exactly our own incarnation.
    pub fn check(&self, cluster: &str, group: &str, epoch: Epoch) -> Result<(), Refusal> {
        if self.cluster.as_str() != cluster {
            let ours = self.cluster.to_string();
            return Err(Refusal::ForeignCluster { ours, theirs: cluster.to_owned() });
        }
        if self.group.as_str() != group {
            let ours = self.group.to_string();
            return Err(Refusal::ForeignGroup { ours, theirs: group.to_owned() });
        }
        self.check_epoch(epoch)
    }

    /// The same for what needs no names any more, such as an event of our own engine.
    pub fn check_epoch(&self, epoch: Epoch) -> Result<(), Refusal> {
        match epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Equal if self.epoch > Epoch(0) => Ok(()),
            std::cmp::Ordering::Less => {
                Err(Refusal::StaleEpoch { ours: self.epoch, theirs: epoch })
            }
            _ => Err(Refusal::UnknownEpoch { ours: self.epoch, theirs: epoch }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_incarnation_passes() {
        let fence = Fence {
            cluster: ClusterName::new("c").unwrap(),
            group: GroupName::new("g").unwrap(),
            epoch: Epoch(5),
        };
        assert_eq!(fence.check("c", "g", Epoch(5)), Ok(()));
        assert!(matches!(fence.check("d", "g", Epoch(5)), Err(Refusal::ForeignCluster { .. })));
        assert!(matches!(fence.check("c", "h", Epoch(5)), Err(Refusal::ForeignGroup { .. })));
        assert!(matches!(fence.check("c", "g", Epoch(4)), Err(Refusal::StaleEpoch { .. })));
        assert!(matches!(fence.check("c", "g", Epoch(6)), Err(Refusal::UnknownEpoch { .. })));
        let outside = Fence { epoch: Epoch(0), ..fence };
        assert!(outside.check("c", "g", Epoch(0)).is_err(), "epoch 0 is no epoch");
    }
}
