use std::net::{SocketAddr, TcpListener};

use tessera_cluster::evidence::SelfReport;
use tessera_cluster::view::{EncoderLoad, Event, GroupLoad, GroupState};
use tessera_cluster::{
    ActiveRecord, ActiveState, ClusterName, DecoderCapacity, EncoderMember, MemberInfo, MemberRole,
    SlotAssignment,
};
use tessera_membership::{Store, StoreConfig};
use tessera_telemetry::Registry;
use tessera_types::{Hash256, Rank};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::config::UpstreamConfig;
use crate::metrics::Metrics;

/// An upstream that is fed by hand. Its endpoints accept connections and never say a word.
struct Fed {
    upstream: Upstream,
    silent: TcpListener,
}

fn model(weights: u8, vision: u8) -> ModelIdentity {
    ModelIdentity {
        name: "m".to_owned(),
        language_fingerprint: ModelFingerprint(Hash256([weights; 32])),
        vision_fingerprint: ModelFingerprint(Hash256([vision; 32])),
        ..Identity::unknown().model
    }
}

impl Fed {
    async fn new() -> Self {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        let store = StoreConfig::new(vec![silent.local_addr().expect("is bound").into()]);
        let upstream = Upstream::start(
            UpstreamConfig::default(),
            ClusterName::new("c").expect("a name"),
            "m".to_owned(),
            Store::connect(store).await.expect("opens no connection"),
            Arc::new(Metrics::register(&Registry::new()).expect("registers")),
            TaskTracker::new(),
            CancellationToken::new(),
        );
        Self { upstream, silent }
    }

    fn address(&self) -> SocketAddr {
        self.silent.local_addr().expect("is bound")
    }

    /// A group that serves with `running` sequences.
    fn group(&self, name: &str, model: ModelIdentity, max_model_len: u32, running: u32) {
        let (instance, address) = (InstanceId::random(), self.address().to_string());
        let slot = SlotAssignment {
            slot: 0,
            first_rank: Rank(0),
            num_ranks: 1,
            instance,
            address: address.clone(),
            member_revision: 1,
        };
        let capacity =
            DecoderCapacity { num_kv_blocks: 100, block_size: 16, max_sequences: 8, max_model_len };
        let record = ActiveRecord {
            epoch: Epoch(1),
            state: ActiveState::Serving,
            instance,
            address,
            spec_digest: Hash256::default(),
            slots: vec![slot],
            model,
            world_size: 1,
            capacity,
        };
        let group = GroupName::new(name).expect("a name");
        self.upstream.shared.apply(Event::ActivePut { group, record: Box::new(record) });
        let load = GroupLoad { running, waiting: 0, kv_blocks: 100, kv_blocks_free: 100 };
        let (epoch, state) = (Epoch(1), GroupState::Serving);
        self.upstream.shared.apply(Event::GroupHealth { instance, epoch, state, load });
    }

    fn encoder(&self, model: ModelIdentity) -> InstanceId {
        let instance = InstanceId::random();
        let encoder = EncoderMember {
            device: "cpu".to_owned(),
            max_queued_pixels: 1000,
            max_item_pixels: 600,
            cache_bytes: 1,
        };
        let member = MemberInfo {
            instance,
            // Distinct text for one socket, as addresses tell endpoints apart.
            address: format!("localhost.{instance}:1"),
            build: String::new(),
            model: Some(model),
            role: MemberRole::Encoder(encoder),
        };
        self.upstream.shared.apply(Event::MemberPut { member: Box::new(member) });
        let (report, load) = (SelfReport::Ready, EncoderLoad::default());
        self.upstream.shared.apply(Event::EncoderHealth { instance, report, load });
        instance
    }

    fn choose(&self, identity: &ModelIdentity, prompt_tokens: u32) -> Result<Target, String> {
        self.upstream.choose_group(&GroupQuery {
            identity,
            prompt_tokens,
            max_tokens: 10,
            avoid: &[],
            prefer: None,
        })
    }
}

#[tokio::test]
async fn requests_go_to_the_group_with_the_least_work_that_they_fit() {
    let fed = Fed::new().await;
    fed.group("big", model(1, 1), 1000, 3);
    fed.group("small", model(1, 1), 100, 0);
    let identity = fed.upstream.identity().expect("is known");
    assert_eq!(identity.max_model_len, 1000);
    assert_eq!(fed.choose(&identity.model, 50).expect("fits").group.as_str(), "small");
    assert_eq!(fed.choose(&identity.model, 500).expect("fits").group.as_str(), "big");
    let error = fed.choose(&identity.model, 2000).expect_err("fits nowhere");
    assert!(error.contains("context"), "{error}");
}

#[tokio::test]
async fn a_group_that_failed_the_request_is_avoided() {
    let fed = Fed::new().await;
    fed.group("a", model(1, 1), 1000, 0);
    fed.group("b", model(1, 1), 1000, 5);
    let identity = model(1, 1);
    let avoid = [(GroupName::new("a").expect("a name"), Epoch(1))];
    let query = GroupQuery {
        identity: &identity,
        prompt_tokens: 1,
        max_tokens: 1,
        avoid: &avoid,
        prefer: None,
    };
    assert_eq!(fed.upstream.choose_group(&query).expect("the other").group.as_str(), "b");
}

#[tokio::test]
async fn other_weights_are_not_used_while_the_pinned_ones_are_served() {
    let fed = Fed::new().await;
    fed.group("a", model(1, 1), 1000, 5);
    let pinned = fed.upstream.identity().expect("is known").model;
    fed.group("b", model(2, 1), 1000, 0);
    assert_eq!(fed.upstream.identity().expect("is known").model, pinned);
    for _ in 0..4 {
        assert_eq!(fed.choose(&pinned, 1).expect("fits").group.as_str(), "a");
    }
    // The last group of the old weights is replaced: the new ones are served.
    fed.group("a", model(2, 1), 1000, 5);
    let model = fed.upstream.identity().expect("is known").model;
    assert_eq!(model.language_fingerprint, ModelFingerprint(Hash256([2; 32])));
}

#[tokio::test]
async fn a_request_only_goes_where_its_embeddings_are_valid() {
    let fed = Fed::new().await;
    fed.group("a", model(1, 7), 1000, 0);
    let error = fed.choose(&model(1, 8), 1).expect_err("other vision weights");
    assert!(error.contains("prepared for"), "{error}");
    fed.encoder(model(1, 8));
    assert!(fed.upstream.check_ready().is_err_and(|detail| detail.contains("encoder")));
    fed.encoder(model(9, 7));
    assert_eq!(fed.upstream.check_ready(), Ok(()));
}

#[tokio::test]
async fn pixels_under_way_count_as_queued_until_the_answer() {
    let fed = Fed::new().await;
    let all = [fed.encoder(model(1, 1)), fed.encoder(model(1, 1))];
    let media_id = MediaId(Hash256([5; 32]));
    let identity = model(1, 1);
    let choose = |avoid: &[String]| fed.upstream.choose_encoder(media_id, 500, &identity, avoid);
    let first = choose(&[]).expect("is idle");
    let home = first.instance;
    drop(first);
    let first = choose(&[]).expect("is idle");
    assert_eq!(first.instance, home, "equal bytes meet the same encoder");
    let second = choose(&[]).expect("there is room");
    assert_eq!(second.instance, home, "within the load bound affinity wins");
    let third = choose(&[]).expect("the other is idle");
    assert!(third.instance != home && all.contains(&third.instance), "a full queue moves it on");
    let fourth = choose(&[]).expect("there is room");
    assert!(choose(&[]).is_err_and(|none| none.retryable), "there is room later");
    drop((second, third, fourth));
    let avoid = [first.address.clone()];
    assert!(choose(&avoid).expect("the other").instance != home);
    let too_large = fed.upstream.choose_encoder(media_id, 601, &identity, &[]);
    assert!(too_large.is_err_and(|none| !none.retryable));
    let other_weights = fed.upstream.choose_encoder(media_id, 1, &model(1, 2), &[]);
    assert!(other_weights.is_err_and(|none| none.retryable));
}
