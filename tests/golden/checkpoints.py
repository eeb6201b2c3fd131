"""Small random checkpoints in the published layout. Scales: see README.md, "How the weights are drawn"."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tokenizer import rows as model_rows

TINY_VISION = {"depth": 4, "hidden": 64, "heads": 4, "intermediate": 84, "full": [1, 3]}
SPECS = {
    "tiny": {
        "name": "tiny", "base_tokens": 2048, "seed": 139, "dtype": "bf16", "nested": False, "tied": False, "shards": 1,
        "hidden": 256, "heads": 8, "kv_heads": 2, "sections": [4, 6, 6], "layers": 4, "intermediate": 344, "context": 4096,
        "theta": 100.0, "pixels": (3136, 200704), "vision": TINY_VISION, "embed": 1.0, "head": 1.5, "near_ties": False},
    "tiny-nested": {
        "name": "tiny-nested", "base_tokens": 1024, "seed": 13, "dtype": "f32", "nested": True, "tied": True, "shards": 3,
        "hidden": 224, "heads": 14, "kv_heads": 2, "sections": [2, 3, 3], "layers": 3, "intermediate": 304, "context": 4096,
        "theta": 50.0, "pixels": (3136, 401408), "embed": 0.025, "head": 0.025, "near_ties": False,
        "vision": {"depth": 2, "hidden": 48, "heads": 4, "intermediate": 68, "full": [1]}},
    "real-heads": {
        "name": "real-heads", "base_tokens": 1024, "seed": 50, "dtype": "bf16", "nested": False, "tied": False, "shards": 1,
        "hidden": 256, "heads": 2, "kv_heads": 1, "sections": [16, 24, 24], "layers": 2, "intermediate": 172, "context": 4096,
        "theta": 1000000.0, "pixels": (3136, 12845056), "embed": 1.0, "head": 1.5, "near_ties": False,
        "vision": {"depth": 2, "hidden": 160, "heads": 2, "intermediate": 212, "full": [1]}},
    "small-margin": {
        "name": "small-margin", "base_tokens": 1024, "seed": 11, "dtype": "bf16", "nested": False, "tied": False, "shards": 1,
        "hidden": 256, "heads": 8, "kv_heads": 2, "sections": [4, 6, 6], "layers": 2, "intermediate": 344, "context": 4096,
        "theta": 100.0, "pixels": (3136, 200704), "embed": 1.0, "head": 1.5, "near_ties": True,
        "vision": TINY_VISION | {"depth": 2, "full": [1]}},
}
LOUD_TOKENS, LOUDNESS = 160, 4.0


class Draw:
    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def matrix(self, rows: int, cols: int, gain: float) -> torch.Tensor:
        return self.normal(rows, cols, std=gain / cols**0.5)

    def norm(self, size: int, around: float = 1.0) -> torch.Tensor:
        return (around + self.normal(size, std=0.25 * around)).clamp(min=0.2)


def loud_ids(tokenizer: dict) -> list[int]:
    """Ids of word-like tokens; only these compete in greedy decoding, never an added token or a padded row."""
    words = [i for t, i in tokenizer["model"]["vocab"].items() if t.lstrip("Ġ").isascii() and
             t.lstrip("Ġ").isalpha() and len(t) >= 3]
    return words[:: max(1, len(words) // LOUD_TOKENS)][:LOUD_TOKENS]


def head_rows(draw: Draw, spec: dict, loud: list[int]) -> torch.Tensor:
    std = spec["head"] / (1 if spec["tied"] else spec["hidden"] ** 0.5)
    rows = draw.normal(model_rows(spec["base_tokens"]), spec["hidden"], std=std)
    rows[loud] *= LOUDNESS
    if spec["near_ties"]:
        rows = rows.to(torch.bfloat16)
        bits = rows.view(torch.int16)
        for first, second in zip(loud[::2], loud[1::2]):
            flips = torch.rand(spec["hidden"], generator=draw.generator) < 0.35
            bits[second] = torch.where(flips, bits[first] ^ 1, bits[first])
        rows = bits.view(torch.bfloat16).float()
    return rows


def text_tensors(draw: Draw, spec: dict, loud: list[int]) -> dict:
    h, dim = spec["hidden"], spec["hidden"] // spec["heads"]
    q, kv, inner = spec["heads"] * dim, spec["kv_heads"] * dim, spec["intermediate"]
    head = head_rows(draw, spec, loud)
    embed = head if spec["tied"] else draw.normal(*head.shape, std=spec["embed"])
    out = {"model.embed_tokens.weight": embed}
    for i in range(spec["layers"]):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = draw.norm(h)
        out[p + "post_attention_layernorm.weight"] = draw.norm(h)
        for name, rows, gain, bias in (("q", q, 1.3, 0.5), ("k", kv, 1.3, 0.5), ("v", kv, 1.2, 0.2)):
            out[p + f"self_attn.{name}_proj.weight"] = draw.matrix(rows, h, gain)
            out[p + f"self_attn.{name}_proj.bias"] = draw.normal(rows, std=bias)
        out[p + "self_attn.o_proj.weight"] = draw.matrix(h, q, 1.3)
        out[p + "mlp.gate_proj.weight"] = draw.matrix(inner, h, 1.3)
        out[p + "mlp.up_proj.weight"] = draw.matrix(inner, h, 1.2)
        out[p + "mlp.down_proj.weight"] = draw.matrix(h, inner, 1.2)
    out["model.norm.weight"] = draw.norm(h, around=4.0 if spec["tied"] else 1.0)
    if not spec["tied"]:
        out["lm_head.weight"] = head
    return out


def vision_tensors(draw: Draw, spec: dict) -> dict:
    v = spec["vision"]
    h, inner = v["hidden"], v["intermediate"]
    out = {"visual.patch_embed.proj.weight": draw.matrix(h, 1176, 1.2).reshape(h, 3, 2, 14, 14)}

    def linear(name: str, rows: int, cols: int, gain: float, bias: float) -> None:
        out[name + ".weight"] = draw.matrix(rows, cols, gain)
        out[name + ".bias"] = draw.normal(rows, std=bias)

    for j in range(v["depth"]):
        p = f"visual.blocks.{j}."
        out[p + "norm1.weight"] = draw.norm(h)
        out[p + "norm2.weight"] = draw.norm(h)
        linear(p + "attn.qkv", 3 * h, h, 1.3, 0.4)
        linear(p + "attn.proj", h, h, 1.0, 0.1)
        linear(p + "mlp.gate_proj", inner, h, 1.2, 0.2)
        linear(p + "mlp.up_proj", inner, h, 1.2, 0.2)
        linear(p + "mlp.down_proj", h, inner, 1.1, 0.1)
    out["visual.merger.ln_q.weight"] = draw.norm(h)
    linear("visual.merger.mlp.0", 4 * h, 4 * h, 1.2, 0.2)
    linear("visual.merger.mlp.2", spec["hidden"], 4 * h, 1.8, 0.1)
    return out


def nested_name(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def store(tensors: dict, path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def write(directory: Path, spec: dict, tokenizer: dict) -> None:
    tensors = vision_tensors(Draw(1000 + spec["seed"]), spec)
    tensors |= text_tensors(Draw(spec["seed"]), spec, loud_ids(tokenizer))
    if spec["nested"]:
        tensors = {nested_name(k): v for k, v in tensors.items()}
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[spec["dtype"]]
    tensors = {k: v.to(dtype).contiguous() for k, v in sorted(tensors.items())}
    if spec["shards"] == 1:
        store(tensors, directory / "model.safetensors")
        return
    names, count = list(tensors), spec["shards"]
    weight_map, total = {}, 0
    for k in range(count):
        file = f"model-{k + 1:05d}-of-{count:05d}.safetensors"
        # dealt out in turn, so that the parts of one layer lie in different files
        part = {n: tensors[n] for n in names[k::count]}
        store(part, directory / file)
        weight_map |= {n: file for n in part}
        total += sum(t.numel() * t.element_size() for t in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
