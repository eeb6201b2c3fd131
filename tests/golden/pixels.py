"""From RGB bytes to patch rows: size rule, torchvision resampling, normalisation, patch order."""

import math

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

PATCH, MERGE, TEMPORAL = 14, 2, 2
FACTOR = PATCH * MERGE
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def smart_resize(height: int, width: int, low: int, high: int, factor: int = FACTOR) -> tuple[int, int]:
    if max(height, width) / min(height, width) > 200:
        raise ValueError("aspect ratio above 200")
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > high:
        beta = math.sqrt((height * width) / high)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < low:
        beta = math.sqrt(low / (height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return h, w


def resize(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """u8 [h, w, 3] to u8 [height, width, 3], bicubic with antialiasing on bytes."""
    chw = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    out = tv.resize(chw, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return out.permute(1, 2, 0).contiguous().numpy()


def normalise(rgb: np.ndarray) -> torch.Tensor:
    """u8 [h, w, 3] to f32 [3, h, w]: (px - mean*255) / (std*255), all in f32."""
    chw = torch.from_numpy(rgb).permute(2, 0, 1).to(torch.float32)
    mean = torch.tensor(MEAN) * (1.0 / (1 / 255))
    std = torch.tensor(STD) * (1.0 / (1 / 255))
    return (chw - mean[:, None, None]) / std[:, None, None]


def patch_rows(frames: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Normalised frames (even count) to rows [P, 3*2*14*14] and the grid."""
    video = torch.stack(frames)
    count, channels, height, width = video.shape
    t, h, w = count // TEMPORAL, height // PATCH, width // PATCH
    rows = video.reshape(t, TEMPORAL, channels, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    rows = rows.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(t * h * w, channels * TEMPORAL * PATCH * PATCH).contiguous(), [t, h, w]


def process(frames: list[np.ndarray], kind: str, low: int, high: int) -> dict:
    """kind "image": one frame, used for both time slots; "video": padded to an even count with its last frame."""
    height, width = frames[0].shape[:2]
    resized = smart_resize(height, width, low, high)
    ready = [normalise(resize(f, *resized)) for f in frames]
    if kind == "image":
        ready = ready * 2
    elif len(ready) % 2:
        ready.append(ready[-1])
    rows, grid = patch_rows(ready)
    return {"rows": rows, "grid": grid, "width": width, "height": height,
            "resized_width": resized[1], "resized_height": resized[0]}
