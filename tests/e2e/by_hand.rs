//! The README's 'Cluster by hand', as it stands there: a real etcd and every role started on its own
//! give what `tessera up` gives.

use rustix::process::Signal;
use tempfile::TempDir;
use tessera_tests::cluster::Endpoints;
use tessera_tests::etcd::Etcd;
use tessera_tests::golden::{CASES, Golden};
use tessera_tests::process::Process;
use tessera_tests::{chat, http, ports, readme, roles, tree, wait};

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
