"""Tables that need no checkpoint: resampling, size rule, positions, tokenizer, templates."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as hf_smart_resize

import media
import pixels
import positions
import resample
import table_texts

# (source w, source h, target w, target h)
RESIZES = [
    (97, 131, 84, 140), (131, 97, 140, 84), (9, 7, 84, 56), (70, 42, 56, 56), (98, 126, 112, 112),
    (50, 40, 50, 56), (50, 40, 56, 40), (64, 64, 64, 28), (64, 64, 28, 64),
    (56, 56, 56, 56), (1, 1, 56, 56), (2, 2, 28, 28), (3, 90, 28, 84), (90, 3, 84, 28), (1, 50, 28, 392),
    (28, 28, 84, 84), (28, 28, 29, 27), (160, 100, 28, 28), (120, 33, 28, 28), (84, 84, 56, 112),
    (61, 90, 56, 84), (88, 90, 84, 84), (100, 100, 99, 101), (17, 19, 140, 28), (19, 17, 28, 140),
    (120, 80, 84, 56), (33, 64, 28, 56), (300, 20, 280, 28), (5, 5, 28, 28), (130, 90, 56, 28),
]
# (height, width, min, max)
IMAGE, DEFAULT = (3136, 12845056), (3136, 1003520)
SIZES = [(h, w, *IMAGE) for w, h in [
    (501, 333), (640, 480), (70, 42), (98, 126), (9, 7), (60, 900), (1400, 50), (97, 131), (1000, 10), (300, 14),
    (1, 200), (200, 1), (1, 201), (201, 1), (2, 400), (2, 401), (1, 1), (28, 28), (14, 14), (42, 42), (43, 43),
    (56, 56), (70, 70), (98, 98), (126, 126), (154, 154), (56, 55), (1024, 1024), (1920, 1080), (3840, 2160),
    (8000, 6000), (5000, 5000), (10000, 100), (13, 2600), (14, 2800), (1036, 1036), (3584, 3584), (3585, 3584)]]
SIZES += [(h, w, *DEFAULT) for w, h in [(1024, 1024), (1920, 1080), (640, 480), (4000, 30), (30, 4000), (1003, 1001)]]
SIZES += [
    (480, 640, 3136, 200704), (1080, 1920, 3136, 200704), (448, 448, 3136, 200704), (449, 448, 3136, 200704),
    (400, 600, 3136, 401408), (720, 1280, 100352, 602112), (100, 100, 100352, 602112), (224, 448, 100352, 602112),
    (10, 2000, 3136, 3136), (2000, 10, 3136, 3136), (1000, 1000, 784, 784), (5, 5, 784, 784), (29, 27, 784, 1568),
    (333, 501, 1000000, 2000000), (56, 56, 3137, 12845056), (56, 56, 3136, 3135), (1, 200, 784, 1568),
]
SEQUENCES = [  # (name, tokens per second, spans)
    ("text", 2, [{"text": 7}]),
    ("image", 2, [{"text": 4}, {"image": [1, 10, 6]}, {"text": 3}]),
    ("image_first", 2, [{"image": [1, 4, 8]}, {"text": 2}]),
    ("images_adjacent", 2, [{"text": 1}, {"image": [1, 2, 2]}, {"image": [1, 6, 2]}, {"text": 1}]),
    ("video_fps_2", 2, [{"text": 3}, {"video": [3, 4, 4], "fps": 2.0}, {"text": 2}]),
    ("video_fps_4", 2, [{"text": 3}, {"video": [4, 4, 6], "fps": 4.0}, {"text": 2}]),
    ("video_fps_3", 2, [{"text": 2}, {"video": [7, 4, 4], "fps": 3.0}, {"text": 2}]),
    ("video_fps_1", 2, [{"text": 2}, {"video": [3, 4, 4], "fps": 1.0}, {"text": 2}]),
    ("video_fps_0.7", 2, [{"text": 2}, {"video": [4, 4, 6], "fps": 0.7}, {"text": 2}]),
    ("video_fps_24", 2, [{"text": 2}, {"video": [13, 2, 2], "fps": 24.0}, {"text": 2}]),
    ("video_fps_29.97", 2, [{"text": 1}, {"video": [16, 2, 4], "fps": 29.97}, {"text": 1}]),
    ("video_one_group", 2, [{"text": 1}, {"video": [1, 6, 4], "fps": 0.1}, {"text": 1}]),
    ("video_slow", 2, [{"text": 1}, {"video": [3, 2, 2], "fps": 0.1}, {"text": 4}]),
    ("video_time_equals_sides", 2, [{"text": 1}, {"video": [2, 4, 6], "fps": 2.0}, {"text": 1}]),
    ("video_spg_default", 2, [{"text": 1}, {"video": [3, 2, 2], "fps": None}, {"text": 1}]),
    ("tokens_per_second_4", 4, [{"text": 2}, {"video": [3, 4, 4], "fps": 1.5}, {"text": 2}]),
    ("mixed", 2, [{"text": 5}, {"image": [1, 4, 6]}, {"text": 2}, {"video": [4, 2, 4], "fps": 0.7}, {"text": 3},
                  {"image": [1, 8, 2]}, {"video": [2, 4, 2], "fps": 6.0}, {"text": 4}]),
]


def dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def resizes(out: Path) -> None:
    out.mkdir(exist_ok=True)
    tensors, rows = {}, []
    for k, (w, h, tw, th) in enumerate(RESIZES):
        rng = np.random.RandomState(500 + k)
        noise = rng.randint(0, 256, (h, w, 3)).astype(np.uint8)
        edges = np.where(rng.rand(h, w, 1) > 0.5, 255, 0).astype(np.uint8).repeat(3, axis=2)
        source = [media.picture(w, h, 600 + k), noise, edges][k % 3]
        result = pixels.resize(source, th, tw)
        assert np.array_equal(result, resample.resize(source, th, tw)), f"resize case {k} is not by the recipe"
        tensors[f"{k:02d}.source"], tensors[f"{k:02d}.target"] = torch.tensor(source), torch.tensor(result)
        rows.append({"case": f"{k:02d}", "source": [w, h], "target": [tw, th],
                     "content": ["picture", "noise", "edges"][k % 3]})
    save_file(tensors, out / "cases.safetensors")
    (out / "cases.safetensors").chmod(0o644)
    dump(out / "cases.json", rows)


def size_rows() -> list:
    rows = []
    for h, w, low, high in SIZES:
        row = {"height": h, "width": w, "min_pixels": low, "max_pixels": high}
        try:
            got = pixels.smart_resize(h, w, low, high)
            assert got == hf_smart_resize(h, w, 28, low, high)
            row["resized"] = {"height": got[0], "width": got[1]}
        except ValueError:
            row["error"] = "aspect_ratio"
        rows.append(row)
    return rows


def position_rows() -> list:
    rows = []
    for name, tps, spans in SEQUENCES:
        spans = [dict(s) for s in spans]
        for span in spans:
            if "video" in span:
                span["spg"] = positions.seconds_per_grid(span["fps"]) if span["fps"] else 1.0
        ids, delta = positions.positions(spans, tps)
        rows.append({"name": name, "tokens_per_second": tps, "spans": spans, "tokens": ids.shape[1],
                     "position_ids": ids.tolist(), "rope_delta": delta})
    return rows


def tokenizer_rows(tokenizer: dict) -> list:
    ready = Tokenizer.from_str(json.dumps(tokenizer))
    rows = []
    for text in table_texts.TEXTS:
        ids = ready.encode(text, add_special_tokens=False).ids
        rows.append({"text": text, "ids": ids, "decoded": ready.decode(ids, skip_special_tokens=False),
                     "decoded_skip_special": ready.decode(ids, skip_special_tokens=True)})
    return rows


def write(out: Path, tokenizer: dict) -> None:
    resizes(out / "resize")
    dump(out / "smart_resize.json", size_rows())
    dump(out / "positions.json", position_rows())
    dump(out / "tokenizer_cases.json", tokenizer_rows(tokenizer))
    dump(out / "templates.json", table_texts.template_rows())
