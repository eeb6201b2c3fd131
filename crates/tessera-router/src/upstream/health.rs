//! Listens to endpoints: a group's leader speaks on a stream, an encoder is asked for its load.

use std::sync::Arc;
use std::time::Duration;

use tessera_cluster::evidence::SelfReport;
use tessera_cluster::view::{EncoderLoad, EndpointKind, Event, GroupLoad, GroupState};
use tessera_proto::decoder::v1 as decoder;
use tessera_proto::decoder::v1::decoder_client::DecoderClient;
use tessera_proto::encoder::v1 as encoder;
use tessera_proto::encoder::v1::encoder_client::EncoderClient;
use tessera_proto::{ErrorReason, error_detail};
use tessera_types::{Epoch, InstanceId};
use tonic::Status;
use tonic::transport::Channel;

use super::Shared;

/// Leaders speak at least every 500 ms; a stream this silent is broken.
const SILENCE: Duration = Duration::from_secs(3);
/// Encoders are asked this often.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Observes one endpoint until it breaks, and says so; the view then asks for a new observation.
pub(super) async fn observe(
    shared: Arc<Shared>,
    instance: InstanceId,
    address: String,
    kind: EndpointKind,
) {
    let observed = match shared.channels.get(&address) {
        Err(error) => Err(Status::unavailable(error.to_string())),
        Ok(channel) => match &kind {
            EndpointKind::Leader { group } => {
                listen(&shared, instance, channel, group.as_str()).await
            }
            EndpointKind::Encoder => poll(&shared, instance, channel).await,
        },
    };
    if let Err(status) = observed {
        tracing::debug!(%instance, address, ?kind, error = status.message(), "endpoint is not heard");
    }
    shared.apply(Event::HealthBroken { instance });
}

/// Returns when the stream ends.
async fn listen(
    shared: &Arc<Shared>,
    instance: InstanceId,
    channel: Channel,
    group: &str,
) -> Result<(), Status> {
    let request =
        decoder::HealthRequest { cluster: shared.cluster.to_string(), group: group.to_owned() };
    let mut client = DecoderClient::new(channel);
    let mut reports = in_time(client.health(request)).await?.into_inner();
    while let Some(report) = in_time(reports.message()).await? {
        if !report.instance.is_empty() && report.instance != instance.to_string() {
            return Err(Status::unavailable("another process answers at this address"));
        }
        let load = report.load.unwrap_or_default();
        let state = match report.state() {
            decoder::GroupState::Serving => GroupState::Serving,
            decoder::GroupState::Draining => GroupState::Draining,
            decoder::GroupState::Left => GroupState::Left,
            decoder::GroupState::Forming | decoder::GroupState::Unspecified => GroupState::Forming,
        };
        shared.apply(Event::GroupHealth {
            instance,
            epoch: Epoch(report.epoch),
            state,
            load: GroupLoad {
                running: load.running,
                waiting: load.waiting,
                kv_blocks: load.kv_blocks,
                kv_blocks_free: load.kv_blocks_free,
            },
        });
    }
    Ok(())
}

/// Returns when a call fails in a way that speaks against the encoder.
async fn poll(shared: &Arc<Shared>, instance: InstanceId, channel: Channel) -> Result<(), Status> {
    let mut client = EncoderClient::new(channel);
    let mut last = EncoderLoad::default();
    loop {
        let report = match in_time(client.load(encoder::LoadRequest {})).await {
            Ok(response) => {
                let load = response.into_inner();
                last = EncoderLoad {
                    queued_pixels: load.queued_pixels,
                    queued_items: load.queued_items,
                };
                SelfReport::Ready
            }
            Err(status) => match reason_of(&status) {
                Some(ErrorReason::Draining) => SelfReport::Draining,
                Some(ErrorReason::NotReady) => SelfReport::NotReady,
                _ => return Err(status),
            },
        };
        shared.apply(Event::EncoderHealth { instance, report, load: last });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The typed reason of a status.
pub(crate) fn reason_of(status: &Status) -> Option<ErrorReason> {
    ErrorReason::from_name(&error_detail(status)?.reason)
}

async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(SILENCE, call).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded("no word in time")),
    }
}
