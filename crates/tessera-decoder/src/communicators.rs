//! Communicators of an epoch, one per local rank: over threads when all ranks are in this process, else
//! over TCP from the id that rank 0 published.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use tessera_cluster::EpochSpec;
use tessera_collective::tcp::{self, Root};
use tessera_collective::{
    AbortHandle, CollectiveConfig, CollectiveError, Communicator, CommunicatorId, threads,
};
use tessera_types::Rank;
use uuid::Uuid;

use crate::config::DecoderConfig;
use crate::error::DecoderError;

/// Why there are no communicators.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormError {
    #[error("the published id is not one")]
    Id(#[from] tcp::ParseIdError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("the thread of rank {rank} could not be started")]
    Spawn { rank: Rank, source: std::io::Error },
    #[error("the thread of rank {rank} panicked")]
    Panicked { rank: Rank },
    #[error("rank 0 did not make this epoch's id")]
    NoRoot,
}

/// What forms the communicators of one epoch on this process.
pub(crate) struct Forming {
    pub spec: EpochSpec,
    pub id: Vec<u8>,
    /// Rank 0's listener, on the process that made the id for several processes.
    pub root: Option<Root>,
    pub first_rank: u32,
    pub num_ranks: u32,
    pub listen_ip: IpAddr,
    pub abort: AbortHandle,
    pub deadline: Instant,
}

/// The id of an epoch, and the listener behind it when ranks live in several processes.
///
/// # Errors
/// No socket to be had.
pub(crate) fn make_id(
    world_size: u32,
    num_slots: usize,
    listen_ip: IpAddr,
    abort: &AbortHandle,
) -> Result<(Vec<u8>, Option<Root>), CollectiveError> {
    if num_slots == 1 {
        // Nobody connects by it; it only stands for the epoch.
        return Ok((Uuid::new_v4().as_bytes().to_vec(), None));
    }
    let config = config(world_size);
    let (root, id) = Root::bind(SocketAddr::new(listen_ip, 0), world_size, abort, &config)?;
    Ok((id.as_bytes().to_vec(), Some(root)))
}

impl Forming {
    /// Waits until every rank of the group has its communicator. Blocks until the deadline or an abort;
    /// returns those of the local ranks, ascending.
    ///
    /// # Errors
    /// The first rank's failure.
    pub fn form(self) -> Result<Vec<Communicator>, FormError> {
        let config = config(self.spec.world_size);
        if self.spec.slots.len() == 1 {
            return Ok(threads::group_with(self.spec.world_size, &self.abort, &config));
        }
        let id = CommunicatorId::from_bytes(&self.id)?;
        let ranks = (self.first_rank..self.first_rank + self.num_ranks).map(Rank);
        let mut root = self.root;
        let (abort, deadline, world_size) = (&self.abort, self.deadline, self.spec.world_size);
        std::thread::scope(|scope| {
            let mut joining = Vec::new();
            for rank in ranks {
                let root = if rank == Rank(0) { root.take() } else { None };
                let (id, config, listen_ip) = (&id, &config, self.listen_ip);
                let join = move || match (rank, root) {
                    (Rank(0), Some(root)) => Ok(root.accept(deadline)?),
                    (Rank(0), None) => Err(FormError::NoRoot),
                    _ => {
                        let joined =
                            tcp::connect(id, listen_ip, rank, world_size, deadline, abort, config);
                        Ok(joined?)
                    }
                };
                let thread = std::thread::Builder::new().name(format!("join-{rank}"));
                match thread.spawn_scoped(scope, join) {
                    Ok(handle) => joining.push((rank, handle)),
                    Err(source) => {
                        // The others would wait for this rank until the deadline.
                        abort.abort("a rank could not join");
                        return Err(FormError::Spawn { rank, source });
                    }
                }
            }
            let joined = joining.into_iter().map(|(rank, handle)| {
                let result = handle.join().unwrap_or(Err(FormError::Panicked { rank }));
                if let Err(error) = &result {
                    abort.abort(format!("rank {rank} could not join: {error}"));
                }
                result
            });
            // All are joined, and the first failure is reported.
            joined.collect::<Vec<_>>().into_iter().collect()
        })
    }
}

/// Ranks spin only while each can have a core of its own.
fn config(world_size: u32) -> CollectiveConfig {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let default = CollectiveConfig::default();
    let spin_us = if world_size as usize <= cores { default.spin_us } else { 0 };
    CollectiveConfig { spin_us, ..default }
}

/// The address at which ranks of other processes reach this one's.
///
/// # Errors
/// No address is set and `advertised` resolves to none.
pub(crate) async fn listen_ip(
    config: &DecoderConfig,
    advertised: &str,
) -> Result<IpAddr, DecoderError> {
    if let Some(ip) = config.collective_ip {
        return Ok(ip);
    }
    if !config.listen.ip().is_unspecified() {
        return Ok(config.listen.ip());
    }
    let unreachable = || DecoderError::Unreachable { address: advertised.to_owned() };
    let mut resolved = tokio::net::lookup_host(advertised).await.map_err(|_| unreachable())?;
    let address = resolved.find(|address| !address.ip().is_unspecified());
    Ok(address.ok_or_else(unreachable)?.ip())
}
