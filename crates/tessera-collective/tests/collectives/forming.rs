//! Forming a group over TCP: who is let in, who is sent away, and what a deadline tells.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tessera_collective::{
    AbortHandle, CollectiveConfig, CollectiveError, Communicator, CommunicatorId, Refusal, tcp,
};
use tessera_types::{Epoch, Rank};

use crate::support::{EPOCH, LOCALHOST, any_port, deadline, join, on_each_rank, root};

fn handle() -> AbortHandle {
    AbortHandle::new(EPOCH)
}

fn refusal(result: Result<Communicator, CollectiveError>) -> Refusal {
    match result.unwrap_err() {
        CollectiveError::Refused { rank: Rank(0), refusal, .. } => refusal,
        error => panic!("{error}"),
    }
}

/// The same address with another nonce.
fn forged(id: &CommunicatorId) -> CommunicatorId {
    let mut bytes = id.as_bytes().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    CommunicatorId::from_bytes(&bytes).unwrap()
}

fn works(group: &mut [Communicator]) {
    let world_size = group.len() as f32;
    let sums = on_each_rank(group, |rank| {
        let mut data = [1.0];
        rank.all_reduce_sum(&mut data).unwrap();
        data[0]
    });
    assert!(sums.iter().all(|&sum| sum == world_size));
}

#[test]
fn mistaken_ranks_are_refused_and_the_group_still_forms() {
    let (root, id) = root(2);
    let mut group = thread::scope(|scope| {
        let root = scope.spawn(|| root.accept(deadline()));
        assert_eq!(refusal(join(&forged(&id), 1, 2, &handle())), Refusal::WrongNonce);
        let old = AbortHandle::new(Epoch(EPOCH.0 - 1));
        assert_eq!(refusal(join(&id, 1, 2, &old)), Refusal::WrongEpoch);
        assert_eq!(refusal(join(&id, 1, 3, &handle())), Refusal::WrongWorldSize);
        let joined = join(&id, 1, 2, &handle()).unwrap();
        vec![root.join().unwrap().unwrap(), joined]
    });
    works(&mut group);
}

#[test]
fn a_rank_that_is_taken_is_refused() {
    let (root, id) = root(3);
    let mut group = thread::scope(|scope| {
        let root = scope.spawn(|| root.accept(deadline()));
        let (results, twins) = mpsc::channel();
        for _ in 0..2 {
            let results = results.clone();
            scope.spawn(move || results.send(join(&id, 1, 3, &handle())).unwrap());
        }
        // The one that holds the place waits for rank 2, so the first to return is the other.
        assert_eq!(refusal(twins.recv().unwrap()), Refusal::RankTaken);
        let last = join(&id, 2, 3, &handle()).unwrap();
        vec![root.join().unwrap().unwrap(), twins.recv().unwrap().unwrap(), last]
    });
    works(&mut group);
}

#[test]
fn strangers_and_stalled_connections_hold_nobody_up() {
    let (root, id) = root(2);
    let mut stalled: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect(id.address()).unwrap()).collect();
    stalled[99].write_all(b"TESSERAC").unwrap();
    let mut stranger = TcpStream::connect(id.address()).unwrap();
    stranger.write_all(&[b'G'; 200]).unwrap();
    let mut group = thread::scope(|scope| {
        let root = scope.spawn(|| root.accept(deadline()));
        let joined = join(&id, 1, 2, &handle()).unwrap();
        vec![root.join().unwrap().unwrap(), joined]
    });
    works(&mut group);
    // Nothing is answered to those who don't speak the protocol.
    stranger.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert!(matches!(stranger.read(&mut [0; 8]), Ok(0) | Err(_)));
}

#[test]
fn a_rank_that_left_before_the_group_formed_may_come_again() {
    let (root, id) = root(3);
    let mut group = thread::scope(|scope| {
        let root = scope.spawn(|| root.accept(deadline()));
        let first_life = handle();
        let first = scope.spawn({
            let abort = first_life.clone();
            move || join(&id, 1, 3, &abort)
        });
        thread::sleep(Duration::from_millis(10));
        first_life.abort("restart");
        let error = first.join().unwrap().unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { epoch: EPOCH, .. }), "{error}");

        let second = scope.spawn(|| {
            loop {
                match join(&id, 1, 3, &handle()) {
                    // The root has not yet looked at the old connection.
                    Err(CollectiveError::Refused { refusal: Refusal::RankTaken, .. }) => {}
                    result => return result,
                }
            }
        });
        // The last rank waits until the second life holds its place, or the first one's would count.
        thread::sleep(Duration::from_millis(10));
        let last = join(&id, 2, 3, &handle()).unwrap();
        vec![root.join().unwrap().unwrap(), second.join().unwrap().unwrap(), last]
    });
    works(&mut group);
}

#[test]
fn a_deadline_names_the_ranks_that_never_came() {
    let (root, id) = root(4);
    let soon = || Instant::now() + Duration::from_millis(100);
    thread::scope(|scope| {
        let root = scope.spawn(move || root.accept(soon()));
        let config = CollectiveConfig::default();
        let came = scope
            .spawn(move || tcp::connect(&id, LOCALHOST, Rank(2), 4, soon(), &handle(), &config));
        let CollectiveError::BootstrapDeadline { missing, .. } = root.join().unwrap().unwrap_err()
        else {
            panic!("not a deadline");
        };
        assert!(missing.starts_with(&[Rank(1)]) && missing.ends_with(&[Rank(3)]), "{missing:?}");
        // The rank that came learns of it from its own deadline or from the root's leaving.
        assert!(came.join().unwrap().is_err());
    });
}

#[test]
fn a_root_that_is_gone_is_named() {
    let (root, id) = root(2);
    drop(root);
    let soon = Instant::now() + Duration::from_millis(50);
    let config = CollectiveConfig::default();
    let error = tcp::connect(&id, LOCALHOST, Rank(1), 2, soon, &handle(), &config).unwrap_err();
    let CollectiveError::Connect { rank: Rank(0), address, .. } = error else { panic!("{error}") };
    assert_eq!(address, id.address());
}

#[test]
fn an_abort_ends_the_forming() {
    let abort = handle();
    let config = CollectiveConfig::default();
    let (root, id) = tcp::Root::bind(any_port(), 3, &abort, &config).unwrap();
    thread::scope(|scope| {
        let root = scope.spawn(|| root.accept(deadline()));
        let rank = scope.spawn(|| join(&id, 1, 3, &abort));
        thread::sleep(Duration::from_millis(10));
        abort.abort("superseded");
        for result in [root.join().unwrap(), rank.join().unwrap()] {
            match result.unwrap_err() {
                CollectiveError::Aborted { epoch: EPOCH, reason } => {
                    assert_eq!(reason, "superseded")
                }
                // The root's end of the connection may close first.
                CollectiveError::PeerLost { rank: Rank(0), .. } => {}
                error => panic!("{error}"),
            }
        }
    });
}

#[test]
fn impossible_places_and_addresses_are_refused_at_once() {
    let (config, abort) = (CollectiveConfig::default(), handle());
    let bind = |address: &str, world_size| {
        tcp::Root::bind(address.parse().unwrap(), world_size, &abort, &config).map(|_| ())
    };
    let unspecified = bind("0.0.0.0:0", 2).unwrap_err();
    assert!(matches!(unspecified, CollectiveError::UnspecifiedAddress { .. }));
    for world_size in [0, 1025] {
        let error = bind("127.0.0.1:0", world_size).unwrap_err();
        assert!(matches!(error, CollectiveError::InvalidSeat { .. }), "{error}");
    }
    // Not an address of this machine (TEST-NET-1).
    let foreign = bind("192.0.2.1:0", 2).unwrap_err();
    assert!(matches!(foreign, CollectiveError::Listen { .. }), "{foreign}");

    let (_root, id) = root(2);
    for rank in [0, 2] {
        let error = join(&id, rank, 2, &abort).unwrap_err();
        assert!(matches!(error, CollectiveError::InvalidSeat { .. }), "{error}");
    }
    let any: IpAddr = "0.0.0.0".parse().unwrap();
    let error = tcp::connect(&id, any, Rank(1), 2, deadline(), &abort, &config).unwrap_err();
    assert!(matches!(error, CollectiveError::UnspecifiedAddress { .. }), "{error}");
}

#[test]
fn a_group_of_one_forms_alone() {
    let (root, _) = root(1);
    let mut group = vec![root.accept(deadline()).unwrap()];
    assert_eq!(group[0].epoch(), EPOCH);
    works(&mut group);
}
