//! What clients saw of answers that a fault interrupted.

use std::thread::JoinHandle;

use serde_json::Value;
use tessera_proto::inference::v1::generate_response::Event;
use tessera_tests::chat::{self, with};
use tessera_tests::cluster::Endpoints;
use tessera_tests::golden::Golden;
use tessera_tests::grpc::{Answer, detail};
use tessera_tests::sse::Collected;
use tonic::{Code, Status};

/// Most of the context of `tiny`: a stream that is still running when the fault comes.
pub const LONG: u32 = 3900;

/// An answer that began and its end.
#[derive(Debug)]
pub struct Observed {
    pub token_ids: Vec<u32>,
    pub text: String,
    pub end: End,
}

/// How it ended.
#[derive(Debug)]
pub enum End {
    Finished,
    /// A status or error event.
    Failed {
        code: String,
        is_retryable: bool,
    },
}

/// A stream that a client reads in a thread of its own, from its first token on.
#[derive(Debug)]
pub struct Reader(JoinHandle<Observed>);

impl Reader {
    /// Waits for the end of the stream.
    pub fn finish(self) -> Observed {
        self.0.join().expect("the client itself does not fail")
    }

    /// Whether tokens are still to come.
    pub fn is_running(&self) -> bool {
        !self.0.is_finished()
    }
}

/// Starts the case as a gRPC stream of [`LONG`] tokens; returns once its first token came.
pub fn start_grpc(endpoints: &Endpoints, golden: &Golden) -> Reader {
    let mut request = chat::golden(golden);
    request.sampling.as_mut().expect("set").max_tokens = Some(LONG);
    let mut events = endpoints.grpc().generate(request).expect("is admitted");
    let mut answer = Answer::default();
    for event in events.by_ref() {
        let event = event.expect("no fault yet");
        let is_delta = matches!(event, Event::Delta(_));
        answer.add(event);
        if is_delta {
            break;
        }
    }
    Reader(std::thread::spawn(move || {
        let mut end = End::Finished;
        for event in events {
            match event {
                Ok(event) => answer.add(event),
                Err(status) => {
                    end = of_status(&status);
                    break;
                }
            }
        }
        let choice = answer.choice();
        let (token_ids, text) = (choice.token_ids.clone(), choice.text.clone());
        Observed { token_ids, text, end }
    }))
}

/// Starts the case as an HTTP stream of `max_tokens`; returns once its first token came.
pub fn start_http(endpoints: &Endpoints, golden: &Golden, max_tokens: u32) -> Reader {
    let body = with(golden.http_body(), serde_json::json!({"max_tokens": max_tokens}));
    let mut events = endpoints.http().chat_stream(&body);
    let mut collected = Collected::default();
    while collected.token_ids.is_empty() {
        collected.add(&events.next().expect("no fault yet"));
    }
    Reader(std::thread::spawn(move || {
        events.by_ref().for_each(|event| collected.add(&event));
        let end = match (&collected.error, events.is_done()) {
            (Some(error), false) => of_error_event(error),
            (None, true) => End::Finished,
            other => panic!("the stream ended in neither an error nor [DONE]: {other:?}"),
        };
        Observed { token_ids: collected.token_ids, text: collected.text, end }
    }))
}

fn of_status(status: &Status) -> End {
    let detail = detail(status);
    // The class of the status and its detail must say the same.
    assert_eq!(status.code() == Code::Unavailable, detail.retryable, "{status:?}");
    End::Failed { code: detail.reason.to_ascii_lowercase(), is_retryable: detail.retryable }
}

fn of_error_event(error: &Value) -> End {
    let code = error["code"].as_str().expect("a code").to_owned();
    assert_eq!(error["type"], "server_error", "{error}");
    // OpenAI's form has no field for it; these are the retryable codes of ours.
    let is_retryable = ["group_lost", "encoder_failed", "not_ready", "draining", "stale_epoch"]
        .contains(&code.as_str());
    End::Failed { code, is_retryable }
}

/// Asserts that the answer ended in the retryable error of a lost group and that every token of it is that of an
/// undisturbed run, which is taken from `endpoints` now.
pub fn assert_cut_off_cleanly(endpoints: &Endpoints, golden: &Golden, observed: &Observed) {
    match &observed.end {
        End::Failed { code, is_retryable: true } if code == "group_lost" => {}
        other => {
            panic!("{}: ended as {other:?} after {} tokens", golden.case, observed.token_ids.len())
        }
    }
    assert!(observed.token_ids.len() < LONG as usize, "the fault came after the end");
    assert_undisturbed(endpoints, golden, observed);
}

/// Asserts that tokens and text are what an undisturbed run gives.
pub fn assert_undisturbed(endpoints: &Endpoints, golden: &Golden, observed: &Observed) {
    let known = golden.greedy_tokens.len().min(observed.token_ids.len());
    assert_eq!(observed.token_ids[..known], golden.greedy_tokens[..known], "{}", golden.case);
    let mut request = chat::golden(golden);
    let num_tokens = observed.token_ids.len() as u32;
    request.sampling.as_mut().expect("set").max_tokens = Some(num_tokens);
    let undisturbed = endpoints.grpc().answer(request).expect("is answered");
    let choice = undisturbed.choice();
    assert_eq!(observed.token_ids, choice.token_ids, "{}", golden.case);
    // Text waits for whole characters, so it may lag behind the tokens; never the other way.
    assert!(choice.text.starts_with(&observed.text), "{}", golden.case);
}

/// Asserts that new requests give the golden tokens.
pub fn assert_serves(endpoints: &Endpoints, case: &str) {
    let golden = Golden::load("tiny", case);
    let answer = endpoints.grpc().answer(chat::golden(&golden)).expect("is answered");
    assert_eq!(answer.choice().token_ids, golden.greedy_tokens, "{case}");
}
