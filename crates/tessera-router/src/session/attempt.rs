//! One attempt at one choice: a bidirectional stream to a group's leader.

use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt, TryFutureExt};
use tessera_cluster::request::{AttemptFailure, Event, Target, TokenRecord};
use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::decoder_client::DecoderClient;
use tessera_proto::{ErrorReason, MAX_MESSAGE_BYTES, error_detail, hash_bytes};
use tessera_types::{Attempt, EmbeddingKey, InstanceId, TokenLogprobs};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::upstream::reason_of;

/// Messages to the decoder that may wait; it reads at once, so more means that it does not read.
const MAX_OUTGOING: usize = 64;
/// Longest wait for the stream's header, which a leader sends before anything else.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// An open stream. Dropping it cancels the attempt and frees the sequence.
pub(super) struct AttemptStream {
    pub(super) attempt: Attempt,
    pub(super) instance: InstanceId,
    outgoing: mpsc::Sender<pb::GenerateRequest>,
    incoming: BoxStream<'static, Result<pb::GenerateResponse, Status>>,
}

/// The decoder does not read what it is sent.
#[derive(Debug)]
pub(super) struct NotReading;

impl AttemptStream {
    /// Opens the stream; a failure to do so arrives as its first item.
    pub(super) fn open(
        channel: Channel,
        attempt: Attempt,
        target: &Target,
        start: pb::Start,
    ) -> Self {
        let (outgoing, requests) = mpsc::channel(MAX_OUTGOING);
        let first =
            pb::GenerateRequest { message: Some(pb::generate_request::Message::Start(start)) };
        outgoing.try_send(first).expect("a new channel has room");
        let mut client = DecoderClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let open = async move {
            let call = client.generate(ReceiverStream::new(requests));
            match tokio::time::timeout(OPEN_TIMEOUT, call).await {
                Ok(response) => Ok(response?.into_inner()),
                Err(_) => Err(Status::deadline_exceeded("the stream did not open in time")),
            }
        };
        Self {
            attempt,
            instance: target.instance,
            outgoing,
            incoming: open.try_flatten_stream().boxed(),
        }
    }

    /// Tells where an embedding is.
    pub(super) fn send_media_at(
        &self,
        item: u32,
        endpoint: String,
        key: EmbeddingKey,
    ) -> Result<(), NotReading> {
        let media_at = pb::MediaAt { item, endpoint, embedding_key: hash_bytes(&key.0) };
        let message = pb::generate_request::Message::MediaAt(media_at);
        let request = pb::GenerateRequest { message: Some(message) };
        match self.outgoing.try_send(request) {
            // A stream that has ended says so by itself.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(NotReading),
        }
    }

    /// The next message, or why none will come.
    pub(super) fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<pb::GenerateResponse, Broken>> {
        self.incoming.poll_next_unpin(cx).map(|message| match message {
            Some(Ok(message)) => Ok(message),
            Some(Err(status)) => Err(Broken::from_status(&status)),
            None => Err(Broken::ended()),
        })
    }
}

/// Why a stream ended before its choice did.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) failure: AttemptFailure,
    /// Whether the endpoint itself is to blame.
    pub(super) speaks_against: bool,
}

impl Broken {
    fn ended() -> Self {
        let detail = "the stream ended early".to_owned();
        Self { failure: AttemptFailure::Lost { detail }, speaks_against: false }
    }

    /// A message that cannot be understood.
    pub(super) fn malformed(detail: String) -> Self {
        Self { failure: AttemptFailure::Lost { detail }, speaks_against: false }
    }

    fn from_status(status: &Status) -> Self {
        let detail = status.message().to_owned();
        let reason = reason_of(status);
        let failure = match (reason, status.code()) {
            (Some(ErrorReason::Overloaded), _) | (None, Code::ResourceExhausted) => {
                AttemptFailure::Overloaded { retry_after: retry_after(status) }
            }
            (
                Some(
                    ErrorReason::StaleEpoch
                    | ErrorReason::Draining
                    | ErrorReason::NotReady
                    | ErrorReason::ModelMismatch,
                ),
                _,
            )
            | (None, Code::FailedPrecondition) => AttemptFailure::Refused { detail },
            (Some(reason), Code::InvalidArgument | Code::OutOfRange | Code::NotFound) => {
                let field = error_detail(status).map(|detail| detail.field).unwrap_or_default();
                AttemptFailure::Rejected { reason: reason.name().to_owned(), field, detail }
            }
            (None, Code::InvalidArgument) => AttemptFailure::Rejected {
                reason: ErrorReason::InvalidArgument.name().to_owned(),
                field: String::new(),
                detail,
            },
            _ => AttemptFailure::Lost { detail },
        };
        let speaks_against = reason.is_none()
            && matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Unknown);
        Self { failure, speaks_against }
    }
}

fn retry_after(status: &Status) -> Option<Duration> {
    let wait_ms = error_detail(status)?.retry_after_ms;
    (wait_ms > 0).then(|| Duration::from_millis(wait_ms.into()))
}

/// What a message means to the machine, in order, and what it says beside.
pub(super) fn events(choice: u32, message: pb::GenerateResponse) -> Result<Vec<Event>, Broken> {
    use pb::generate_response::Message;
    let malformed = |detail: &str| Broken::malformed(detail.to_owned());
    match message.message.ok_or_else(|| malformed("an empty message arrived"))? {
        Message::Accepted(accepted) => {
            Ok(vec![Event::Accepted { choice, attempt: Attempt(accepted.attempt) }])
        }
        Message::MediaNeeded(needed) => {
            let attempt = Attempt(needed.attempt);
            Ok(vec![Event::MediaNeeded { choice, attempt, items: needed.items }])
        }
        Message::PromptLogprobs(_) => Ok(Vec::new()),
        Message::Tokens(tokens) => {
            let attempt = Attempt(tokens.attempt);
            let token = |record: pb::TokenRecord| Event::Token {
                choice,
                attempt,
                index: record.output_index,
                record: TokenRecord {
                    token: record.token_id,
                    logprobs: record.logprobs.as_ref().map(TokenLogprobs::from),
                },
            };
            Ok(tokens.records.into_iter().map(token).collect())
        }
        Message::Finished(finished) => {
            let reason = finished
                .reason()
                .try_into()
                .map_err(|_| malformed("a choice finished for an unknown reason"))?;
            Ok(vec![Event::Finished {
                choice,
                attempt: Attempt(finished.attempt),
                num_output_tokens: finished.num_output_tokens,
                reason,
            }])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(reason: ErrorReason) -> AttemptFailure {
        Broken::from_status(&reason.status("x").into()).failure
    }

    #[test]
    fn refusals_faults_and_losses_are_told_apart() {
        for reason in [ErrorReason::StaleEpoch, ErrorReason::Draining, ErrorReason::NotReady] {
            assert!(matches!(failure(reason), AttemptFailure::Refused { .. }), "{reason:?}");
        }
        for reason in [ErrorReason::PromptTooLong, ErrorReason::RequestTooLarge] {
            assert!(matches!(failure(reason), AttemptFailure::Rejected { .. }), "{reason:?}");
        }
        for reason in [ErrorReason::GroupLost, ErrorReason::Internal] {
            assert!(matches!(failure(reason), AttemptFailure::Lost { .. }), "{reason:?}");
        }
        let status = ErrorReason::Overloaded.status("x").retry_after(Duration::from_secs(2)).into();
        assert_eq!(
            Broken::from_status(&status).failure,
            AttemptFailure::Overloaded { retry_after: Some(Duration::from_secs(2)) }
        );
    }

    #[test]
    fn only_untyped_trouble_speaks_against_the_endpoint() {
        assert!(Broken::from_status(&Status::unavailable("connection refused")).speaks_against);
        assert!(!Broken::from_status(&ErrorReason::GroupLost.status("x").into()).speaks_against);
        assert!(!Broken::from_status(&Status::internal("x")).speaks_against);
        assert!(!Broken::ended().speaks_against);
    }
}
