use serde_json::{Value, json};

use super::*;

fn parse(json: &Value) -> Result<ModelConfig> {
    ModelConfig::from_json(Path::new("dir/config.json"), &json.to_string())
}

/// The published 3B file, as far as it matters here.
fn flat() -> Value {
    json!({
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000, "hidden_act": "silu", "tie_word_embeddings": true,
        "use_sliding_window": false, "sliding_window": 32768, "torch_dtype": "bfloat16",
        "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2, "temporal_patch_size": 2
        }
    })
}

/// The same model as a newer release of `transformers` saves it.
fn nested() -> Value {
    let mut text = flat();
    let text = text.as_object_mut().unwrap();
    let mut top = serde_json::Map::new();
    for name in ["model_type", "image_token_id", "video_token_id", "vision_config"] {
        top.insert(name.to_owned(), text.remove(name).unwrap());
    }
    for name in ["vision_start_token_id", "vision_end_token_id"] {
        top.insert(name.to_owned(), text.remove(name).unwrap());
    }
    text.remove("rope_theta");
    text.remove("rope_scaling");
    text.insert(
        "rope_parameters".to_owned(),
        json!({"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
    );
    text.insert("layer_types".to_owned(), json!(["full_attention", "full_attention"]));
    text.insert("sliding_window".to_owned(), Value::Null);
    top.insert("text_config".to_owned(), Value::Object(text.clone()));
    Value::Object(top)
}

#[test]
fn flat_and_nested_files_of_one_model_agree() {
    let config = parse(&flat()).unwrap();
    assert_eq!(config.text.head_dim, 128);
    assert!(config.text.tie_word_embeddings);
    assert_eq!(config.vision.head_dim(), 80);
    assert_eq!(config.vision.patch_len(), 1176);
    assert_eq!(config.vision.window_units(), 4);
    assert_eq!(parse(&nested()).unwrap(), config);

    let mut lifted = nested();
    lifted["text_config"].as_object_mut().unwrap().remove("tie_word_embeddings");
    lifted["tie_word_embeddings"] = json!(true);
    assert_eq!(parse(&lifted).unwrap(), config);

    let mut scaling = flat();
    scaling["rope_scaling"] =
        json!({"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]});
    assert_eq!(parse(&scaling).unwrap(), config);
}

#[test]
fn absent_vision_fields_take_the_class_defaults() {
    let mut file = flat();
    file["hidden_size"] = json!(3584);
    file["num_attention_heads"] = json!(28);
    file["num_key_value_heads"] = json!(4);
    file["vision_config"] = json!({
        "hidden_size": 1280, "in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2
    });
    let vision = parse(&file).unwrap().vision;
    assert_eq!((vision.depth, vision.num_heads, vision.intermediate_size), (32, 16, 3420));
    assert_eq!(vision.full_attention_blocks, [7, 15, 23, 31]);
    assert_eq!((vision.out_hidden_size, vision.window_size), (3584, 112));
    assert_eq!(vision.tokens_per_second, 2.0);
}

/// Sets `path` (dots between names) to `value`; null removes it.
fn edit(file: &mut Value, path: &str, value: Value) {
    let (parents, name) = path.rsplit_once('.').unwrap_or(("", path));
    let parents = parents.split('.').filter(|parent| !parent.is_empty());
    let object = parents.fold(file, |object, parent| &mut object[parent]);
    match value {
        Value::Null => {
            object.as_object_mut().unwrap().remove(name);
        }
        value => object[name] = value,
    }
}

#[test]
fn what_is_wrong_is_named_by_file_and_field() {
    let cases = [
        ("hidden_size", Value::Null, "hidden_size is missing"),
        ("hidden_size", json!("2048"), "hidden_size must be a whole number"),
        ("num_hidden_layers", json!(0), "num_hidden_layers must be a whole number"),
        ("num_attention_heads", json!(15), "hidden_size is 2048, which num_attention_heads 15"),
        ("num_key_value_heads", json!(3), "num_attention_heads is 16, which num_key_value_heads 3"),
        ("rms_norm_eps", Value::Null, "rms_norm_eps is missing"),
        ("rms_norm_eps", json!(0.0), "rms_norm_eps must be a number above 0"),
        ("rope_theta", Value::Null, "rope_theta is missing"),
        ("rope_scaling", Value::Null, "rope_scaling is missing"),
        ("rope_scaling.mrope_section", json!([16, 24, 23]), "mrope_section sums to 63"),
        (
            "rope_scaling.mrope_section",
            json!([32, 32]),
            "rope_scaling.mrope_section must have three",
        ),
        (
            "rope_scaling.type",
            json!("linear"),
            "rope_scaling.type: rotary scaling linear is not supported",
        ),
        ("rope_scaling.type", json!("yarn"), "rope_scaling.factor is missing"),
        ("torch_dtype", json!("int8"), "torch_dtype: the weight type int8 is not supported"),
        ("vision_config.dtype", json!("float64"), "vision_config.dtype: the weight type float64"),
        ("torch_dtype", json!(16), "torch_dtype must be a string"),
        ("use_sliding_window", json!(true), "use_sliding_window: sliding window attention is not"),
        ("hidden_act", json!("gelu"), "hidden_act: gelu is not supported"),
        ("model_type", json!("qwen2_vl"), "model_type: qwen2_vl is not supported"),
        ("image_token_id", json!(151936), "image_token_id is 151936, beyond a vocabulary"),
        ("vision_config", Value::Null, "vision_config is missing"),
        ("vision_config", json!(3), "vision_config must be an object"),
        ("vision_config.hidden_size", Value::Null, "vision_config.hidden_size is missing"),
        (
            "vision_config.num_heads",
            json!(7),
            "vision_config.hidden_size is 1280, which num_heads 7",
        ),
        ("vision_config.num_heads", json!(640), "vision_config.num_heads gives heads of 2"),
        (
            "vision_config.out_hidden_size",
            json!(3584),
            "vision_config.out_hidden_size is 3584, but",
        ),
        ("vision_config.window_size", json!(100), "vision_config.window_size is 100, which"),
        (
            "vision_config.fullatt_block_indexes",
            json!([32]),
            "fullatt_block_indexes names block 32",
        ),
        (
            "quantization_config",
            json!({"quant_method": "awq"}),
            "quantization_config.quant_method: awq is",
        ),
    ];
    for (path, value, expected) in cases {
        let mut file = flat();
        edit(&mut file, path, value);
        let message = parse(&file).expect_err(expected).to_string();
        assert!(message.starts_with("dir/config.json: "), "{message}");
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
}

#[test]
fn sliding_layers_and_broken_json_are_refused() {
    let mut file = nested();
    file["text_config"]["layer_types"] = json!(["full_attention", "sliding_attention"]);
    assert!(
        matches!(parse(&file), Err(ModelError::Unsupported { field, .. }) if field == "text_config.layer_types")
    );
    let broken = ModelConfig::from_json(Path::new("config.json"), "{\"hidden_size\": 1");
    assert!(matches!(broken, Err(ModelError::Json { .. })));
    let absent = ModelConfig::from_dir(Path::new("no/such/directory"));
    assert!(matches!(absent, Err(ModelError::File { .. })));
}

/// The 3B file with `rope_scaling` as the model card writes it for long texts, and `more`.
fn with_yarn(more: Value) -> Value {
    let mut file = flat();
    file["max_position_embeddings"] = json!(32768);
    file["rope_scaling"] = json!({
        "type": "yarn", "mrope_section": [16, 24, 24], "factor": 4,
        "original_max_position_embeddings": 32768
    });
    for (name, value) in more.as_object().unwrap() {
        file["rope_scaling"][name] = value.clone();
    }
    file
}

#[test]
fn yarn_stretches_the_context_by_its_factor() {
    let text = parse(&with_yarn(json!({}))).unwrap().text;
    assert_eq!(text.max_position_embeddings, 131_072);
    let expected = YarnConfig {
        factor: 4.0,
        original_max_position_embeddings: 32768,
        attention_factor: 0.1 * 4f64.ln() + 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    assert_eq!(text.yarn, Some(expected));
    assert_eq!(text.rope().yarn.unwrap().original_context, 32768.0);

    let given = json!({
        "rope_type": "yarn", "type": "mrope", "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2
    });
    let yarn = parse(&with_yarn(given)).unwrap().text.yarn.unwrap();
    assert_eq!((yarn.attention_factor, yarn.beta_fast, yarn.beta_slow), (1.5, 16.0, 2.0));
    assert_eq!(parse(&flat()).unwrap().text.yarn, None);
}

#[test]
fn yarn_that_is_wrong_or_of_another_kind_is_refused() {
    let cases = [
        (json!({"factor": 0.5}), "rope_scaling.factor must be at least 1"),
        (json!({"factor": null}), "rope_scaling.factor is missing"),
        (
            json!({"original_max_position_embeddings": null}),
            "rope_scaling.original_max_position_embeddings is missing",
        ),
        (json!({"beta_fast": 1}), "rope_scaling.beta_fast must be above beta_slow"),
        (json!({"mscale": 0.7}), "rope_scaling.mscale: this variant of YaRN is not supported"),
        (json!({"truncate": false}), "rope_scaling.truncate: this variant of YaRN"),
        (json!({"rope_type": "default"}), "rope_scaling.type is yarn, but rope_type is default"),
    ];
    for (more, expected) in cases {
        let message = parse(&with_yarn(more)).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
}
