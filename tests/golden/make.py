"""Makes everything under tests/fixtures. See README.md beside this file."""

import argparse
import json
from pathlib import Path

import torch

import checkpoints
import configs
import goldens
import media
import photos
import tables
import tokenizer as trimmed

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True,
                        help="folder with the full tokenizer.json and its README.md")
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("--only", nargs="*", help="checkpoint names, 'media', 'tables', 'decoding'; all when absent")
    args = parser.parse_args()
    torch.set_num_threads(2)
    wanted = args.only or [*checkpoints.SPECS, "media", "decoding", "tables"]
    media_dir = args.out / "media"
    if "media" in wanted:
        media.write(media_dir)
    if "decoding" in wanted:
        photos.write(media_dir)
    for name, spec in checkpoints.SPECS.items():
        if name not in wanted:
            continue
        tok = trimmed.trim(args.tokenizer / "tokenizer.json", spec["base_tokens"])
        ids = trimmed.added_ids(tok)
        directory = args.out / name
        directory.mkdir(parents=True, exist_ok=True)
        trimmed.write(directory, tok, args.tokenizer / "README.md")
        configs.write(directory, spec, ids)
        checkpoints.write(directory, spec, tok)
        for record in goldens.write(directory, media_dir, spec, ids):
            margins = sorted(record["margins"])
            print(json.dumps({
                "model": name, "case": record["case"], "tokens": len(record["expanded_ids"]),
                "margin_min": margins[0], "margin_median": margins[len(margins) // 2],
                "range": record["logit_range"], "bf16_rms": record["bf16_rms"],
                "below_4rms": sum(m < 4 * record["bf16_rms"] for m in margins),
                "distinct": len(set(record["greedy_tokens"])), "positions": record["hf_positions"][:7],
                "text": record["greedy_text"][:60]}, ensure_ascii=False))
    if "tables" in wanted:
        base = checkpoints.SPECS["tiny"]["base_tokens"]
        tables.write(args.out, trimmed.trim(args.tokenizer / "tokenizer.json", base))


if __name__ == "__main__":
    main()
