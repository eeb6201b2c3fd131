//! Groups of ranks inside the test's process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use tessera_collective::{
    AbortHandle, CollectiveConfig, CollectiveError, Communicator, CommunicatorId, tcp, threads,
};
use tessera_types::{Epoch, Rank};

pub const EPOCH: Epoch = Epoch(9);
pub const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Threads,
    Tcp,
}

pub const BOTH: [Transport; 2] = [Transport::Threads, Transport::Tcp];

impl Transport {
    pub fn group(self, world_size: u32) -> Vec<Communicator> {
        self.group_with(world_size, &CollectiveConfig::default())
    }

    pub fn group_with(self, world_size: u32, config: &CollectiveConfig) -> Vec<Communicator> {
        match self {
            Self::Threads => threads::group_with(world_size, &AbortHandle::new(EPOCH), config),
            Self::Tcp => tcp_group(world_size, config),
        }
    }
}

/// Far enough that only a hang reaches it.
pub fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub fn any_port() -> SocketAddr {
    SocketAddr::new(LOCALHOST, 0)
}

pub fn root(world_size: u32) -> (tcp::Root, CommunicatorId) {
    let abort = AbortHandle::new(EPOCH);
    tcp::Root::bind(any_port(), world_size, &abort, &CollectiveConfig::default()).unwrap()
}

pub fn join(
    id: &CommunicatorId,
    rank: u32,
    world_size: u32,
    abort: &AbortHandle,
) -> Result<Communicator, CollectiveError> {
    let config = CollectiveConfig::default();
    tcp::connect(id, LOCALHOST, Rank(rank), world_size, deadline(), abort, &config)
}

/// Every rank has an abort handle of its own, as in processes of their own.
fn tcp_group(world_size: u32, config: &CollectiveConfig) -> Vec<Communicator> {
    let abort = AbortHandle::new(EPOCH);
    let (root, id) = tcp::Root::bind(any_port(), world_size, &abort, config).unwrap();
    thread::scope(|scope| {
        let others: Vec<_> = (1..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let abort = AbortHandle::new(EPOCH);
                    let rank = Rank(rank);
                    tcp::connect(&id, LOCALHOST, rank, world_size, deadline(), &abort, config)
                })
            })
            .collect();
        let mut group = vec![root.accept(deadline()).unwrap()];
        group.extend(others.into_iter().map(|other| other.join().unwrap().unwrap()));
        group
    })
}

/// Runs `body` on a thread per rank; results by rank.
pub fn on_each_rank<R: Send>(
    group: &mut [Communicator],
    body: impl Fn(&mut Communicator) -> R + Sync,
) -> Vec<R> {
    let body = &body;
    thread::scope(|scope| {
        let ranks: Vec<_> = group.iter_mut().map(|rank| scope.spawn(move || body(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A collective that waits for the last rank, with the bytes of its output on this rank.
pub type Call = fn(&mut Communicator) -> (Result<(), CollectiveError>, Vec<u8>);

/// Every collective, small and large.
pub const CALLS: [(&str, Call); 7] = [
    ("all_reduce_sum", |rank| reduce(rank, 100)),
    ("large all_reduce_sum", |rank| reduce(rank, 2_000_000)),
    ("all_gather", |rank| {
        let mut output = vec![1.0; 10 * rank.world_size() as usize];
        let result = rank.all_gather(&[2.0; 10], &mut output);
        (result, output.iter().flat_map(|value| value.to_ne_bytes()).collect())
    }),
    ("all_gather_bytes", |rank| {
        let mut output = vec![1; 3 * rank.world_size() as usize];
        (rank.all_gather_bytes(&[2; 3], &mut output), output)
    }),
    ("broadcast", |rank| {
        let mut data = vec![1; 77];
        (rank.broadcast(&mut data, Rank(rank.world_size() - 1)), data)
    }),
    ("broadcast_u32", |rank| {
        let mut data = vec![1; 5];
        let result = rank.broadcast_u32(&mut data, Rank(rank.world_size() - 1));
        (result, data.iter().flat_map(|value| value.to_ne_bytes()).collect())
    }),
    ("barrier", |rank| (rank.barrier(), Vec::new())),
];

fn reduce(rank: &mut Communicator, num_floats: usize) -> (Result<(), CollectiveError>, Vec<u8>) {
    let mut data = vec![1.0; num_floats];
    let result = rank.all_reduce_sum(&mut data);
    (result, data.iter().flat_map(|value| value.to_ne_bytes()).collect())
}
