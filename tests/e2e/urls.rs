//! Promise 7: no file is read and no address fetched for a client.

use std::io::ErrorKind;
use std::net::TcpListener;

use serde_json::json;
use tessera_proto::inference::v1::media_source::Source;
use tessera_tests::chat::{self, image_body};
use tessera_tests::{fixtures, grpc, shared};
use tonic::Code;

#[test]
fn file_and_private_urls_are_refused_and_not_followed() {
    let cluster = shared::tp2();
    let bait = TcpListener::bind("127.0.0.1:0").expect("a port");
    bait.set_nonblocking(true).expect("a socket");
    let port = bait.local_addr().expect("bound").port();
    let urls = [
        format!("http://127.0.0.1:{port}/a.png"),
        format!("https://localhost:{port}/a.png"),
        format!("http://[::ffff:127.0.0.1]:{port}/a.png"),
        "http://10.0.0.1/a.png".to_owned(),
        "http://169.254.169.254/latest/meta-data".to_owned(),
        "ftp://127.0.0.1/a.png".to_owned(),
        format!("file://{}", fixtures::media_path("photo.jpg").display()),
        fixtures::media_path("photo.jpg").display().to_string(),
        "file:///etc/passwd".to_owned(),
    ];
    for url in &urls {
        let response = cluster.http().chat(&image_body(url, "What is this?", 4));
        assert_eq!(response.status, 400, "{url}: {response}");
        let error = &response.json()["error"];
        assert_eq!(error["code"], "media_url_refused", "{url}: {response}");
        assert_eq!(error["param"], "messages[0].content[0].image_url.url", "{url}");

        let parts = vec![chat::image(Source::Url(url.clone()))];
        let request = chat::request(chat::user(parts), chat::greedy(4));
        let status = cluster.grpc().answer(request).expect_err("is refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{url}: {status:?}");
        assert_eq!(grpc::detail(&status).reason, "MEDIA_URL_REFUSED", "{url}");
    }
    let connected = bait.accept().map(|(_, peer)| peer).expect_err("nobody may connect");
    assert_eq!(connected.kind(), ErrorKind::WouldBlock);
}

#[test]
fn videos_by_url_are_refused() {
    let content = json!([{"type": "video_url", "video_url": {"url": "file:///a.mp4"}}]);
    let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 4});
    let response = shared::tp2().http().chat(&body);
    assert_eq!(response.status, 400, "{response}");
    assert_eq!(response.json()["error"]["code"], "media_url_refused", "{response}");
}

#[test]
fn a_data_url_over_grpc_is_a_picture() {
    let url = fixtures::data_url(&fixtures::media("odd_97x131.png"));
    let parts = vec![chat::image(Source::Url(url)), chat::text("What is this?")];
    let request = chat::request(chat::user(parts), chat::greedy(1));
    let answer = shared::tp2().grpc().answer(request).expect("is answered");
    assert_eq!(answer.prompt().media[0].source_width, 97);
}
