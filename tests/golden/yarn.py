"""Goldens of YaRN: frequency tables, and the weights of `tiny` run with a stretched context. Needs no other input than
the committed fixtures: `python yarn.py`."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import cases
import checkpoints
import runs

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SPEC = checkpoints.SPECS["tiny"]
CASES = ["text", "multi_turn"]
# Short enough that the goldens reach beyond it and that the blend falls inside of the 16 frequencies.
SCALING = {"type": "yarn", "mrope_section": SPEC["sections"], "factor": 4.0, "original_max_position_embeddings": 32}
TABLES = [
    {"theta": 1e6, "head_dim": 128, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"theta": 1e6, "head_dim": 128, "factor": 2.5, "original_max_position_embeddings": 32768, "attention_factor": 1.25},
    {"theta": 1e6, "head_dim": 128, "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
     "beta_slow": 2.0},
    {"theta": 100.0, "head_dim": 32, "factor": 4.0, "original_max_position_embeddings": 32},
    {"theta": 1e4, "head_dim": 64, "factor": 1.0, "original_max_position_embeddings": 2048},
    # Both limits fall on one frequency.
    {"theta": 1e6, "head_dim": 128, "factor": 4.0, "original_max_position_embeddings": 4},
]


def stretched(config: Qwen2_5_VLConfig, theta: float, scaling: dict) -> Qwen2_5_VLConfig:
    config = copy.deepcopy(config)
    kept = {name: value for name, value in scaling.items() if name != "type"}
    config.text_config.rope_parameters = {"rope_type": "yarn", "rope_theta": theta} | kept
    return config


def tables(config: Qwen2_5_VLConfig) -> list[dict]:
    out = []
    for table in TABLES:
        names = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
        text = stretched(config, table["theta"], {name: table[name] for name in names if name in table}).text_config
        text.hidden_size, text.num_attention_heads = table["head_dim"] * 2, 2
        frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](text)
        out.append(table | {"inverse_frequencies": frequencies.double().tolist(), "scale": float(scale)})
    return out


def load(config: Qwen2_5_VLConfig, dtype: torch.dtype):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        FIXTURES / "tiny", config=config, dtype=dtype, attn_implementation="eager")
    assert model.model.language_model.rotary_emb.rope_type == "yarn"
    return model.eval()


def write_cases(config: Qwen2_5_VLConfig, directory: Path) -> None:
    stretch = stretched(config, SPEC["theta"], SCALING)
    exact, rounded = load(stretch, torch.float32), load(stretch, torch.bfloat16)
    plain = runs.load_model(FIXTURES / "tiny", torch.float32)
    tokenizer = Tokenizer.from_file(str(FIXTURES / "tiny" / "tokenizer.json"))
    ids = {f"<|{name}|>": tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    golden = directory / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        request = runs.prepare(cases.CASES[name], FIXTURES / "media", SPEC, tokenizer, ids)
        run = runs.generate(exact, request)
        low = runs.generate(rounded, request, forced=run["tokens"])
        unstretched = runs.generate(plain, request, forced=run["tokens"])
        spread = float(run["steps"].max() - run["steps"].min())
        moved = float((unstretched["steps"] - run["steps"]).abs().max())
        assert moved > 0.05 * spread, "the stretch must be audible"
        vit, vit_low = runs.vision_rows(exact, request), runs.vision_rows(rounded, request)
        items = [dict(item, vit_bf16_rms=runs.rms(a, b)) for item, a, b in zip(request["items"], vit, vit_low)]
        record = {
            "case": name,
            "expanded_ids": request["full"],
            "media": items,
            "rope_delta": request["delta"],
            "pixel_values_in": f"tiny/golden/{name}.safetensors",
            "greedy_tokens": run["tokens"],
            "margins": run["margins"],
            "logit_range": spread,
            "bf16_rms": runs.rms(low["steps"], run["steps"]),
            "bf16_rms_prefill": runs.rms(low["steps"][0], run["steps"][0]),
        }
        save_file({"logits_steps": run["steps"]}, golden / f"{name}.safetensors")
        (golden / f"{name}.safetensors").chmod(0o644)
        (golden / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, "tokens", len(request["full"]), "moved", moved, "range", spread, "margin", min(run["margins"]))


def main() -> None:
    torch.set_num_threads(2)
    config = Qwen2_5_VLConfig.from_pretrained(FIXTURES / "tiny")
    directory = FIXTURES / "tiny-yarn"
    directory.mkdir(exist_ok=True)
    file = json.loads((FIXTURES / "tiny" / "config.json").read_text(encoding="utf-8"))
    file["rope_scaling"] = SCALING
    (directory / "config.json").write_text(json.dumps(file, indent=2) + "\n", encoding="utf-8")
    write_cases(config, directory)
    (FIXTURES / "yarn.json").write_text(json.dumps(tables(config)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
