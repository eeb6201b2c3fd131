//! What cannot work does not start: one message that names the file and the field or tensor, and an
//! exit code.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::Path;

use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::Value;
use tempfile::TempDir;
use tessera_tests::roles::{self, Refusal};
use tessera_tests::{fixtures, ports};

/// Exit code for what the caller got wrong on the command line.
const USAGE: i32 = 2;
/// Exit code for everything else.
const FAILED: i32 = 1;

/// Runs a role on a model directory. Nobody listens at its membership: a bad model must be told all the
/// same.
fn refused(role: &str, model: &Path, more: &[&str]) -> Refusal {
    let membership = format!("etcd://{}", ports::free());
    let state = TempDir::new().expect("a directory");
    let mut arguments = vec![role, "--model", model.to_str().expect("UTF-8")];
    arguments.extend(["--membership", &membership]);
    let state_dir = state.path().to_str().expect("UTF-8");
    if role == "decoder" {
        arguments.extend(["--group", "g0", "--slot", "0", "--state-dir", state_dir]);
    }
    arguments.extend(more);
    roles::run_to_end(arguments)
}

#[track_caller]
fn assert_refused(refusal: &Refusal, code: i32, words: &[&str]) {
    assert_eq!(refusal.status.code(), Some(code), "{refusal:?}");
    for word in words {
        assert!(refusal.output.contains(word), "no {word:?} in the output: {}", refusal.output);
    }
    assert!(!refusal.output.contains("panicked"), "{}", refusal.output);
}

/// What a test does to one tensor.
enum Edit {
    Remove,
    /// One row less.
    Shorten,
}

/// Rewrites the checkpoint's file with one tensor spoilt.
fn spoil_tensor(model: &Path, name: &str, edit: Edit) {
    let path = model.join("model.safetensors");
    let bytes = fs::read(&path).expect("the checkpoint");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut kept: BTreeMap<String, TensorView<'_>> = tensors.tensors().into_iter().collect();
    let spoilt =
        kept.remove(name).unwrap_or_else(|| panic!("{name} is no tensor of the checkpoint"));
    if let Edit::Shorten = edit {
        let mut shape = spoilt.shape().to_vec();
        let row_bytes = spoilt.data().len() / shape[0];
        shape[0] -= 1;
        let data = &spoilt.data()[..shape[0] * row_bytes];
        kept.insert(name.to_owned(), TensorView::new(spoilt.dtype(), shape, data).expect("fits"));
    }
    fs::write(&path, safetensors::serialize(kept, None).expect("serializes")).expect("written");
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let text = fs::read_to_string(path).expect("the file");
    let mut json: Value = serde_json::from_str(&text).expect("JSON");
    edit(&mut json);
    fs::write(path, json.to_string()).expect("written");
}

#[test]
fn a_missing_tensor_is_named_with_its_file() {
    let name = "model.layers.2.mlp.up_proj.weight";
    let model = fixtures::copy_of("tiny");
    spoil_tensor(model.path(), name, Edit::Remove);
    let refusal = refused("decoder", model.path(), &["--tp", "2"]);
    assert_refused(&refusal, FAILED, &["model.safetensors", name]);
}

#[test]
fn a_misshapen_tensor_is_named_with_its_file() {
    let name = "model.layers.1.self_attn.q_proj.weight";
    let model = fixtures::copy_of("tiny");
    spoil_tensor(model.path(), name, Edit::Shorten);
    let refusal = refused("decoder", model.path(), &["--tp", "2"]);
    assert_refused(&refusal, FAILED, &["model.safetensors", name, "255"]);
}

#[test]
fn a_missing_vision_tensor_stops_the_encoder() {
    let name = "visual.blocks.1.attn.qkv.weight";
    let model = fixtures::copy_of("tiny");
    spoil_tensor(model.path(), name, Edit::Remove);
    assert_refused(&refused("encoder", model.path(), &[]), FAILED, &["model.safetensors", name]);
}

#[test]
fn a_missing_shard_is_named() {
    let model = fixtures::copy_of("tiny-nested");
    let shard = "model-00002-of-00003.safetensors";
    fs::remove_file(model.path().join(shard)).expect("removed");
    assert_refused(&refused("decoder", model.path(), &["--tp", "2"]), FAILED, &[shard]);
}

#[test]
fn a_checkpoint_that_breaks_off_is_named() {
    let model = fixtures::copy_of("tiny");
    let path = model.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("the checkpoint");
    fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
    assert_refused(
        &refused("decoder", model.path(), &["--tp", "2"]),
        FAILED,
        &["model.safetensors"],
    );
}

#[test]
fn an_impossible_degree_is_refused() {
    let refusal = refused("decoder", &fixtures::model("tiny"), &["--tp", "3"]);
    assert_refused(&refusal, FAILED, &["degree 3", "2 KV heads"]);
}

#[test]
fn a_wrong_config_is_named_with_its_field() {
    let config = "config.json";
    for role in ["decoder", "encoder"] {
        let more: &[&str] = if role == "decoder" { &["--tp", "2"] } else { &[] };
        let broken = fixtures::copy_of("tiny");
        fs::write(broken.path().join(config), "{\"hidden_size\": ").expect("written");
        assert_refused(&refused(role, broken.path(), more), FAILED, &[config, "JSON"]);

        let missing = fixtures::copy_of("tiny");
        fs::remove_file(missing.path().join(config)).expect("removed");
        assert_refused(&refused(role, missing.path(), more), FAILED, &[config]);
    }
    let without_field = fixtures::copy_of("tiny");
    edit_json(&without_field.path().join(config), |json| {
        json.as_object_mut().expect("an object").remove("hidden_size");
    });
    let refusal = refused("decoder", without_field.path(), &["--tp", "2"]);
    assert_refused(&refusal, FAILED, &[config, "hidden_size"]);

    let wrong_field = fixtures::copy_of("tiny");
    edit_json(&wrong_field.path().join(config), |json| {
        json["vision_config"]["depth"] = "four".into()
    });
    assert_refused(&refused("encoder", wrong_field.path(), &[]), FAILED, &[config, "depth"]);
}

#[test]
fn a_router_needs_its_tokenizer_and_template() {
    let http = ports::free().to_string();
    let grpc = ports::free().to_string();
    let faces = ["--http", http.as_str(), "--grpc", grpc.as_str()];
    let without_tokenizer = fixtures::copy_of("tiny");
    fs::remove_file(without_tokenizer.path().join("tokenizer.json")).expect("removed");
    let refusal = refused("router", without_tokenizer.path(), &faces);
    assert_refused(&refusal, FAILED, &["tokenizer.json"]);

    let broken_template = fixtures::copy_of("tiny");
    let template = broken_template.path().join("chat_template.json");
    edit_json(&template, |json| json["chat_template"] = "{% for %}".into());
    assert_refused(&refused("router", broken_template.path(), &faces), FAILED, &["chat_template"]);
}

#[test]
fn a_port_in_use_is_named() {
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = holder.local_addr().expect("bound").to_string();
    let free = ports::free().to_string();
    let tiny = fixtures::model("tiny");
    for faces in [["--http", &taken, "--grpc", &free], ["--http", &free, "--grpc", &taken]] {
        assert_refused(&refused("router", &tiny, &faces), FAILED, &[&taken]);
    }
    assert_refused(&refused("encoder", &tiny, &["--listen", &taken]), FAILED, &[&taken]);
}

#[test]
fn unknown_settings_are_named() {
    let tiny = fixtures::model("tiny");
    let refusal = refused("router", &tiny, &["--set", "router.htttp=1"]);
    assert_refused(&refusal, USAGE, &["htttp"]);
    let refusal = refused("router", &tiny, &["--set", "router.limits.max_choices=many"]);
    assert_refused(&refusal, USAGE, &["max_choices"]);
    let refusal = refused("encoder", &tiny, &["--no-such-flag"]);
    assert_refused(&refusal, USAGE, &["--no-such-flag"]);
    let refusal = refused("router", &tiny, &["--config", "nowhere/tessera.toml"]);
    assert_refused(&refusal, USAGE, &["nowhere/tessera.toml"]);
}

#[test]
fn a_directory_without_a_model_is_named() {
    let empty = TempDir::new().expect("a directory");
    let name = empty.path().file_name().and_then(|name| name.to_str()).expect("a name");
    for role in ["router", "encoder", "decoder"] {
        assert_refused(&refused(role, empty.path(), &[]), FAILED, &[name]);
    }
}

#[test]
fn the_processes_of_a_group_must_divide_its_ranks() {
    let refusal = roles::run_to_end(["up", "--tp", "3", "--ranks-per-process", "2"]);
    assert_refused(&refusal, USAGE, &["--ranks-per-process"]);
    let refusal = roles::run_to_end(["up", "--membership", "zookeeper://127.0.0.1:1"]);
    assert!(!refusal.status.success(), "{refusal:?}");
    assert!(refusal.output.contains("zookeeper"), "{refusal:?}");
}
