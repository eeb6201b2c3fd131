#!/usr/bin/env python3
"""Times Hugging Face transformers on the CPU: the shape of Qwen2.5-VL-3B, random BF16 weights, eager mode, SDPA.

    transformers_bench.py PART [--threads 2] [--batches 1,4,8,16] [--steps 16] [--repeats 2]

PART is `decode` (steps at context 256), `prefill` (512 tokens, logits of the last one), `vision` (one image of
1008 x 1008 pixels, already cut into patches). Each runs untimed first, the tower on a smaller image. Prints one line
of JSON with milliseconds.
"""

import argparse
import json
import time

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

CONTEXT, PREFILL = 256, 512
GRID = 72  # 1008 pixels in patches of 14
PATCH_VALUES = 3 * 2 * 14 * 14


def config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 11008,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "use_sliding_window": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True,
    )


def build(kind: type[PreTrainedModel], shape) -> PreTrainedModel:
    """A model with its usual initialisation skipped (minutes) and every parameter filled from one pool."""
    for layer in (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv3d):
        layer.reset_parameters = lambda self: None
    kind.init_weights = lambda self: self.tie_weights()
    model = kind._from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
    torch.manual_seed(1)
    pool = (torch.randn(33_554_393) * 0.02).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), pool.numel()):
                part = flat[start : start + pool.numel()]
                part.copy_(pool[: part.numel()])
    return model.eval()


def timed(body) -> float:
    begin = time.perf_counter()
    body()
    return (time.perf_counter() - begin) * 1e3


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 150000, shape)


def decode(model, batch: int, steps: int) -> float:
    """Milliseconds per step of `batch` sequences, the mean over `steps`, from context 256 on."""
    cache = DynamicCache(config=model.config.get_text_config())
    # One sequence is prefilled and repeated: the same cache as `batch` prefills, sooner.
    model(input_ids=tokens(1, CONTEXT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    state = {"ids": tokens(batch, 1), "position": CONTEXT}

    def step() -> None:
        position_ids = torch.full((3, batch, 1), state["position"])
        logits = model(
            input_ids=state["ids"], position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        state["ids"] = logits[:, -1].argmax(dim=-1, keepdim=True)
        state["position"] += 1

    step()
    return timed(lambda: [step() for _ in range(steps)]) / steps


def vision(repeats: int) -> list[float]:
    """Milliseconds per image, after a small one to warm up."""
    tower = build(Qwen2_5_VisionTransformerPretrainedModel, config().vision_config)

    def encode(side: int) -> float:
        patches = torch.randn(side * side, PATCH_VALUES).to(torch.bfloat16)
        grid = torch.tensor([[1, side, side]])
        return timed(lambda: tower(patches, grid_thw=grid))

    encode(GRID // 4)
    return [encode(GRID) for _ in range(repeats)]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("part", choices=["decode", "prefill", "vision"])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--batches", default="1,4,8,16")
    arguments.add_argument("--steps", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    report = {"torch": torch.__version__, "transformers": transformers.__version__}

    with torch.inference_mode():
        if options.part == "vision":
            report["vision_ms"] = vision(options.repeats)
        else:
            model = build(Qwen2_5_VLForConditionalGeneration, config())
            if options.part == "prefill":
                prompt = tokens(1, PREFILL)
                run = lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1)
                run()
                report["prefill_ms"] = [timed(run) for _ in range(options.repeats)]
            else:
                report["decode_ms"] = {
                    batch: [decode(model, int(batch), options.steps) for _ in range(options.repeats)]
                    for batch in options.batches.split(",")
                }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
