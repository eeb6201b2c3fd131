//! The gRPC server of a decoder process.

use std::time::Duration;

use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::decoder_server::DecoderServer;
use tessera_proto::decoder::v1::group_server::GroupServer;
use tessera_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::server::HealthReporter;

use crate::error::DecoderError;
use crate::plans::GroupService;
use crate::service::{DecoderService, Standing};

/// Serves until `stop` completes.
///
/// # Errors
/// The listener fails for good.
pub(crate) async fn serve(
    listener: TcpListener,
    decoder: DecoderService,
    group: GroupService,
    standing: watch::Receiver<Standing>,
    stop: impl Future<Output = ()>,
) -> Result<(), DecoderError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let generated = "the descriptors were generated with the code";
    let reflection_v1 = reflection().build_v1().expect(generated);
    let reflection_v1alpha = reflection().build_v1alpha().expect(generated);
    let decoder = DecoderServer::new(decoder)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let group = GroupServer::new(group)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // The builder's setting of the same name counts only for listeners that it makes itself. Without it a
    // token waits for the acknowledgement of the one before, which the other side delays by 40 ms.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha)
        .add_service(decoder)
        .add_service(group)
        .serve_with_incoming_shutdown(incoming, stop);
    tokio::select! {
        served = serving => served.map_err(DecoderError::Serve),
        () = report(reporter, standing) => unreachable!("reporting does not end"),
    }
}

/// Keeps `grpc.health.v1` equal to the standing. A follower serves while its epoch does.
async fn report(reporter: HealthReporter, mut standing: watch::Receiver<Standing>) {
    loop {
        let serves = standing.borrow_and_update().state == pb::GroupState::Serving;
        let status = match serves {
            true => tonic_health::ServingStatus::Serving,
            false => tonic_health::ServingStatus::NotServing,
        };
        reporter.set_service_status("", status).await;
        reporter.set_service_status("tessera.decoder.v1.Decoder", status).await;
        if standing.changed().await.is_err() {
            // The lifecycle is gone; the server ends next.
            return std::future::pending().await;
        }
    }
}
