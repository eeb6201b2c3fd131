//! The README's 'Cluster by hand', as it stands there: a real etcd and every role started on its own
//! give what `tessera up` gives.

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;
use tessera_tests::cluster::Endpoints;
use tessera_tests::etcd::Etcd;
use tessera_tests::golden::{CASES, Golden};
use tessera_tests::process::Process;
use tessera_tests::{chat, fixtures, http, ports, readme, roles, tree, wait};

/// The etcd of the README.
const ETCD: &str = "etcd://127.0.0.1:2379";

/// Arguments of every `tessera` in the block, with its etcd replaced by ours.
fn commands(membership: &str) -> Vec<Vec<String>> {
    let lines = readme::commands("Cluster by hand");
    let model = lines.iter().find_map(|line| line.strip_prefix("M=")).expect("the block sets M");
    let programs = lines.iter().filter_map(|line| line.strip_prefix("target/debug/tessera "));
    let word = |word: &str| match word {
        "$M" => model.to_owned(),
        ETCD => membership.to_owned(),
        other => other.to_owned(),
    };
    let words =
        |line: &str| line.split_whitespace().filter(|&word| word != "&").map(word).collect();
    programs.map(words).collect()
}

/// A chat about one picture: the second turn sends it again, and the encoder has nothing to do.
fn assert_second_turn_encodes_nothing(endpoints: Endpoints, encoder: http::Client) {
    let num_encoded = || {
        let metrics = encoder.get("/metrics").body;
        let text = String::from_utf8_lossy(&metrics).into_owned();
        let count = |line: &str| {
            line.strip_prefix("tessera_encoder_requests_total{outcome=\"encoded\"} ")?.parse().ok()
        };
        text.lines().find_map(count).unwrap_or(0u64)
    };
    let url = fixtures::data_url(&fixtures::bmp(150, 90, 11));
    let first_turn = chat::image_body(&url, "What is it?", 8);
    let before = num_encoded();
    let first = endpoints.http().chat(&first_turn).ok();
    assert_eq!(first["tessera"]["media"][0]["cache_hit"], false, "{first}");
    assert_eq!(num_encoded(), before + 1);
    let mut second_turn = first_turn;
    let messages = second_turn["messages"].as_array_mut().expect("a list");
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({"role": "user", "content": "And its colour?"}));
    let second = endpoints.http().chat(&second_turn).ok();
    assert_eq!(second["tessera"]["media"][0]["cache_hit"], true, "{second}");
    assert_eq!(num_encoded(), before + 1);
    // Nor is it prefilled again: its rows stand in the prefix that both turns share.
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached >= first["tessera"]["media"][0]["num_tokens"].as_u64(), "{second}");
}

#[test]
fn the_readmes_cluster_by_hand_works_the_same() {
    let directory = TempDir::new().expect("a directory");
    let etcd = Etcd::start();
    let endpoints = Endpoints::free();
    let mut admin = Vec::new();
    let mut start = |(index, mut arguments): (usize, Vec<String>)| -> Process {
        let role = arguments[0].clone();
        // Ports of our own; all else is the README's.
        if role == "router" {
            let (http, grpc) = (endpoints.http.to_string(), endpoints.grpc.to_string());
            arguments.extend(["--http".to_owned(), http, "--grpc".to_owned(), grpc]);
        }
        if role != "router" {
            // Greedy tokens equal the golden ones whatever the margin.
            arguments.extend(["--device".to_owned(), "cpu-f32".to_owned()]);
        }
        admin.push(ports::free());
        arguments.extend(["--admin".to_owned(), admin[index].to_string()]);
        let mut command = roles::command(&arguments);
        command.current_dir(readme::root());
        Process::start(&format!("{role}-{index}"), &mut command, directory.path())
    };
    let commands = commands(&etcd.membership());
    let roles: Vec<_> = commands.iter().map(|arguments| arguments[0].clone()).collect();
    assert_eq!(roles, ["encoder", "decoder", "decoder", "router"]);
    let mut processes: Vec<_> = commands.into_iter().enumerate().map(&mut start).collect();
    wait::until("the cluster is ready", || {
        for process in &mut processes {
            let exited = process.exited();
            assert!(exited.is_none(), "a role ended with {exited:?}: {}", process.log());
        }
        endpoints.is_ready()
    });
    for case in CASES {
        let golden = Golden::load("tiny", case);
        let answer = endpoints.grpc().answer(chat::golden(&golden)).expect("is answered");
        assert_eq!(answer.choice().token_ids, golden.greedy_tokens, "{case}");
        assert_eq!(answer.prompt().token_ids, golden.prompt_ids, "{case}");
    }
    let golden = Golden::load("tiny", "image_odd");
    let answer = endpoints.http().chat(&golden.http_body()).ok();
    assert_eq!(chat::ids(&answer["choices"][0], "token_ids"), golden.greedy_tokens);

    assert_second_turn_encodes_nothing(endpoints, http::Client::new(admin[0]));

    for address in admin {
        let admin = http::Client::new(address);
        assert_eq!((admin.get("/livez").status, admin.get("/readyz").status), (200, 200));
        let metrics = admin.get("/metrics");
        let text = String::from_utf8_lossy(&metrics.body);
        assert!(text.contains("tessera_"), "{text}");
    }

    // Each role ends cleanly by itself when it is told to.
    let ids: Vec<_> = processes.iter().map(|process| process.id().clone()).collect();
    for process in &mut processes {
        process.signal(Signal::TERM);
        let status = process.wait();
        assert!(status.success(), "{status}: {}", process.log());
    }
    tree::assert_gone(&ids);
}
