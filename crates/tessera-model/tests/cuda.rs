//! Golden parity of the `cuda` backend (ENGINE §7), on the first GPU of the machine. Without a driver there is nothing
//! to run, and every test says so.
#![allow(clippy::unwrap_used)] // In a test, what fails is the test.

mod support;

use support::fixture::Fixture;
use support::parity::{
    FIXTURES, assert_bf16, assert_rows_bf16, assert_rows_tight, assert_tight, encode, run,
};
use tessera_kernels::cuda::{self, CudaBackend};
use tessera_kernels::{CudaError, CudaFormat, CudaOptions};

fn backend(format: CudaFormat) -> CudaBackend {
    cuda::open(&CudaOptions { ordinal: 0, format, deterministic: false }).unwrap()
}

fn f32() -> CudaBackend {
    backend(CudaFormat::F32)
}

fn bf16() -> CudaBackend {
    backend(CudaFormat::Bf16)
}

/// Calls `test` with every fixture, if there is a driver.
fn on_fixtures(test: impl Fn(&str, &Fixture)) {
    if has_driver() {
        FIXTURES.iter().for_each(|name| test(name, &Fixture::open(name)));
    }
}

/// Anything but a driver that is not there is a failure.
fn has_driver() -> bool {
    let missing = matches!(cuda::check().driver, Err(CudaError::DriverMissing));
    if missing {
        eprintln!("skipped: no NVIDIA driver on this machine");
    }
    !missing
}

#[test]
fn f32_gives_the_golden_tokens_and_logits() {
    on_fixtures(|name, fixture| {
        for case in fixture.cases() {
            assert_tight(&case, &run(f32, fixture, &case, 1), name);
        }
    });
}

#[test]
fn f32_gives_the_golden_visual_rows() {
    on_fixtures(|name, fixture| {
        for case in fixture.cases() {
            assert_rows_tight(&case, &encode(f32, fixture, &case), name);
        }
    });
}

#[test]
fn f32_gives_them_at_every_tensor_parallel_degree() {
    if !has_driver() {
        return;
    }
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
    if !has_driver() {
        return;
    }
    let fixture = Fixture::yarn();
    for case in fixture.cases() {
        assert_tight(&case, &run(f32, &fixture, &case, 1), "YaRN");
        assert_bf16(&case, &run(bf16, &fixture, &case, 2), "YaRN");
    }
}

#[test]
fn bf16_errs_no_more_than_the_reference_in_bf16() {
    on_fixtures(|name, fixture| {
        for case in fixture.cases() {
            for world_size in [1, 2] {
                let place = format!("{name}, {}, TP {world_size}", case.name);
                assert_bf16(&case, &run(bf16, fixture, &case, world_size), &place);
            }
        }
    });
}

#[test]
fn bf16_visual_rows_err_no_more_than_the_reference_in_bf16() {
    on_fixtures(|name, fixture| {
        for case in fixture.cases() {
            assert_rows_bf16(&case, &encode(bf16, fixture, &case), name);
        }
    });
}
