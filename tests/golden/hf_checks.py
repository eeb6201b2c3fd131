"""Cross-checks of our own preparation against transformers' classes; each is an assertion."""

from pathlib import Path

import torch
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import media
import runs


def image_processor(directory: Path) -> Qwen2VLImageProcessor:
    processor = Qwen2VLImageProcessor.from_pretrained(directory)
    assert "Pil" not in type(processor).__name__, "the torchvision variant is the reference"
    return processor


def pixels_match(directory: Path, media_dir: Path, spec: dict, request: dict) -> None:
    """Bit equality of patch rows and grids, images by the image processor and frames by the video processor."""
    images = image_processor(directory)
    videos = Qwen2VLVideoProcessor(
        size={"shortest_edge": spec["pixels"][0], "longest_edge": spec["pixels"][1]}, do_sample_frames=False,
        temporal_patch_size=2, patch_size=14, merge_size=2)
    for item, rows in zip(request["items"], request["rows"]):
        frames = [torch.from_numpy(media.load(media_dir / f)).permute(2, 0, 1) for f in item["files"]]
        if item["kind"] == "image":
            got = images(frames[0], return_tensors="pt")
            theirs, grid = got["pixel_values"], got["image_grid_thw"]
        else:
            got = videos([torch.stack(frames)], return_tensors="pt", input_data_format="channels_first")
            theirs, grid = got["pixel_values_videos"], got["video_grid_thw"]
        assert grid.tolist() == [item["grid_thw"]], (item["files"], grid, item["grid_thw"])
        worst = float((theirs - rows).abs().max())
        assert torch.equal(theirs, rows), f"{item['files']}: pixel rows differ by {worst}"


@torch.no_grad()
def vision_alone_equals_packed(model, request: dict, alone: list[torch.Tensor]) -> float:
    """All items in one packed call give the rows of one call each, up to f32 rounding."""
    if not alone:
        return 0.0
    grids = torch.tensor([item["grid_thw"] for item in request["items"]])
    packed = model.model.visual(torch.cat(request["rows"]), grid_thw=grids).pooler_output
    worst = float((packed - torch.cat(alone)).abs().max())
    assert worst < 1e-4, f"packed vision rows differ by {worst}"
    return worst


@torch.no_grad()
def generate_matches(model, request: dict, tokens: list[int]) -> None:
    """Where the positions agree, transformers' own generate gives the same greedy tokens."""
    full = torch.tensor([request["full"]])
    kinds = torch.zeros_like(full)
    kinds[full == model.config.image_token_id] = 1
    kinds[full == model.config.video_token_id] = 2
    spg = [i["spg"] for i in request["items"] if i["kind"] == "video"]
    extra = {"second_per_grid_ts": torch.tensor(spg, dtype=torch.float32)} if spg else {}
    out = model.generate(
        input_ids=full, attention_mask=torch.ones_like(full), mm_token_type_ids=kinds, do_sample=False,
        repetition_penalty=1.0, temperature=None, top_k=None, top_p=None, max_new_tokens=len(tokens),
        eos_token_id=-1, pad_token_id=0, **extra, **runs.media_inputs(request))
    assert out[0, full.shape[1]:].tolist() == tokens, "generate disagrees"
