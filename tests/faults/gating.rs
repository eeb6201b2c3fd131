//! Prefill does not wait for every picture: what stands before a picture that is still being encoded is
//! computed meanwhile.

use rustix::process::Signal;
use tempfile::TempDir;
use tessera_tests::cluster::Endpoints;
use tessera_tests::etcd::Etcd;
use tessera_tests::process::Process;
use tessera_tests::{chat, fixtures, http, ports, roles, wait};

const BLOCK_SIZE: u64 = 16;
/// Sides of the pictures, and the visual tokens of each.
const SIDE: u32 = 280;
const VISUAL_TOKENS: u64 = 100;

/// A role with its figures.
struct Role {
    process: Process,
    admin: http::Client,
}

impl Role {
    fn start(arguments: &[&str], directory: &TempDir) -> Self {
        let address = ports::free();
        let mut command = roles::command(arguments);
        command.args(["--admin", &address.to_string()]);
        let name = format!("{}-{}", arguments[0], address.port());
        let process = Process::start(&name, &mut command, directory.path());
        Self { process, admin: http::Client::new(address) }
    }

    fn metric(&self, name: &str) -> u64 {
        let body = self.admin.get("/metrics").body;
        let text = String::from_utf8_lossy(&body).into_owned();
        let of = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<f64>().ok();
        text.lines().find_map(of).unwrap_or_else(|| panic!("{name} is missing: {text}")) as u64
    }

    fn patches(&self) -> u64 {
        self.metric("tessera_encoder_patches_total")
    }

    fn used_blocks(&self) -> u64 {
        self.metric("tessera_decoder_kv_blocks") - self.metric("tessera_decoder_free_kv_blocks")
    }
}

fn picture(seed: u32) -> tessera_proto::inference::v1::ContentPart {
    chat::image_bytes(&fixtures::bmp(SIDE, SIDE, seed))
}

#[test]
fn what_stands_before_a_picture_is_prefilled_while_it_is_encoded() {
    let directory = TempDir::new().expect("a directory");
    let etcd = Etcd::start();
    let (membership, model) = (etcd.membership(), fixtures::model("tiny"));
    let model = model.to_str().expect("UTF-8");
    let shared = ["--membership", &membership, "--model", model];
    let worker = [&shared[..], &["--device", "cpu-f32"]].concat();
    let endpoints = Endpoints::free();
    let (http, grpc) = (endpoints.http.to_string(), endpoints.grpc.to_string());
    let encoders = [0, 1].map(|_| Role::start(&[&["encoder"], &worker[..]].concat(), &directory));
    let decoder = Role::start(&[&["decoder", "--tp", "1"], &worker[..]].concat(), &directory);
    let router = [&["router", "--http", &http, "--grpc", &grpc], &shared[..]].concat();
    let _router = Role::start(&router, &directory);
    wait::until("the cluster is ready", || {
        let encoders = endpoints.grpc().cluster().map(|view| view.encoders.len());
        endpoints.is_ready() && encoders.is_ok_and(|encoders| encoders == 2)
    });

    let text: String = (0..200).map(|word| format!("word {word}, ")).collect();
    let alone = chat::request(chat::user(vec![chat::text(&text)]), chat::greedy(1));
    let answer = endpoints.grpc().answer(alone).expect("is answered");
    // The template ends this prompt with a few tokens that a prompt with pictures has elsewhere.
    let text_tokens = answer.prompt().token_ids.len() as u64 - BLOCK_SIZE;
    let before_late = (text_tokens + VISUAL_TOKENS) / BLOCK_SIZE;

    // A picture goes to the encoder that its content picks. With one of the two stopped, a picture is found
    // soon that waits for it.
    let has_waited = (2..40).any(|late| {
        let parts = || vec![chat::text(&text), picture(1), chat::text("And:"), picture(late)];
        let request = || chat::request(chat::user(parts()), chat::greedy(4));
        let encoded = encoders[0].patches();
        encoders[1].process.signal(Signal::STOP);
        let asking = std::thread::spawn({
            let request = request();
            move || endpoints.grpc().answer(request).expect("is answered")
        });
        // Asked in this order: when the KV cache held so much, the later picture was encoded nowhere yet.
        let is_ahead = || decoder.used_blocks() >= before_late && encoders[0].patches() == encoded;
        let mut has_waited = false;
        wait::until("the request ends, or is ahead of its later picture", || {
            has_waited = is_ahead();
            has_waited || asking.is_finished()
        });
        encoders[1].process.signal(Signal::CONT);
        let answer = asking.join().expect("the client itself does not fail");
        let undisturbed = endpoints.grpc().answer(request()).expect("is answered");
        assert_eq!(answer.choice().token_ids, undisturbed.choice().token_ids);
        has_waited
    });
    assert!(has_waited, "prefill always waited for the later picture");
}
