//! The encoder's place in the cluster: its record under a lease.

use std::net::SocketAddr;
use std::time::Duration;

use tessera_cluster::records::{EncoderMember, MemberInfo, MemberRole, ModelIdentity, Record};
use tessera_cluster::{ClusterName, Keys};
use tessera_membership::{LeaseState, Membership, Registration, StoreConfig};
use tessera_types::{InstanceId, NumericsId};

use crate::config::EncoderConfig;
use crate::error::EncoderError;
use crate::tower::Identity;

/// Side of a patch and pixels of one patch of the published models; only for the capacity that is shown.
const PATCH_PIXELS: u64 = 14 * 14;

/// A registered encoder.
#[derive(Debug)]
pub struct Member {
    instance: InstanceId,
    registration: Registration,
}

fn membership_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EncoderError {
    EncoderError::Membership(error.into())
}

impl Member {
    /// Registers and waits until the record stands. A store that is away is waited for.
    ///
    /// # Errors
    /// A name that cannot be a key, or a record that the store refuses for good.
    pub async fn register(
        config: &EncoderConfig,
        address: SocketAddr,
        identity: &Identity,
    ) -> Result<Self, EncoderError> {
        let instance = InstanceId::random();
        let cluster = ClusterName::new(&config.cluster.name).map_err(membership_error)?;
        let key = Keys::new(cluster).member(instance);
        let info = MemberInfo {
            instance,
            address: config.advertise.clone().unwrap_or_else(|| address.to_string()),
            build: env!("CARGO_PKG_VERSION").into(),
            model: Some(ModelIdentity {
                name: config.model.name.clone(),
                language_fingerprint: identity.language_fingerprint,
                vision_fingerprint: identity.vision_fingerprint,
                language_numerics: NumericsId::default(),
                vision_numerics: identity.vision_numerics,
            }),
            role: MemberRole::Encoder(EncoderMember {
                device: config.device.clone(),
                max_queued_pixels: config.max_queued_pixels,
                max_item_pixels: u64::from(config.max_batch_patches) * PATCH_PIXELS,
                cache_bytes: config.cache_bytes,
            }),
        };
        let store = StoreConfig::new(config.cluster.endpoints.clone());
        let ttl = Duration::from_secs(u64::from(config.lease_ttl_seconds));
        let registration =
            Membership::register(store, key, info.to_bytes(), ttl).map_err(membership_error)?;
        registration.alive().await.map_err(membership_error)?;
        Ok(Self { instance, registration })
    }

    /// This process's name in the store.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Completes when the lease is lost for good, with the reason.
    pub async fn fenced(&self) -> String {
        let mut state = self.registration.state();
        loop {
            if let LeaseState::Lost { reason } = &*state.borrow_and_update()
                && reason.is_final()
            {
                return reason.to_string();
            }
            if state.changed().await.is_err() {
                return "the lease thread ended".into();
            }
        }
    }

    /// Takes the record out of the store.
    pub async fn leave(self) {
        self.registration.revoke().await;
    }
}
