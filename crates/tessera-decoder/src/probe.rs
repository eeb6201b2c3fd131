//! Direct evidence about a member: whether that very instance answers.

use std::time::Duration;

use tessera_proto::decoder::v1 as pb;
use tessera_proto::decoder::v1::decoder_client::DecoderClient;
use tessera_types::InstanceId;
use tonic::transport::Endpoint;

/// A process that takes longer is as good as gone. A stopped one accepts connections and says nothing.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Whether `instance` speaks at `address`. A successor at the same address does not count.
pub(crate) async fn probe(instance: InstanceId, address: &str, request: pb::HealthRequest) -> bool {
    let ask = async {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
        let channel = endpoint.connect_timeout(TIMEOUT).tcp_nodelay(true).connect().await.ok()?;
        let mut reports = DecoderClient::new(channel).health(request).await.ok()?.into_inner();
        reports.message().await.ok()?
    };
    let report = tokio::time::timeout(TIMEOUT, ask).await;
    matches!(report, Ok(Some(report)) if report.instance == instance.to_string())
}
