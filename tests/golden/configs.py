"""The JSON files of a checkpoint directory, except the tokenizer's."""

import json
from pathlib import Path

import pixels
import template
import tokenizer

DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def text_fields(spec: dict, ids: dict) -> dict:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": spec["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": spec["intermediate"],
        "max_position_embeddings": spec["context"],
        "max_window_layers": spec["layers"],
        "num_attention_heads": spec["heads"],
        "num_hidden_layers": spec["layers"],
        "num_key_value_heads": spec["kv_heads"],
        "rms_norm_eps": 1e-06,
        "sliding_window": 32768,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.rows(spec["base_tokens"]),
    }


def vision_fields(spec: dict) -> dict:
    vision = spec["vision"]
    return {
        "depth": vision["depth"],
        "fullatt_block_indexes": vision["full"],
        "hidden_act": "silu",
        "hidden_size": vision["hidden"],
        "in_chans": 3,
        "intermediate_size": vision["intermediate"],
        "num_heads": vision["heads"],
        "out_hidden_size": spec["hidden"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }


def model_config(spec: dict, ids: dict) -> dict:
    head = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    media = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
    }
    text, vision, dtype = text_fields(spec, ids), vision_fields(spec), DTYPES[spec["dtype"]]
    if not spec["nested"]:
        rope = {"mrope_section": spec["sections"], "rope_type": "default", "type": "default"}
        if spec["name"] == "tiny":
            rope = {"mrope_section": spec["sections"], "type": "mrope"}
        return head | text | media | {
            "rope_scaling": rope, "rope_theta": spec["theta"], "tie_word_embeddings": spec["tied"],
            "torch_dtype": dtype, "transformers_version": "4.41.2", "vision_config": vision}
    text |= {
        "dtype": dtype, "model_type": "qwen2_5_vl_text", "sliding_window": None,
        "layer_types": ["full_attention"] * spec["layers"],
        "rope_parameters": {"mrope_section": spec["sections"], "rope_theta": spec["theta"], "rope_type": "default"},
        "tie_word_embeddings": spec["tied"]}
    vision["in_channels"] = vision.pop("in_chans")
    del vision["spatial_patch_size"]
    vision |= {"dtype": dtype, "initializer_range": 0.02, "model_type": "qwen2_5_vl_vision"}
    return head | media | {"dtype": dtype, "text_config": text, "tie_word_embeddings": spec["tied"],
                           "transformers_version": "5.23.0", "vision_config": vision}


def generation_config(spec: dict, ids: dict) -> dict:
    base = {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "repetition_penalty": 1.05,
        "temperature": 0.000001,
    }
    if spec["nested"]:
        base |= {"temperature": 0.1, "top_k": 1, "top_p": 0.001}
    return base | {"transformers_version": "4.49.0"}


def preprocessor_config(spec: dict) -> dict:
    low, high = spec["pixels"]
    limits = {"min_pixels": low, "max_pixels": high}
    if spec["nested"]:
        limits = {"size": {"shortest_edge": low, "longest_edge": high}}
    return limits | {
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": pixels.MEAN, "image_std": pixels.STD,
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}


def write(directory: Path, spec: dict, ids: dict) -> None:
    files = {
        "config.json": model_config(spec, ids),
        "generation_config.json": generation_config(spec, ids),
        "preprocessor_config.json": preprocessor_config(spec),
        "chat_template.json": {"chat_template": template.SOURCE},
    }
    for name, value in files.items():
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (directory / name).write_text(text + "\n", encoding="utf-8")
