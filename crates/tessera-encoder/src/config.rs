//! Settings of an encoder worker.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tessera_kernels::{Device, UnknownDevice};
use tessera_media::MediaLimits;
use tessera_membership::ClusterAddress;
use tessera_model::ModelSource;
use tessera_telemetry::AdminConfig;

use crate::error::EncoderError;

/// What an encoder needs to know. Times are in milliseconds, sizes in bytes unless the name says
/// otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncoderConfig {
    /// gRPC address; port 0 takes any free one.
    pub listen: SocketAddr,
    /// host:port under which decoders and routers reach this process; default: the bound address.
    pub advertise: Option<String>,
    pub admin: AdminConfig,
    /// What computes: `reference` (f32, slow), `cpu` (SIMD, BF16 weights), `cpu-f32`, `cuda` (an NVIDIA GPU, BF16) or
    /// `cuda-f32`; `cuda:1` chooses the GPU.
    pub device: String,
    /// On a GPU: an item gets the same bits in every batch, at some cost in speed. CPU devices always give them.
    pub deterministic: bool,
    /// Threads of the vision tower on a CPU device; 0: all cores.
    pub threads: usize,
    /// Embeddings kept, in bytes of f32 values.
    pub cache_bytes: u64,
    /// Media bytes held at once over all requests that are being received or prepared.
    pub max_media_bytes: u64,
    /// Pixels (after resizing, frames counted one by one) that may wait for the vision tower.
    pub max_queued_pixels: u64,
    /// Patches of one forward pass; also the largest media item.
    pub max_batch_patches: u32,
    /// Time for warming up before the worker serves, in ms: items double in size up to the largest while
    /// they fit. 0: none.
    pub warm_up_ms: u32,
    /// Threads that decode and resize.
    pub prepare_threads: usize,
    /// How long an encoded item waits to be pulled before it may be evicted.
    pub hold_ms: u32,
    /// Lease of the member record.
    pub lease_ttl_seconds: u32,
    /// At shutdown, how long issued locators may still be pulled.
    pub drain_ms: u32,
    /// Compressed bytes of one image or frame.
    pub max_item_bytes: u64,
    /// Pixels of one image or frame before it is resized.
    pub max_item_pixels: u64,
    /// Frames of one video.
    pub max_frames: u32,
    /// Where the cluster's records are. Shared by all roles; the binary fills it in.
    #[serde(skip)]
    pub cluster: ClusterAddress,
    /// What is served. Shared by all roles; the binary fills it in.
    #[serde(skip)]
    pub model: ModelSource,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        let limits = MediaLimits::default();
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            admin: AdminConfig::default(),
            device: Device::default().to_string(),
            deterministic: false,
            threads: 0,
            cache_bytes: 1 << 30,
            max_media_bytes: 512 << 20,
            max_queued_pixels: 256 << 20,
            max_batch_patches: 65_536,
            warm_up_ms: 1_000,
            prepare_threads: 2,
            hold_ms: 60_000,
            lease_ttl_seconds: 10,
            drain_ms: 5_000,
            max_item_bytes: limits.max_bytes,
            max_item_pixels: limits.max_pixels,
            max_frames: limits.max_frames,
            cluster: ClusterAddress::default(),
            model: ModelSource::default(),
        }
    }
}

impl EncoderConfig {
    /// How long an encoded item waits to be pulled.
    pub fn hold(&self) -> Duration {
        Duration::from_millis(u64::from(self.hold_ms))
    }

    /// What computes.
    ///
    /// # Errors
    /// A name that is no device.
    pub fn parse_device(&self) -> Result<Device, EncoderError> {
        self.device.parse().map_err(|error: UnknownDevice| EncoderError::Config {
            field: "encoder.device",
            reason: error.to_string(),
        })
    }

    /// Caps on one media item.
    pub fn media_limits(&self) -> MediaLimits {
        MediaLimits {
            max_bytes: self.max_item_bytes,
            max_pixels: self.max_item_pixels,
            max_frames: self.max_frames,
        }
    }

    /// Refuses settings under which nothing could be encoded.
    ///
    /// # Errors
    /// Names the field.
    pub fn validate(&self) -> Result<(), EncoderError> {
        let at_least = |field: &'static str, value: u64, least: u64| match value >= least {
            true => Ok(()),
            false => {
                Err(EncoderError::Config { field, reason: format!("must be at least {least}") })
            }
        };
        if let Device::Cuda(device) = self.parse_device()?
            && device.listed().len() > 1
        {
            let reason = "an encoder takes one GPU; start one for each".into();
            return Err(EncoderError::Config { field: "encoder.device", reason });
        }
        at_least("encoder.cache_bytes", self.cache_bytes, 1 << 20)?;
        at_least("encoder.max_media_bytes", self.max_media_bytes, 1 << 20)?;
        at_least("encoder.max_queued_pixels", self.max_queued_pixels, 28 * 28)?;
        at_least("encoder.max_batch_patches", u64::from(self.max_batch_patches), 4)?;
        at_least("encoder.prepare_threads", self.prepare_threads as u64, 1)?;
        at_least("encoder.hold_ms", u64::from(self.hold_ms), 1000)?;
        at_least("encoder.max_item_bytes", self.max_item_bytes, 1)?;
        at_least("encoder.max_item_pixels", self.max_item_pixels, 1)?;
        at_least("encoder.max_frames", u64::from(self.max_frames), 1)?;
        at_least("encoder.lease_ttl_seconds", u64::from(self.lease_ttl_seconds), 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn useless_settings_are_refused_by_name() {
        assert!(EncoderConfig::default().validate().is_ok());
        let config = EncoderConfig { prepare_threads: 0, ..EncoderConfig::default() };
        let error = config.validate().expect_err("no thread prepares");
        assert!(error.to_string().contains("encoder.prepare_threads"), "{error}");
    }
}
