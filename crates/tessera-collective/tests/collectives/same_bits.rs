//! Sums are ordered by rank, and threads and TCP agree in every bit.

use proptest::prelude::*;
use tessera_collective::Communicator;
use tessera_types::Rank;

use crate::support::{BOTH, Transport, on_each_rank};

/// Floats of all magnitudes, zeros of both signs, infinities, NaNs with payloads.
fn input(seed: u64, rank: u32, num_floats: usize) -> Vec<f32> {
    let mut state = seed ^ (u64::from(rank) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    };
    let float = |bits: u64| match bits % 61 {
        0 => 0.0,
        1 => -0.0,
        2 => f32::INFINITY,
        3 => f32::from_bits(0x7FC0_0000 | (bits >> 40) as u32 & 0xFFFF),
        4 => f32::from_bits((bits >> 40) as u32 & 0xFFFF),
        _ => ((bits >> 40) as f32 - 8e6) * 2f32.powi((bits % 40) as i32 - 20),
    };
    (0..num_floats).map(|_| float(next())).collect()
}

fn naive_sum(seed: u64, world_size: u32, num_floats: usize) -> Vec<f32> {
    let mut sum = input(seed, 0, num_floats);
    for rank in 1..world_size {
        for (sum, value) in sum.iter_mut().zip(input(seed, rank, num_floats)) {
            *sum += value;
        }
    }
    sum
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What a program of collectives leaves on one rank: a sum and a gather per size, then a broadcast from
/// each rank.
fn program(rank: &mut Communicator, seed: u64, sizes: &[usize]) -> Vec<u32> {
    let mut seen = Vec::new();
    for &num_floats in sizes {
        let mine = input(seed, rank.rank().0, num_floats);
        let mut sum = mine.clone();
        rank.all_reduce_sum(&mut sum).unwrap();
        seen.extend(bits(&sum));
        let mut gathered = vec![0.0; num_floats * rank.world_size() as usize];
        rank.all_gather(&mine, &mut gathered).unwrap();
        seen.extend(bits(&gathered));
        rank.barrier().unwrap();
    }
    for root in 0..rank.world_size() {
        let mut data = [rank.rank().0 * 10, seed as u32];
        rank.broadcast_u32(&mut data, Rank(root)).unwrap();
        seen.extend(data);
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn tcp_equals_threads_and_the_naive_sum(
        world_size in prop::sample::select(vec![1u32, 2, 3, 4, 8]),
        seed: u64,
        free_sizes in prop::collection::vec(0usize..9000, 1..3),
    ) {
        let mut sizes = vec![0, 1, 3, world_size as usize - 1, 4096, 4097];
        sizes.extend(free_sizes);
        let [threads, tcp] = BOTH.map(|transport| {
            on_each_rank(&mut transport.group(world_size), |rank| program(rank, seed, &sizes))
        });
        prop_assert!(threads == tcp, "threads and TCP differ");
        for rank in &threads {
            let mut seen = rank.iter().copied();
            for &num_floats in &sizes {
                for exact in naive_sum(seed, world_size, num_floats) {
                    let sum = f32::from_bits(seen.next().unwrap());
                    // Which of two NaNs survives an addition is not specified; that it is one is.
                    let is_equal = sum.to_bits() == exact.to_bits();
                    prop_assert!(is_equal || (sum.is_nan() && exact.is_nan()), "{sum} {exact}");
                }
                for peer in 0..world_size {
                    for exact in bits(&input(seed, peer, num_floats)) {
                        prop_assert_eq!(seen.next(), Some(exact));
                    }
                }
            }
            for root in 0..world_size {
                prop_assert_eq!(seen.next(), Some(root * 10));
                prop_assert_eq!(seen.next(), Some(seed as u32));
            }
            prop_assert_eq!(seen.next(), None);
        }
    }
}

#[test]
fn the_payload_of_a_lone_nan_survives_a_sum() {
    const PAYLOAD: u32 = 0x7FC1_2345;
    for transport in BOTH {
        for num_floats in [7, 5000] {
            let sums = on_each_rank(&mut transport.group(4), |rank| {
                let mut data = vec![rank.rank().0 as f32; num_floats];
                data[rank.rank().index()] = f32::from_bits(PAYLOAD);
                rank.all_reduce_sum(&mut data).unwrap();
                bits(&data)
            });
            for sum in sums {
                assert_eq!(sum[..4], [PAYLOAD; 4], "{transport:?}");
                assert!(sum[4..].iter().all(|&bits| f32::from_bits(bits) == 6.0));
            }
        }
    }
}

/// Everyone sends megabytes to everyone before anyone reads: more than socket buffers hold.
#[test]
fn large_messages_in_all_directions_do_not_wait_for_each_other() {
    const NUM_FLOATS: usize = 1_500_000;
    let ok = on_each_rank(&mut Transport::Tcp.group(3), |rank| {
        let mine = vec![rank.rank().0 as f32; NUM_FLOATS];
        let mut gathered = vec![0.0; 3 * NUM_FLOATS];
        rank.all_gather(&mine, &mut gathered).unwrap();
        (0..3).all(|peer| {
            gathered[peer * NUM_FLOATS..][..NUM_FLOATS].iter().all(|&v| v == peer as f32)
        })
    });
    assert_eq!(ok, [true; 3]);
}

/// A rank may be rounds ahead of a slow peer in broadcasts; its messages wait in order.
#[test]
fn a_fast_root_does_not_overtake_itself() {
    for transport in BOTH {
        let seen = on_each_rank(&mut transport.group(3), |rank| {
            let mut seen = Vec::new();
            for i in 0..200 {
                let mut data = [i];
                rank.broadcast_u32(&mut data, Rank(i % 3)).unwrap();
                seen.push(data[0]);
                let mut sum = [i as f32, rank.rank().0 as f32];
                rank.all_reduce_sum(&mut sum).unwrap();
                assert_eq!(sum, [3.0 * i as f32, 3.0], "{transport:?}");
            }
            seen
        });
        assert!(seen.iter().all(|seen| *seen == (0..200).collect::<Vec<u32>>()));
    }
}
