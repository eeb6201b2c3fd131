"""Runs a checkpoint with transformers: vision rows, prefill, greedy steps, and the same in bfloat16."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration

import cases
import media
import pixels
import positions
import template


def load_model(directory: Path, dtype: torch.dtype):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


def prepare(messages: list, media_dir: Path, spec: dict, tokenizer: Tokenizer, ids: dict) -> dict:
    """Everything of a request that comes before the model."""
    prompt = template.render(messages)
    short = tokenizer.encode(prompt, add_special_tokens=False).ids
    items, rows = [], []
    for item in cases.items_of(messages):
        frames = [media.load(media_dir / f) for f in item["files"]]
        done = pixels.process(frames, item["kind"], *spec["pixels"])
        spg = positions.seconds_per_grid(item["fps"]) if item["fps"] else None
        rows.append(done["rows"])
        items.append({
            "kind": item["kind"], "files": item["files"], "fps": item["fps"], "spg": spg,
            "original": [done["width"], done["height"]],
            "resized": [done["resized_width"], done["resized_height"]],
            "grid_thw": done["grid"], "tokens": done["rows"].shape[0] // 4})
    image_id, video_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    queue, full = list(items), []
    for token in short:
        full += [token] * queue.pop(0)["tokens"] if token in (image_id, video_id) else [token]
    assert not queue
    spans = positions.spans_of(full, image_id, video_id, items)
    pos, delta = positions.positions(spans, 2)
    return {"prompt": prompt, "short": short, "full": full, "items": items, "rows": rows, "pos": pos, "delta": delta}


def media_inputs(request: dict) -> dict:
    out = {}
    for kind, pixel_key, grid_key in (("image", "pixel_values", "image_grid_thw"),
                                      ("video", "pixel_values_videos", "video_grid_thw")):
        chosen = [i for i, item in enumerate(request["items"]) if item["kind"] == kind]
        if chosen:
            out[pixel_key] = torch.cat([request["rows"][i] for i in chosen])
            out[grid_key] = torch.tensor([request["items"][i]["grid_thw"] for i in chosen])
    return out


@torch.no_grad()
def vision_rows(model, request: dict) -> list[torch.Tensor]:
    out = []
    for item, rows in zip(request["items"], request["rows"]):
        result = model.model.visual(rows.to(model.dtype), grid_thw=torch.tensor([item["grid_thw"]]))
        out.append(result.pooler_output.float())
    return out


@torch.no_grad()
def generate(model, request: dict, forced: list[int] | None = None, steps: int = cases.STEPS) -> dict:
    """Greedy without penalties; step k's logits choose token k (row 0 is the prefill's last position)."""
    ids = torch.tensor([request["full"]])
    pos = torch.from_numpy(request["pos"]).long()[:, None, :]
    out = model(input_ids=ids, position_ids=pos, use_cache=True, **media_inputs(request))
    everything = out.logits[0].float()
    logits, tokens = [everything[-1]], []
    length = ids.shape[1]
    for k in range(steps):
        tokens.append(forced[k] if forced else int(logits[-1].argmax()))
        if k + 1 == steps:
            break
        at = torch.full((3, 1, 1), length + k + request["delta"])
        out = model(input_ids=torch.tensor([[tokens[-1]]]), position_ids=at, use_cache=True,
                    past_key_values=out.past_key_values)
        logits.append(out.logits[0, -1].float())
    steps_logits = torch.stack(logits)
    top = steps_logits.topk(2, dim=-1).values
    return {"all": everything, "steps": steps_logits, "tokens": tokens, "margins": (top[:, 0] - top[:, 1]).tolist()}


def check_positions(model, request: dict, ids: dict) -> str:
    """Compares with transformers where the versions agree; says how the comparison went."""
    full = torch.tensor([request["full"]])
    kinds = torch.zeros_like(full)
    kinds[full == ids["<|image_pad|>"]] = 1
    kinds[full == ids["<|video_pad|>"]] = 2
    inputs = media_inputs(request)
    spg = [i["spg"] for i in request["items"] if i["kind"] == "video"]
    theirs, delta = model.model.get_rope_index(
        full, kinds, inputs.get("image_grid_thw"), inputs.get("video_grid_thw"),
        torch.tensor(spg, dtype=torch.float32) if spg else None)
    ours = torch.from_numpy(request["pos"]).long()
    if torch.equal(theirs[:, 0], ours) and int(delta) == request["delta"]:
        return "same"
    slow = False
    for item in request["items"]:
        if item["kind"] == "video":
            t, h, w = item["grid_thw"]
            slow |= positions.group_times(t, item["spg"], 2)[-1] + 1 > max(h, w) // 2
    assert slow, "positions differ from transformers although no video is longer than its sides"
    return "differs (video longer than its sides: largest position plus one against max(h, w))"


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).pow(2).mean().sqrt())
