"""Synthetic pictures and frames: smooth gradients, shapes and noise, so that resampling matters."""

from pathlib import Path

import numpy as np
from PIL import Image

# name -> (width, height, seed)
IMAGES = {
    "odd_97x131.png": (97, 131, 1),
    "tall_150x262.png": (150, 262, 2),
    "square_98x126.png": (98, 126, 3),
    "tiny_9x7.png": (9, 7, 4),
    "wide_70x42.png": (70, 42, 5),
    "other_97x131.png": (97, 131, 6),
}
# name -> (frames, width, height, seed)
VIDEOS = {"walk": (7, 175, 90, 11), "slow": (5, 61, 90, 12), "turn": (4, 60, 58, 13)}


def picture(width: int, height: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = x / max(width - 1, 1), y / max(height - 1, 1)
    out = np.zeros((height, width, 3))
    for c in range(3):
        fx, fy, phase = rng.uniform(0.5, 4.0), rng.uniform(0.5, 4.0), rng.uniform(0, 6.28)
        out[..., c] = 0.5 + 0.32 * np.sin(6.28 * (fx * u + fy * v) + phase + shift)
        out[..., c] += rng.uniform(-0.35, 0.35) * (u - 0.5) + rng.uniform(-0.35, 0.35) * (v - 0.5)
    for _ in range(4):
        cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.08, 0.25)
        inside = (u - (cx + 0.07 * shift) % 1.0) ** 2 + (v - cy) ** 2 < r * r
        out[inside] = rng.uniform(0, 1, 3)
    out += np.random.RandomState(seed * 1000 + int(shift * 10)).normal(0, 0.06, out.shape)
    return np.clip(out * 255, 0, 255).astype(np.uint8)


def frame_names(video: str) -> list[str]:
    return [f"{video}_{i}.png" for i in range(VIDEOS[video][0])]


def write(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, (width, height, seed) in IMAGES.items():
        save(directory / name, picture(width, height, seed))
    for name, (count, width, height, seed) in VIDEOS.items():
        for i in range(count):
            save(directory / f"{name}_{i}.png", picture(width, height, seed, shift=0.7 * i))


def save(path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb, "RGB").save(path, optimize=True)


def load(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))
