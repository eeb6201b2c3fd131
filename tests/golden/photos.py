"""Pictures for the decoders: every format and mode that a request may bring, with what must come out."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import media

ORIENTATION = 0x0112


def smooth(width: int, height: int, seed: int) -> np.ndarray:
    """Slow gradients with a different colour in each quadrant, kind to lossy formats."""
    rng = np.random.RandomState(seed)
    corners = rng.uniform(20, 235, (2, 2, 3))
    v, u = np.mgrid[0:1:height * 1j, 0:1:width * 1j][..., None].reshape(2, height, width, 1)
    top, bottom = corners[0, 0] * (1 - u) + corners[0, 1] * u, corners[1, 0] * (1 - u) + corners[1, 1] * u
    return np.round(top * (1 - v) + bottom * v).astype(np.uint8)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows, 9))
            + png_chunk(b"IEND", b""))


def deep(width: int, height: int, channels: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 65536, (height, width, channels)).astype(">u2")


def deep_png(values: np.ndarray) -> bytes:
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return raw_png(width, height, 16, 0 if channels == 1 else 2, rows)


def on_white(picture: Image.Image) -> Image.Image:
    """EXIF orientation, then alpha (also of LA, PA and tRNS pictures) composited on white, then RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def write_lossless(out: Path) -> None:
    rgb = media.picture(37, 23, 21)
    alpha = np.tile(np.linspace(0, 255, 37).astype(np.uint8), (23, 1))
    hard = np.where(alpha > 128, 255, 0).astype(np.uint8)
    image = Image.fromarray(rgb)
    grey = image.convert("L")
    Image.fromarray(np.dstack([rgb, alpha])).save(out / "rgba.png")
    Image.fromarray(np.dstack([rgb, hard])).save(out / "rgba_hard.png")
    Image.fromarray(np.dstack([np.array(grey), alpha]), "LA").save(out / "la.png")
    palette = image.quantize(32)
    palette.save(out / "palette.png")
    palette.save(out / "palette_trns.png", transparency=bytes([0, 255, 128, 64] + [255] * 28))
    flat = rgb.copy()
    flat[5:12, 5:20] = (10, 200, 30)
    Image.fromarray(flat).save(out / "rgb_trns.png", transparency=(10, 200, 30))
    grey.save(out / "grey.png")
    grey.point(lambda p: 255 * (p > 128)).convert("1").save(out / "one_bit.png")
    (out / "grey16.png").write_bytes(deep_png(deep(37, 23, 1, 22)))
    (out / "rgb16.png").write_bytes(deep_png(deep(37, 23, 3, 23)))
    image.save(out / "plain.bmp")
    image.save(out / "lossless.webp", lossless=True, exact=True)
    Image.fromarray(np.dstack([rgb, hard])).save(out / "lossless_alpha.webp", lossless=True, exact=True)
    frames = [Image.fromarray(media.picture(37, 23, 24 + i)).quantize(64) for i in range(3)]
    frames[0].save(out / "animated.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.save(out / "exif_6.png", exif=exif)


def write_lossy(out: Path) -> None:
    image = Image.fromarray(smooth(40, 24, 31))
    image.save(out / "baseline_444.jpg", quality=92, subsampling=0)
    image.save(out / "baseline_420.jpg", quality=92, subsampling=2)
    image.save(out / "progressive.jpg", quality=92, progressive=True)
    image.convert("L").save(out / "grey.jpg", quality=92)
    image.convert("CMYK").save(out / "cmyk.jpg", quality=95)
    image.save(out / "lossy.webp", quality=90)
    for value in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        image.save(out / f"exif_{value}.jpg", quality=92, subsampling=0, exif=exif)


def write_broken(out: Path) -> None:
    Image.fromarray(media.picture(160, 120, 32)).save(out / "whole.tmp.jpg", quality=90)
    whole = (out / "whole.tmp.jpg").read_bytes()
    (out / "whole.tmp.jpg").unlink()
    (out / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (out / "huge_header.png").write_bytes(raw_png(60000, 60000, 8, 2, b"\0" * 64))


def quadrants(rgb: np.ndarray) -> list:
    h, w = rgb.shape[0] // 2, rgb.shape[1] // 2
    parts = (rgb[:h, :w], rgb[:h, -w:], rgb[-h:, :w], rgb[-h:, -w:])
    return [[round(float(c), 2) for c in p.reshape(-1, 3).mean(0)] for p in parts]


def expectation(path: Path, out: Path) -> dict:
    if path.name == "grey16.png":
        rgb = np.repeat((deep(37, 23, 1, 22) >> 8).astype(np.uint8), 3, axis=2)
    elif path.name == "rgb16.png":
        rgb = (deep(37, 23, 3, 23) >> 8).astype(np.uint8)
    else:
        rgb = np.array(on_white(Image.open(path)))
    entry = {"file": path.name, "width": rgb.shape[1], "height": rgb.shape[0]}
    if path.suffix == ".jpg" or path.name == "lossy.webp":
        mean = [round(float(c), 2) for c in rgb.reshape(-1, 3).mean(0)]
        return entry | {"mean_rgb": mean, "quadrants": quadrants(rgb), "tolerance": 3.0}
    if path.name in ("rgba.png", "la.png", "palette_trns.png"):
        expected = out / "expected"
        expected.mkdir(exist_ok=True)
        Image.fromarray(rgb).save(expected / f"{path.stem}.png")
        return entry | {"expected_png": f"expected/{path.stem}.png", "max_difference": 1}
    return entry | {"sha256": hashlib.sha256(rgb.tobytes()).hexdigest()}


def write_photo(out: Path) -> None:
    import skimage

    source = Image.open(Path(skimage.__file__).parent / "data" / "coffee.png").convert("RGB")
    source.save(out / "photo.jpg", quality=85, optimize=True)


def write(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_lossless(out)
    write_lossy(out)
    write_broken(out)
    write_photo(out)
    synthetic = set(media.IMAGES) | {n for v in media.VIDEOS for n in media.frame_names(v)}
    names = sorted(p.name for p in out.iterdir() if p.suffix in (".png", ".jpg", ".webp", ".gif", ".bmp"))
    entries = []
    for name in names:
        if name == "truncated.jpg":
            entries.append({"file": name, "error": "truncated"})
        elif name == "huge_header.png":
            entries.append({"file": name, "error": "too_large"})
        elif name not in synthetic:
            entries.append(expectation(out / name, out))
    (out / "decoding.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
