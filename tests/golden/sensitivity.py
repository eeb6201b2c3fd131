"""Proves that a checkpoint is worth testing with: its logits depend on what they should depend on."""

import copy

import torch

import cases
import runs

FLOOR = 0.02  # smallest accepted change of the last prompt position's logits (largest |difference|); range is about 40


def change(model, base: torch.Tensor, request: dict) -> float:
    return float((runs.generate(model, request, steps=1)["steps"][0] - base).abs().max())


def variants(request: dict, other_token: int) -> dict:
    out = {}

    def variant(name: str) -> dict:
        out[name] = dict(request, pos=request["pos"].copy(), full=list(request["full"]), rows=list(request["rows"]),
                         items=copy.deepcopy(request["items"]))
        return out[name]

    variant("early_token")["full"][4] = other_token
    gap = variant("positions_gap")
    gap["pos"][:, gap["pos"].shape[1] // 2:] += 3
    for axis, name in enumerate("thw"):
        moved = (request["pos"] != request["pos"][0]).any(0) | (request["pos"] != request["pos"][1]).any(0)
        if not moved.any() or len(set(request["pos"][axis, moved])) == 1:
            continue
        variant("flat_" + name)["pos"][axis, moved] = request["pos"][axis, moved].min()
    images = [i for i, item in enumerate(request["items"]) if item["kind"] == "image"]
    if len(images) >= 2:
        a, b = images[-2:]
        swapped = variant("images_swapped")
        for key in ("rows", "items"):
            swapped[key][a], swapped[key][b] = swapped[key][b], swapped[key][a]
    for i in range(len(request["rows"])):
        darker = variant(f"item_{i}_darker")
        darker["rows"][i] = darker["rows"][i] - 0.5
        last = variant(f"item_{i}_last_patch")
        last["rows"][i] = last["rows"][i].clone()
        last["rows"][i][-1] += 0.5
    return out


def check(model, name: str, request: dict, other_token: int) -> dict:
    base = runs.generate(model, request, steps=1)["steps"][0]
    found = {}
    for kind, changed in variants(request, other_token).items():
        found[kind] = change(model, base, changed)
    weak = {k: v for k, v in found.items() if v < FLOOR and k != "flat_w"}
    if found.get("flat_w", 1.0) < 1e-3:
        weak["flat_w"] = found["flat_w"]
    assert not weak, f"{name}: too insensitive: {weak}"
    return found


def greedy_is_lively(tokens: list[int]) -> None:
    assert len(set(tokens)) >= cases.STEPS // 4, "greedy decoding repeats itself"
    assert len(set(tokens[:8])) >= 3
