//! `tessera bench`: its counts are right, its JSON complete, its load real.

use std::path::Path;

use serde_json::Value;
use tessera_tests::{ports, roles, shared};

/// Runs `tessera bench` with `--json` and reads what it wrote. It must succeed. No argument holds a space.
fn bench(arguments: &str) -> Value {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("report.json");
    let json = file.to_str().expect("UTF-8");
    let all = ["bench"].into_iter().chain(arguments.split_whitespace()).chain(["--json", json]);
    let output = roles::command(all).output().expect("the program runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!output.stdout.is_empty(), "a table is printed");
    read(&file)
}

fn read(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).expect("a report")).expect("JSON")
}

/// The number at a path, which must be finite.
fn number(report: &Value, pointer: &str) -> f64 {
    let value =
        report.pointer(pointer).unwrap_or_else(|| panic!("{pointer} is missing: {report:#}"));
    value.as_f64().unwrap_or_else(|| panic!("{pointer} is {value}"))
}

/// Percentiles of `count` values that ascend.
fn assert_percentiles(report: &Value, pointer: &str, count: u64) {
    let at = |name: &str| number(report, &format!("{pointer}/{name}"));
    assert_eq!(at("count"), count as f64, "{pointer}");
    let ascending = [at("p50"), at("p90"), at("p99"), at("max")];
    assert!(ascending[0] >= 0.0 && ascending.is_sorted(), "{pointer}: {ascending:?}");
    assert!(at("mean") <= at("max"), "{pointer}");
}

#[test]
fn a_closed_loop_over_http_counts_every_request_and_token() {
    let cluster = shared::tp2();
    let url = format!("http://{}", cluster.endpoints.http);
    let report = bench(&format!(
        "serve --url {url} --concurrency 3 --requests 7 --turns 2 --warmup 1 --prompt-length \
         12 --output-length uniform:4,9 --slo e2e=600s"
    ));
    // Two turns of each of seven chats.
    assert_eq!(number(&report, "/requests/sent"), 14.0);
    assert_eq!(number(&report, "/requests/failed"), 0.0, "{:#}", report["requests"]);
    assert_eq!(number(&report, "/goodput/good"), 14.0);
    let output = number(&report, "/tokens/output");
    assert!((14.0 * 4.0..=14.0 * 9.0).contains(&output), "{output} tokens");
    for latency in ["ttft_ms", "tpot_ms", "e2e_ms"] {
        assert_percentiles(&report, &format!("/latency/{latency}"), 14);
        assert_percentiles(&report, &format!("/latency_by_turn/1/{latency}"), 7);
        assert_percentiles(&report, &format!("/latency_by_kind/text/{latency}"), 14);
    }
    let seconds = number(&report, "/duration_seconds");
    let per_second = number(&report, "/throughput/output_tokens_per_second");
    assert!((per_second * seconds - output).abs() < 1e-6 * output);
    assert!(number(&report, "/client/cpu_cores") >= 0.0);
    assert_percentiles(&report, "/arrival_lag_ms", 14);
}

#[test]
fn an_open_loop_over_grpc_sends_text_images_and_videos() {
    let cluster = shared::tp2();
    let url = format!("grpc://{}", cluster.endpoints.grpc);
    let report = bench(&format!(
        "serve --url {url} --rate 20 --requests 12 --text 0.4 --image 0.3 --video 0.3 \
         --image-size 84x56,56x56 --frame-size 56x56 --frames 2 --prompt-length 6 \
         --output-length 5 --warmup 1 --seed 3"
    ));
    assert_eq!(number(&report, "/requests/sent"), 12.0);
    assert_eq!(number(&report, "/requests/failed"), 0.0, "{:#}", report["requests"]);
    assert_eq!(number(&report, "/tokens/output"), 60.0);
    // Every token is a piece of its own, so there are as many gaps as tokens after the first.
    assert_percentiles(&report, "/latency/itl_ms", 48);
    let kinds = report["latency_by_kind"].as_object().expect("kinds");
    let counts =
        kinds.keys().map(|kind| number(&report, &format!("/latency_by_kind/{kind}/e2e_ms/count")));
    assert_eq!(counts.sum::<f64>(), 12.0);
    assert_eq!(kinds.len(), 3, "{kinds:?}");
}

#[test]
fn the_second_turn_finds_the_first_in_the_prefix_cache() {
    let cluster = shared::tp2();
    let url = format!("grpc://{}", cluster.endpoints.grpc);
    let report = bench(&format!(
        "serve --url {url} --requests 3 --turns 2 --image 1 --image-size 112x112 \
         --prompt-length 40 --output-length 4 --warmup 0 --seed 11"
    ));
    assert_eq!(number(&report, "/requests/failed"), 0.0, "{:#}", report["requests"]);
    // Whole blocks of first turns with sixteen visual tokens and forty words each.
    let cached = number(&report, "/tokens/cached");
    assert!(cached >= 3.0 * 48.0, "{cached} cached tokens: {:#}", report["tokens"]);
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let address = ports::free();
    for url in [format!("http://{address}"), format!("grpc://{address}")] {
        let output = roles::command(["bench", "serve", "--url", &url]).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(message.contains(&address.to_string()) && message.contains("connect"), "{message}");
    }
}

#[test]
fn the_engine_is_measured_beside_its_limits() {
    let report = bench(
        "engine --shape tiny --tp 2 --prefill 40 --decode 1,3 --context 32 --steps 3 --mixed \
         2 --mixed-prompt 200 --continuous 1,3 --continuous-window 0.05 --continuous-prompt 5 \
         --continuous-output 6 --vision 56x84 --token-budget 24 --repeats 2",
    );
    assert_eq!(number(&report, "/prefill/0/steps"), 2.0);
    for row in ["/prefill/0", "/decode/0", "/decode/1", "/vision/0"] {
        for name in ["ms", "limit_ms", "share"] {
            assert!(number(&report, &format!("{row}/{name}/median")) > 0.0, "{row}/{name}");
        }
        assert_eq!(number(&report, &format!("{row}/num_pairs")), 2.0);
    }
    assert_eq!(number(&report, "/decode/1/batch"), 3.0);
    assert_eq!(number(&report, "/vision/0/visual_tokens"), 6.0);
    // The promise of the token budget: running sequences advance in every step.
    assert_eq!(number(&report, "/mixed/longest_gap_steps"), 1.0);
    assert!(number(&report, "/mixed/num_gaps") >= 18.0, "{:#}", report["mixed"]);
    assert!(number(&report, "/continuous/1/tokens_per_second/median") > 0.0);
    assert_eq!(report.pointer("/shape/name").and_then(Value::as_str), Some("tiny"));
}

#[test]
fn every_group_of_kernels_is_measured() {
    let report = bench("kernels --shape tiny --rows 1,3 --contexts 40 --image 56x56 --repeats 1");
    let rows = report["kernels"].as_array().expect("rows");
    // Five linears, rotations and norms at two numbers of rows each; decode and prefill; windows and whole
    // frames; two ways to draw at three batch sizes.
    assert_eq!(rows.len(), 5 * 2 + 2 + 2 + 2 + 2 + 6);
    for row in rows {
        assert!(
            number(row, "/ms/median") > 0.0 && number(row, "/limit_ms/median") > 0.0,
            "{row:#}"
        );
    }
}

/// On the CPU, since a test has no GPU: shapes and parts are the same.
#[test]
fn shares_of_ranks_and_the_tower_are_measured_one_after_the_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let json = directory.path().join("figures");
    let arguments = "bench gpu --device cpu --shapes tiny/2,tiny --prefill 40 --decode 1,3 --context 32 \
         --vision-shape tiny --images 56x84 --repeats 1 --json";
    let arguments = arguments.split_whitespace().map(Into::into).chain([json.clone().into()]);
    let output = roles::command(arguments.collect::<Vec<std::ffi::OsString>>()).output();
    let output = output.expect("the program runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let weights = ["tiny-of-2", "tiny"].map(|part| {
        let report = read(&json.join(format!("{part}.json")));
        assert_eq!(number(&report, "/prefill/0/steps"), 1.0, "{part}");
        assert_eq!(number(&report, "/decode/1/batch"), 3.0, "{part}");
        number(&report, "/decode/0/bytes")
    });
    assert!((0.4..0.6).contains(&(weights[0] / weights[1])), "{weights:?}");
    let tower = read(&json.join("tiny-tower.json"));
    assert_eq!(number(&tower, "/vision/0/visual_tokens"), 6.0);
}
