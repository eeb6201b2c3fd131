//! What the two faces say of the server itself.

use serde_json::json;
use tessera_proto::inference::v1::TokenizeRequest;
use tessera_tests::golden::Golden;
use tessera_tests::{chat, golden, shared};

#[test]
fn health_is_good_on_both_faces() {
    let cluster = shared::tp2();
    assert_eq!(cluster.http().get("/health").status, 200);
    for service in ["", "tessera.inference.v1.Inference"] {
        assert!(cluster.grpc().is_serving(service), "{service:?}");
    }
    assert!(!cluster.grpc().is_serving("no.such.Service"));
}

#[test]
fn reflection_lists_the_services() {
    let services = shared::tp2().grpc().services();
    for service in ["tessera.inference.v1.Inference", "grpc.health.v1.Health"] {
        assert!(services.iter().any(|name| name == service), "{service} in {services:?}");
    }
}

#[test]
fn the_model_is_described() {
    let cluster = shared::tp2();
    let list = cluster.http().get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "tiny");
    assert_eq!(list["data"][0]["object"], "model");
    let model = cluster.grpc().model().expect("is described");
    assert_eq!((model.name.as_str(), model.max_model_len), ("tiny", 4096));
    assert_eq!(model.vocab_size, 2176);
    assert!(model.eos_token_ids.contains(&golden::special_id("tiny", "<|im_end|>")), "{model:?}");
    assert!(!model.fingerprint.is_empty());
}

#[test]
fn the_cluster_is_described() {
    let cluster = shared::tp2().grpc().cluster().expect("is described");
    assert_eq!((cluster.groups.len(), cluster.encoders.len()), (1, 1), "{cluster:?}");
    let group = &cluster.groups[0];
    assert_eq!(group.world_size, 2);
    assert!(group.epoch >= 1, "{group:?}");
}

#[test]
fn prompts_are_tokenized_as_for_generation() {
    let cluster = shared::tp2();
    for case in ["text", "multi_turn"] {
        let golden = Golden::load("tiny", case);
        let request =
            TokenizeRequest { messages: golden.grpc_messages(), ..TokenizeRequest::default() };
        let reply = cluster.grpc().tokenize(request).expect("is tokenized");
        assert_eq!(reply.token_ids, golden.prompt_ids, "{case}");
        assert_eq!(reply.media.len(), golden.media.len(), "{case}");
        let body = json!({"messages": golden.http_messages()});
        let reply = cluster.http().post_json("/tokenize", &body).ok();
        assert_eq!(chat::ids(&reply, "tokens"), golden.prompt_ids, "{case}");
        assert_eq!(reply["count"], golden.prompt_ids.len(), "{case}");
    }
}

#[test]
fn an_answer_has_the_form_that_clients_expect() {
    let golden = Golden::load("tiny", "text");
    let answer = shared::tp2().http().chat(&golden.http_body());
    assert_eq!(answer.headers.get("content-type"), Some("application/json"));
    let answer = answer.ok();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "tiny");
    assert!(answer["id"].as_str().is_some_and(|id| !id.is_empty()));
    assert!(answer["created"].is_u64());
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
}

#[test]
fn unknown_paths_and_methods_are_refused() {
    let http = shared::tp2().http();
    assert_eq!(http.get("/v1/no/such/path").status, 404);
    assert_eq!(http.get("/v1/chat/completions").status, 405);
}
