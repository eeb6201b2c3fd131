//! Golden parity of the `cpu` backend (ENGINE §7).
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod support;

use support::fixture::Fixture;
use support::parity::{
    FIXTURES, assert_bf16, assert_rows_bf16, assert_rows_tight, assert_tight, encode, run,
};
use tessera_kernels::{CpuBackend, CpuFormat};

fn f32() -> CpuBackend {
    CpuBackend::new(1, CpuFormat::F32).unwrap()
}

fn bf16() -> CpuBackend {
    CpuBackend::new(1, CpuFormat::Bf16).unwrap()
}

#[test]
fn f32_weights_meet_the_bound_of_the_reference() {
    for name in FIXTURES {
        let fixture = Fixture::open(name);
        for case in fixture.cases() {
            assert_tight(&case, &run(f32, &fixture, &case, 1), name);
            assert_rows_tight(&case, &encode(f32, &fixture, &case), name);
        }
    }
}

#[test]
fn f32_weights_meet_it_at_every_tensor_parallel_degree() {
    for (name, case) in [("tiny", "multi_turn"), ("tiny-nested", "images")] {
        let fixture = Fixture::open(name);
        let case = fixture.case(case);
        for world_size in [2, 4, 8] {
            let what = format!("{name} at TP {world_size}");
            assert_tight(&case, &run(f32, &fixture, &case, world_size), &what);
        }
    }
}

#[test]
fn yarn_meets_both_bounds() {
    let fixture = Fixture::yarn();
    for case in fixture.cases() {
        assert_tight(&case, &run(f32, &fixture, &case, 1), "YaRN");
        assert_bf16(&case, &run(bf16, &fixture, &case, 2), "YaRN");
    }
}

#[test]
fn bf16_errs_no_more_than_the_reference_in_bf16() {
    for name in FIXTURES {
        let fixture = Fixture::open(name);
        for case in fixture.cases() {
            for world_size in [1, 2] {
                let place = format!("{name}, {}, TP {world_size}", case.name);
                assert_bf16(&case, &run(bf16, &fixture, &case, world_size), &place);
            }
        }
    }
}

#[test]
fn bf16_visual_rows_err_no_more_than_the_reference_in_bf16() {
    for name in FIXTURES {
        let fixture = Fixture::open(name);
        for case in fixture.cases() {
            assert_rows_bf16(&case, &encode(bf16, &fixture, &case), name);
        }
    }
}
