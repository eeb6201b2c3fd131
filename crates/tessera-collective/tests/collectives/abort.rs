//! An abort ends what is pending and all that follows, and leaves no plausible number.

use std::thread;
use std::time::Duration;

use tessera_collective::CollectiveError;

use crate::support::{BOTH, CALLS, EPOCH, Transport};

fn is_aborted(error: &CollectiveError, expected: &str) -> bool {
    matches!(error, CollectiveError::Aborted { epoch: EPOCH, reason } if reason == expected)
}

/// Long enough that a rank has most likely gone to sleep; nothing depends on it.
fn let_it_block() {
    thread::sleep(Duration::from_millis(10));
}

#[test]
fn an_abort_from_another_thread_ends_every_blocked_collective() {
    for transport in BOTH {
        for (name, call) in CALLS {
            // The other rank never comes.
            let mut group = transport.group(2);
            let handle = group[0].abort_handle();
            let flag = group[0].abort_flag();
            thread::scope(|scope| {
                let rank = &mut group[0];
                let blocked = scope.spawn(move || {
                    let (result, output) = call(rank);
                    let again = call(rank);
                    (result, output, again)
                });
                let_it_block();
                assert!(!flag.is_aborted());
                handle.abort("operator");
                handle.abort("too late");
                let (result, output, (later, later_output)) = blocked.join().unwrap();
                for (result, output) in [(result, output), (later, later_output)] {
                    let error = result.unwrap_err();
                    assert!(is_aborted(&error, "operator"), "{transport:?} {name}: {error}");
                    assert!(output.iter().all(|&byte| byte == 0xFF), "{transport:?} {name}");
                }
                assert_eq!((flag.is_aborted(), flag.reason()), (true, Some("operator")));
            });
        }
    }
}

/// In processes of their own ranks have handles of their own; word of the abort goes over the sockets.
#[test]
fn an_abort_reaches_ranks_in_other_processes() {
    for (name, call) in CALLS {
        let mut group = Transport::Tcp.group(3);
        let handle = group[2].abort_handle();
        thread::scope(|scope| {
            let [first, second, last] = &mut group[..] else { unreachable!() };
            let blocked = [first, second].map(|rank| scope.spawn(move || call(rank)));
            let_it_block();
            handle.abort("gpu fell off");
            let (result, _) = call(last);
            assert!(is_aborted(&result.unwrap_err(), "gpu fell off"));
            for rank in blocked {
                let (result, output) = rank.join().unwrap();
                let error = result.unwrap_err();
                // The news may come from the rank itself or from the other one that heard it first.
                let CollectiveError::PeerAborted { rank, reason, .. } = &error else {
                    // A message cut off in the middle can't be followed by a reason.
                    let is_cut = matches!(error, CollectiveError::PeerLost { .. });
                    assert!(is_cut && name.starts_with("large"), "{name}: {error}");
                    continue;
                };
                assert!(reason.contains("gpu fell off"), "{name}: rank {rank}: {reason}");
                assert!(output.iter().all(|&byte| byte == 0xFF), "{name}");
            }
        });
    }
}

#[test]
fn an_aborted_epoch_leaves_the_next_one_alone() {
    for transport in BOTH {
        let mut old = transport.group(2);
        let mut new = transport.group(2);
        old[0].abort_handle().abort("over");
        assert!(old[0].barrier().is_err());
        let sums = crate::support::on_each_rank(&mut new, |rank| {
            let mut data = [1.0];
            rank.all_reduce_sum(&mut data).unwrap();
            data
        });
        assert_eq!(sums, [[2.0], [2.0]]);
    }
}

#[test]
fn threads_of_one_process_share_the_abort() {
    let mut group = Transport::Threads.group(3);
    group[1].abort_handle().abort("one for all");
    for rank in &mut group {
        assert!(is_aborted(&rank.barrier().unwrap_err(), "one for all"));
    }
}
