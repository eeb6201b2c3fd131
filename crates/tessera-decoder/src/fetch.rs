//! Pulls embeddings from encoders. What arrives is checked against what was asked for: key, shape, type
//! and digest; an embedding is used whole or not at all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tessera_proto::encoder::v1 as pb;
use tessera_proto::encoder::v1::encoder_client::EncoderClient;
use tessera_proto::{MAX_MESSAGE_BYTES, hash_bytes, hash_from_bytes};
use tessera_types::{EmbeddingKey, Hash256};
use tonic::transport::{Channel, Endpoint};

/// Encoders connected to at once. When one more is needed, all are let go and connected anew on use.
const MAX_CHANNELS: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// An embedding that was not had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{endpoint} is not the address of an encoder")]
    Endpoint {
        endpoint: String,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("{endpoint} does not deliver: {}", status.message())]
    Status { endpoint: String, status: Box<tonic::Status> },
    #[error("{endpoint} did not deliver within {timeout_ms} ms")]
    Timeout { endpoint: String, timeout_ms: u128 },
    #[error("{endpoint} delivers something else: {what}")]
    Mismatch { endpoint: String, what: &'static str },
}

/// What an embedding must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub key: EmbeddingKey,
    pub num_rows: u32,
    pub num_cols: u32,
}

impl Wanted {
    fn num_bytes(&self) -> usize {
        self.num_rows as usize * self.num_cols as usize * size_of::<f32>()
    }
}

/// Connections to encoders, one per endpoint, made on first use.
#[derive(Debug, Default)]
pub struct EncoderPool {
    channels: Mutex<HashMap<String, Channel>>,
}

impl EncoderPool {
    /// Pulls one embedding `[num_rows, num_cols]` within `timeout`.
    ///
    /// # Errors
    /// The encoder is away, slow, has lost it, or delivers anything but what is wanted.
    pub async fn fetch(
        &self,
        endpoint: &str,
        wanted: &Wanted,
        timeout: Duration,
    ) -> Result<Arc<[f32]>, FetchError> {
        let channel = self.channel(endpoint)?;
        match tokio::time::timeout(timeout, pull(channel, endpoint, wanted)).await {
            Ok(result) => result,
            Err(_) => {
                let timeout_ms = timeout.as_millis();
                Err(FetchError::Timeout { endpoint: endpoint.into(), timeout_ms })
            }
        }
    }

    fn channel(&self, endpoint: &str) -> Result<Channel, FetchError> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(endpoint) {
            return Ok(channel.clone());
        }
        if channels.len() >= MAX_CHANNELS {
            channels.clear();
        }
        let channel = Endpoint::from_shared(format!("http://{endpoint}"))
            .map_err(|source| FetchError::Endpoint { endpoint: endpoint.into(), source })?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .connect_lazy();
        channels.insert(endpoint.into(), channel.clone());
        Ok(channel)
    }
}

async fn pull(channel: Channel, endpoint: &str, wanted: &Wanted) -> Result<Arc<[f32]>, FetchError> {
    let refused = |status: tonic::Status| FetchError::Status {
        endpoint: endpoint.into(),
        status: Box::new(status),
    };
    let mismatch = |what| FetchError::Mismatch { endpoint: endpoint.into(), what };
    let mut client = EncoderClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let request = pb::FetchRequest { key: hash_bytes(&wanted.key.0) };
    let mut stream = client.fetch(request).await.map_err(refused)?.into_inner();
    let first = stream.message().await.map_err(refused)?.and_then(|message| message.part);
    let Some(pb::fetch_response::Part::Info(info)) = first else {
        return Err(mismatch("no description"));
    };
    let digest = check(&info, wanted).map_err(mismatch)?;
    let mut values: Vec<f32> = Vec::with_capacity(wanted.num_bytes() / size_of::<f32>());
    let (mut hasher, mut partial) = (blake3::Hasher::new(), Vec::with_capacity(size_of::<f32>()));
    let mut received = 0;
    while let Some(message) = stream.message().await.map_err(refused)? {
        let Some(pb::fetch_response::Part::Data(data)) = message.part else {
            return Err(mismatch("no data"));
        };
        received += data.len();
        if received > wanted.num_bytes() {
            return Err(mismatch("more bytes than announced"));
        }
        hasher.update(&data);
        push_values(&mut values, &mut partial, &data);
    }
    if received != wanted.num_bytes() {
        return Err(mismatch("fewer bytes than announced"));
    }
    if hasher.finalize().as_bytes() != digest.as_bytes() {
        return Err(mismatch("bytes with another digest"));
    }
    Ok(values.into())
}

fn check(info: &pb::EmbeddingInfo, wanted: &Wanted) -> Result<Hash256, &'static str> {
    if hash_from_bytes(&info.key, "key").ok() != Some(wanted.key.0) {
        return Err("another key");
    }
    if (info.num_rows, info.num_cols) != (wanted.num_rows, wanted.num_cols) {
        return Err("another shape");
    }
    if info.dtype() != pb::DType::F32 {
        return Err("another element type");
    }
    hash_from_bytes(&info.digest, "digest").map_err(|_| "no digest")
}

/// Appends little-endian values; a value may be cut between two messages.
fn push_values(values: &mut Vec<f32>, partial: &mut Vec<u8>, mut data: &[u8]) {
    const SIZE: usize = size_of::<f32>();
    if !partial.is_empty() {
        let (head, rest) = data.split_at(data.len().min(SIZE - partial.len()));
        partial.extend_from_slice(head);
        data = rest;
        if let Ok(bytes) = <[u8; SIZE]>::try_from(partial.as_slice()) {
            values.push(f32::from_le_bytes(bytes));
            partial.clear();
        }
    }
    let (whole, rest) = data.as_chunks::<SIZE>();
    values.extend(whole.iter().map(|bytes| f32::from_le_bytes(*bytes)));
    partial.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_any_cut() {
        let expected = [1.5f32, -2.25, f32::MIN_POSITIVE, 3e30];
        let bytes: Vec<u8> = expected.iter().flat_map(|value| value.to_le_bytes()).collect();
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let (mut values, mut partial) = (Vec::new(), Vec::new());
                for data in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
                    push_values(&mut values, &mut partial, data);
                }
                assert_eq!(values, expected, "cut at {first} and {second}");
                assert!(partial.is_empty());
            }
        }
    }

    #[test]
    fn another_embedding_is_refused() {
        let wanted = Wanted { key: EmbeddingKey(Hash256([1; 32])), num_rows: 2, num_cols: 3 };
        let good = pb::EmbeddingInfo {
            key: vec![1; 32].into(),
            num_rows: 2,
            num_cols: 3,
            dtype: pb::DType::F32.into(),
            digest: vec![7; 32].into(),
        };
        assert_eq!(check(&good, &wanted), Ok(Hash256([7; 32])));
        type Edit = fn(&mut pb::EmbeddingInfo);
        let edits: [Edit; 5] = [
            |info| info.key = vec![2; 32].into(),
            |info| info.num_rows = 3,
            |info| info.num_cols = 2,
            |info| info.dtype = pb::DType::Bf16.into(),
            |info| info.digest = vec![7; 31].into(),
        ];
        for edit in edits {
            let mut info = good.clone();
            edit(&mut info);
            assert!(check(&info, &wanted).is_err(), "{info:?}");
        }
    }
}
