use super::*;

fn decoder() -> MemberInfo {
    MemberInfo {
        instance: InstanceId::random(),
        address: "127.0.0.1:7001".into(),
        build: "0.1.0".into(),
        model: Some(ModelIdentity {
            name: "qwen".into(),
            language_fingerprint: ModelFingerprint(Hash256([1; 32])),
            vision_fingerprint: ModelFingerprint(Hash256([2; 32])),
            language_numerics: NumericsId(Hash256([3; 32])),
            vision_numerics: NumericsId(Hash256([4; 32])),
        }),
        role: MemberRole::Decoder(DecoderMember {
            group: GroupName::new("g0").unwrap(),
            slot: 1,
            num_slots: 2,
            first_rank: Rank(1),
            num_ranks: 1,
            world_size: 2,
            device: "cpu".into(),
            slot_lock_host: Some("host-a".into()),
            last_epoch: Epoch(4),
            capacity: DecoderCapacity {
                num_kv_blocks: 100,
                block_size: 16,
                max_sequences: 8,
                max_model_len: 1024,
            },
        }),
    }
}

fn spec() -> EpochSpec {
    let slot = |slot: u32| SlotAssignment {
        slot,
        first_rank: Rank(2 * slot),
        num_ranks: 2,
        instance: InstanceId::random(),
        address: format!("127.0.0.1:{}", 7000 + slot),
        member_revision: 5,
    };
    EpochSpec {
        epoch: Epoch(3),
        slots: vec![slot(0), slot(1)],
        world_size: 4,
        num_kv_blocks: 100,
        proposer: InstanceId::random(),
    }
}

#[test]
fn records_survive_their_own_bytes() {
    let member = decoder();
    assert_eq!(MemberInfo::from_bytes(&member.to_bytes()).unwrap(), member);
    let router = MemberInfo { role: MemberRole::Router, model: None, ..decoder() };
    assert_eq!(MemberInfo::from_bytes(&router.to_bytes()).unwrap(), router);
    let record =
        EpochRecord { counter: Epoch(3), spec: Some(spec()), excluded: vec![InstanceId::random()] };
    assert_eq!(EpochRecord::from_bytes(&record.to_bytes()).unwrap(), record);
    let id = IdRecord { epoch: Epoch(3), id: vec![0, 1, 254, 255] };
    assert_eq!(IdRecord::from_bytes(&id.to_bytes()).unwrap(), id);
    assert!(!format!("{id:?}").contains("254"));
}

#[test]
fn unknown_fields_are_ignored_and_newer_schemas_refused() {
    let mut value: serde_json::Value = serde_json::from_slice(&decoder().to_bytes()).unwrap();
    assert_eq!(value["schema"], 1);
    value["colour"] = "blue".into();
    value["capacity"]["unheard_of"] = 7.into();
    let bytes = serde_json::to_vec(&value).unwrap();
    assert!(MemberInfo::from_bytes(&bytes).is_ok());
    value["schema"] = 2.into();
    let bytes = serde_json::to_vec(&value).unwrap();
    assert!(matches!(
        MemberInfo::from_bytes(&bytes),
        Err(ClusterError::SchemaTooNew { found: 2, supported: 1, .. })
    ));
}

#[test]
fn contradictions_are_refused_by_name() {
    type Edit = fn(&mut EpochSpec);
    let edits: [Edit; 6] = [
        |s| s.epoch = Epoch(9),
        |s| s.world_size = 5,
        |s| s.slots.swap(0, 1),
        |s| s.slots[1].instance = s.slots[0].instance,
        |s| s.slots[1].num_ranks = 0,
        |s| s.slots.clear(),
    ];
    for (i, edit) in edits.iter().enumerate() {
        let mut bad = spec();
        edit(&mut bad);
        let record = EpochRecord { counter: Epoch(3), spec: Some(bad), excluded: vec![] };
        let error = EpochRecord::from_bytes(&record.to_bytes()).expect_err("accepted");
        assert!(error.to_string().starts_with("epoch record"), "edit {i}: {error}");
    }
    for garbage in [&b""[..], b"{}", b"[1]", b"\xff", b"{\"epoch\":1,\"id\":\"0g\"}"] {
        assert!(IdRecord::from_bytes(garbage).is_err());
    }
}

#[test]
fn the_digest_names_every_part_of_a_spec() {
    let spec = spec();
    let mut other = spec.clone();
    assert_eq!(spec.digest(), other.digest());
    other.slots[1].member_revision += 1;
    assert_ne!(spec.digest(), other.digest());
}
