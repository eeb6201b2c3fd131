//! What people type: `tessera generate`, `tessera config`, `tessera up --ask`.

use std::process::Output;

use tessera_tests::cluster::{Cluster, UpOptions};
use tessera_tests::golden::Golden;
use tessera_tests::{chat, fixtures, ports, roles, shared, wait};

const QUESTION: &str = "What is this?";

fn run(arguments: &[&str]) -> Output {
    roles::command(arguments).output().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn generate_prints_the_answer_and_nothing_else() {
    let cluster = shared::tp2();
    let photo = fixtures::media("photo.jpg");
    let prompt = chat::user(vec![chat::image_bytes(&photo), chat::text(QUESTION)]);
    // The command leaves the penalty to the checkpoint.
    let mut sampling = chat::greedy(12);
    (sampling.repetition_penalty, sampling.ignore_eos) = (None, None);
    let expected = cluster.grpc().answer(chat::request(prompt, sampling)).expect("is answered");

    let photo = fixtures::media_path("photo.jpg");
    let endpoint = format!("http://{}", cluster.endpoints.grpc);
    let more = ["--endpoint", &endpoint, "--max-tokens", "12", "--temperature", "0", QUESTION];
    let output =
        run(&[&["generate", "--image", photo.to_str().expect("UTF-8")], &more[..]].concat());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout).trim_end_matches('\n'), expected.choice().text);
}

#[test]
fn generate_uploads_what_is_too_large_for_a_message() {
    let cluster = shared::tp2();
    let directory = tempfile::tempdir().expect("a directory");
    let large = directory.path().join("large.bmp");
    std::fs::write(&large, fixtures::bmp(1500, 1000, 9)).expect("written");
    let endpoint = format!("http://{}", cluster.endpoints.grpc);
    let image = large.to_str().expect("UTF-8");
    let output = run(&[
        "generate",
        "--image",
        image,
        "--endpoint",
        &endpoint,
        "--max-tokens",
        "3",
        QUESTION,
    ]);
    assert!(output.status.success(), "{output:?}");
    assert!(!output.stdout.is_empty(), "{output:?}");
}

#[test]
fn generate_says_what_went_wrong() {
    let nobody = format!("http://{}", ports::free());
    let output = run(&["generate", "--endpoint", &nobody, QUESTION]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains(&nobody), "{output:?}");

    let endpoint = format!("http://{}", shared::tp2().endpoints.grpc);
    let output = run(&["generate", "--endpoint", &endpoint, "--image", "nowhere.png", QUESTION]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("nowhere.png"), "{output:?}");

    let output = run(&["generate", "--endpoint", &endpoint, "--temperature", "9", QUESTION]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("temperature"), "{output:?}");
}

#[test]
fn printed_settings_are_read_back() {
    let printed = run(&["config", "--cluster", "mine", "--set", "router.limits.max_choices=3"]);
    assert!(printed.status.success(), "{printed:?}");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("tessera.toml");
    std::fs::write(&file, &printed.stdout).expect("written");
    let again = run(&["config", "--config", file.to_str().expect("UTF-8")]);
    assert_eq!(text(&again.stdout), text(&printed.stdout), "{again:?}");
    assert!(text(&again.stdout).contains("max_choices = 3"), "{again:?}");
}

#[test]
fn every_role_documents_its_flags() {
    for role in ["up", "router", "encoder", "decoder", "generate", "config"] {
        let help = run(&[role, "--help"]);
        assert!(help.status.success(), "{help:?}");
        let flag = if role == "generate" { "--endpoint" } else { "--membership" };
        assert!(text(&help.stdout).contains(flag), "{role}: {help:?}");
    }
}

#[test]
fn up_answers_a_question_and_stays_up() {
    let photo = fixtures::media_path("photo.jpg");
    let more = ["--image".into(), photo.into(), "--ask".into(), QUESTION.into()].to_vec();
    let cluster = Cluster::up(&UpOptions { more, ..UpOptions::new("tiny", 1) });
    wait::until("the answer is printed", || cluster.supervisor.log().contains("staying up"));
    let golden = Golden::load("tiny", "text");
    let answer = cluster.grpc().answer(chat::golden(&golden)).expect("is answered");
    assert_eq!(answer.choice().token_ids, golden.greedy_tokens);
}
