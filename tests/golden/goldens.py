"""Writes golden/<case>.json and golden/<case>.safetensors of one checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import cases
import hf_checks
import runs
import sensitivity

PIXELS_IN = "tiny"  # the other checkpoints see the same pixels, so only this one keeps them


def write(directory: Path, media_dir: Path, spec: dict, ids: dict) -> list[dict]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    exact, rounded = (runs.load_model(directory, t) for t in (torch.float32, torch.bfloat16))
    golden = directory / "golden"
    golden.mkdir(exist_ok=True)
    report = []
    for name in cases.SETS[spec["name"]]:
        request = runs.prepare(cases.CASES[name], media_dir, spec, tokenizer, ids)
        agreement = runs.check_positions(exact, request, ids)
        run = runs.generate(exact, request)
        low = runs.generate(rounded, request, forced=run["tokens"])
        vit, vit_low = runs.vision_rows(exact, request), runs.vision_rows(rounded, request)
        hf_checks.pixels_match(directory, media_dir, spec, request)
        hf_checks.vision_alone_equals_packed(exact, request, vit)
        if agreement == "same":
            hf_checks.generate_matches(exact, request, run["tokens"])
        sensitivity.check(exact, name, request, other_token=500)
        sensitivity.greedy_is_lively(run["tokens"])
        assert max(run["tokens"]) < spec["base_tokens"], "greedy tokens must be ordinary ones"
        items = [dict(item, vit_bf16_rms=runs.rms(a, b)) for item, a, b in zip(request["items"], vit, vit_low)]
        record = {
            "case": name,
            "messages": cases.CASES[name],
            "prompt": request["prompt"],
            "prompt_ids": request["short"],
            "expanded_ids": request["full"],
            "media": items,
            "rope_delta": request["delta"],
            "hf_positions": agreement,
            "greedy_tokens": run["tokens"],
            "greedy_text": tokenizer.decode(run["tokens"], skip_special_tokens=True),
            "margins": run["margins"],
            "logit_range": float(run["steps"].max() - run["steps"].min()),
            "bf16_rms": runs.rms(low["steps"], run["steps"]),
            "bf16_rms_prefill": runs.rms(low["steps"][0], run["steps"][0]),
        }
        tensors = {
            "position_ids": torch.from_numpy(request["pos"]),
            "logits_prefill": run["steps"][0].clone(),
            "logits_steps": run["steps"],
        }
        for i, rows in enumerate(vit):
            tensors[f"vit_rows.{i}"] = rows.contiguous()
            if spec["name"] == PIXELS_IN:
                tensors[f"pixel_values.{i}"] = request["rows"][i]
        if request["items"] and spec["name"] != PIXELS_IN:
            record["pixel_values_in"] = f"{PIXELS_IN}/golden/{name}.safetensors"
        if name == cases.ALL_LOGITS:
            tensors["logits_all"] = run["all"].contiguous()
            record["bf16_rms_all"] = runs.rms(low["all"], run["all"])
        save_file(tensors, golden / f"{name}.safetensors")
        (golden / f"{name}.safetensors").chmod(0o644)
        text = json.dumps(record, ensure_ascii=False, indent=1)
        (golden / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        report.append(record)
    return report
