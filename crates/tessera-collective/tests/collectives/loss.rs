//! Ranks that leave, lag or lose step are named.

use std::error::Error;
use std::thread;
use std::time::Duration;

use tessera_collective::{
    CollectiveConfig, CollectiveError, Communicator, OperationKind, PeerAddress,
};
use tessera_types::Rank;

use crate::support::{BOTH, CALLS, Transport, on_each_rank};

/// The error and its sources.
fn chain(error: &CollectiveError) -> String {
    let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

#[test]
fn a_rank_that_dies_is_named_with_its_address() {
    for transport in BOTH {
        for (name, call) in CALLS {
            let mut group = transport.group(2);
            let last = group.pop().unwrap();
            let (result, output) = thread::scope(|scope| {
                let rank = &mut group[0];
                let blocked = scope.spawn(move || call(rank));
                thread::sleep(Duration::from_millis(10));
                drop(last);
                blocked.join().unwrap()
            });
            let error = result.unwrap_err();
            let CollectiveError::PeerLost { rank: Rank(1), address, .. } = &error else {
                panic!("{transport:?} {name}: {error}");
            };
            assert_eq!(*address == PeerAddress::Thread, transport == Transport::Threads);
            assert!(output.iter().all(|&byte| byte == 0xFF), "{transport:?} {name}");
            // The loss is the reason of the abort that follows from it.
            let later = group[0].barrier().unwrap_err();
            assert!(
                matches!(&later, CollectiveError::Aborted { reason, .. } if *reason == chain(&error))
            );
            assert!(group[0].abort_flag().is_aborted());
        }
    }
}

#[test]
fn every_survivor_learns_which_rank_died() {
    for transport in BOTH {
        let mut group = transport.group(4);
        drop(group.pop());
        let errors = on_each_rank(&mut group, |rank| {
            let (result, output) = CALLS[0].1(rank);
            assert!(output.iter().all(|&byte| byte == 0xFF));
            result.unwrap_err()
        });
        for error in errors {
            // First hand, or as the reason of another survivor.
            assert!(chain(&error).contains("lost rank 3"), "{transport:?}: {}", chain(&error));
        }
    }
}

#[test]
fn a_rank_that_lags_is_named_at_the_timeout() {
    for transport in BOTH {
        let config = CollectiveConfig { spin_us: 0, timeout_ms: Some(30) };
        let mut group = transport.group_with(3, &config);
        // Kept alive, but it never calls.
        let _idle = group.remove(1);
        let errors = on_each_rank(&mut group, |rank| rank.barrier().unwrap_err());
        let named = errors.iter().any(|error| {
            matches!(error, CollectiveError::Timeout { waiting_for, .. } if waiting_for.contains(&Rank(1)))
        });
        assert!(named, "{transport:?}: {errors:?}");
    }
}

/// Runs a different call on the last of two ranks; the errors of both.
fn out_of_step(
    transport: Transport,
    first: impl Fn(&mut Communicator) -> Result<(), CollectiveError> + Sync,
    last: impl Fn(&mut Communicator) -> Result<(), CollectiveError> + Sync,
) -> Vec<CollectiveError> {
    let mut group = transport.group(2);
    let results = on_each_rank(&mut group, |rank| match rank.rank() {
        Rank(0) => first(rank),
        _ => last(rank),
    });
    results.into_iter().filter_map(Result::err).collect()
}

fn has_mismatch(errors: &[CollectiveError]) -> bool {
    errors.iter().any(|error| matches!(error, CollectiveError::Mismatch { .. }))
}

#[test]
fn ranks_that_lose_step_are_told_so() {
    for transport in BOTH {
        let lengths = out_of_step(
            transport,
            |rank| rank.all_reduce_sum(&mut [0.0; 4]),
            |rank| rank.all_reduce_sum(&mut [0.0; 5]),
        );
        assert!(has_mismatch(&lengths) && lengths.len() == 2, "{transport:?}: {lengths:?}");

        let kinds =
            out_of_step(transport, |rank| rank.barrier(), |rank| rank.all_reduce_sum(&mut []));
        assert!(has_mismatch(&kinds), "{transport:?}: {kinds:?}");
    }
}

#[test]
fn a_mismatch_shows_both_operations() {
    let errors = out_of_step(
        Transport::Threads,
        |rank| rank.broadcast(&mut [0; 3], Rank(0)),
        |rank| rank.broadcast(&mut [0; 3], Rank(1)),
    );
    let seen = errors.iter().find_map(|error| match error {
        CollectiveError::Mismatch { expected, got, .. } => Some((*expected, *got)),
        _ => None,
    });
    let (expected, got) = seen.unwrap();
    assert_eq!((expected.kind, got.kind), (OperationKind::Broadcast, OperationKind::Broadcast));
    assert_ne!(expected.root, got.root);
    assert!(expected.to_string().starts_with("broadcast from rank"), "{expected}");
}
