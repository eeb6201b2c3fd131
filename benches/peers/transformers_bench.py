#!/usr/bin/env python3
"""Times Hugging Face transformers: published shapes, random BF16 weights, eager mode, SDPA.

    transformers_bench.py PART [--device cpu|cuda] [--threads 2] [--shapes 3b] [--batches 1,4,8,16] [--context 256]
                          [--prefill 512] [--sides 72] [--steps 16] [--repeats 2]

PART is `decode` (steps), `prefill` (logits of the last token), `vision` (images of so many patches along each side,
already cut into patches) or `all`. A shape is 3b, 7b, 72b, or NAME/N for what one rank of a group of N holds, as a model of
its own without sums over ranks; its tower is that of NAME. Each part runs untimed first. Prints one line of JSON per
shape, with milliseconds.
"""

import argparse
import gc
import json
import time

import torch
import transformers
from transformers import (
    DynamicCache,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

PATCH_VALUES = 3 * 2 * 14 * 14
# hidden, layers, query heads, KV heads, intermediate, vocabulary, intermediate of the tower
SHAPES = {
    "3b": (2048, 36, 16, 2, 11008, 151936, 3420),
    "7b": (3584, 28, 28, 4, 18944, 152064, 3420),
    "72b": (8192, 80, 64, 8, 29568, 152064, 3456),
}


def text_config(shape: str) -> dict:
    """The language model of a shape, divided among the ranks that it names."""
    name, _, ranks = shape.partition("/")
    hidden, layers, heads, kv_heads, intermediate, vocabulary, _ = SHAPES[name]
    ranks = int(ranks or 1)
    if kv_heads % ranks or intermediate % ranks or vocabulary % ranks:
        raise SystemExit(f"{shape}: {ranks} ranks do not divide {name} evenly")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads // ranks,
        "num_key_value_heads": kv_heads // ranks,
        "intermediate_size": intermediate // ranks,
        "vocab_size": vocabulary // ranks,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def language_model(shape: str) -> PreTrainedModel:
    text = text_config(shape)
    if "/" in shape:
        # A share has fewer heads than its width, which only the text model's configuration can say.
        rope = {"rope_type": "default", "rope_theta": 1e6}
        config = Qwen2Config(**text, head_dim=128, rope_parameters=rope, tie_word_embeddings=False)
        return build(Qwen2ForCausalLM, config)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision_config(shape), tie_word_embeddings=shape == "3b"
    )
    return build(Qwen2_5_VLForConditionalGeneration, config)


def vision_config(shape: str) -> dict:
    hidden, *_, intermediate = SHAPES[shape.partition("/")[0]]
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": intermediate,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "tokens_per_second": 2,
    }


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
    wait = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    body()
    wait()
    return (time.perf_counter() - begin) * 1e3


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1000, shape)


def decode(model, batch: int, context: int, steps: int) -> float:
    """Milliseconds per step of `batch` sequences, the mean over `steps`, from `context` on."""
    cache = DynamicCache(config=model.config.get_text_config())
    # One sequence is prefilled and repeated: the same cache as `batch` prefills, sooner.
    model(input_ids=tokens(1, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    axes = (3,) if isinstance(model, Qwen2_5_VLForConditionalGeneration) else ()
    state = {"ids": tokens(batch, 1), "position": context}

    def step() -> None:
        position_ids = torch.full((*axes, batch, 1), state["position"])
        logits = model(
            input_ids=state["ids"], position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        state["ids"] = logits[:, -1].argmax(dim=-1, keepdim=True)
        state["position"] += 1

    step()
    return timed(lambda: [step() for _ in range(steps)]) / steps


def prefill(model, length: int, repeats: int) -> list[float]:
    """Milliseconds of a prompt, once untimed."""
    prompt = tokens(1, length)
    runs = [timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1)) for _ in range(repeats + 1)]
    return runs[1:]


def vision(shape: str, sides: list[int], repeats: int) -> dict[int, list[float]]:
    """Milliseconds per image, after a small one to warm up."""
    config = Qwen2_5_VLConfig(vision_config=vision_config(shape)).vision_config
    tower = build(Qwen2_5_VisionTransformerPretrainedModel, config)

    def encode(side: int) -> float:
        patches = torch.randn(side * side, PATCH_VALUES).to(torch.bfloat16)
        grid = torch.tensor([[1, side, side]])
        return timed(lambda: tower(patches, grid_thw=grid))

    encode(18)
    return {side: [encode(side) for _ in range(repeats)] for side in sides}


def measure(options: argparse.Namespace, shape: str) -> dict:
    report = {"torch": torch.__version__, "transformers": transformers.__version__, "shape": shape}
    numbers = lambda text: [int(number) for number in text.split(",")]
    everything = options.part == "all"
    if everything or options.part == "vision":
        report["vision_ms"] = vision(shape, numbers(options.sides), options.repeats)
    if options.part != "vision":
        model = language_model(shape)
        if everything or options.part == "prefill":
            lengths = numbers(options.prefill)
            report["prefill_ms"] = {length: prefill(model, length, options.repeats) for length in lengths}
        if everything or options.part == "decode":
            report["decode_ms"] = {
                batch: [decode(model, batch, options.context, options.steps) for _ in range(options.repeats)]
                for batch in numbers(options.batches)
            }
    return report


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("part", choices=["decode", "prefill", "vision", "all"])
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--shapes", default="3b")
    arguments.add_argument("--batches", default="1,4,8,16")
    arguments.add_argument("--context", type=int, default=256)
    arguments.add_argument("--prefill", default="512")
    arguments.add_argument("--sides", default="72", help="patches along each side: 72 for 1008 pixels")
    arguments.add_argument("--steps", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=2)
    options = arguments.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    with torch.inference_mode():
        for shape in options.shapes.split(","):
            print(json.dumps(measure(options, shape)), flush=True)
            gc.collect()
            if options.device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
