//! The README's 'cluster by hand': a real etcd and every role started on its own give what `tessera up`
//! gives.

use tempfile::TempDir;
use tessera_tests::cluster::Endpoints;
use tessera_tests::etcd::Etcd;
use tessera_tests::golden::{CASES, Golden};
use tessera_tests::process::Process;
use tessera_tests::{chat, fixtures, http, ports, roles, tree, wait};

#[test]
fn roles_on_a_real_etcd_work_the_same() {
    let directory = TempDir::new().expect("a directory");
    let etcd = Etcd::start();
    let endpoints = Endpoints::free();
    let model = fixtures::model("tiny");
    let membership = etcd.membership();
    let start = |name: &str, more: &[&str]| -> Process {
        let role = name.split('-').next().expect("a role");
        let mut arguments = vec![role, "--model", model.to_str().expect("UTF-8")];
        arguments.extend(["--cluster", "by-hand", "--membership", &membership]);
        arguments.extend(more);
        roles::start(name, arguments, directory.path())
    };
    let (http, grpc) = (endpoints.http.to_string(), endpoints.grpc.to_string());
    let state = directory.path().to_str().expect("UTF-8");
    let decoder = ["--group", "g0", "--tp", "2", "--state-dir", state, "--listen", "127.0.0.1:0"];
    let admin = [(); 4].map(|()| ports::free());
    let [a, b, c, d] = admin.map(|address| address.to_string());
    let mut processes = vec![
        start("router", &["--http", &http, "--grpc", &grpc, "--admin", &a]),
        start("encoder", &["--listen", "127.0.0.1:0", "--admin", &b]),
        start("decoder-0", &[decoder.as_slice(), &["--slot", "0", "--admin", &c]].concat()),
        start("decoder-1", &[decoder.as_slice(), &["--slot", "1", "--admin", &d]].concat()),
    ];
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
        process.signal(rustix::process::Signal::TERM);
        let status = process.wait();
        assert!(status.success(), "{status}: {}", process.log());
    }
    tree::assert_gone(&ids);
}
