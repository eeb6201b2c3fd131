"""Trims the Qwen2.5 byte-level BPE to a small vocabulary and renumbers the added tokens."""

import json
from pathlib import Path

ADDED, PADDING = 22, 106  # added tokens, then rows of the model without a token


def rows(base: int) -> int:
    return base + ADDED + PADDING


TRIM_NOTE = """
## How this copy was trimmed

* Kept: the first {base} base tokens by rank (the 256 byte tokens and the first {merges} merges; every merge whose two
  parts and result are kept, which is all of them up to that rank).
* The 22 added tokens follow directly, in the published order and with the published `special` flags: ids {first} to {last}.
* Normaliser, pre-tokenizer pattern, post-processor and decoder are unchanged.
* The models here have {vocab} rows, so ids {pad} to {top} are padding rows without a token.
"""


def trim(source: Path, base: int) -> dict:
    full = json.loads(source.read_text(encoding="utf-8"))
    model = full["model"]
    vocab = {t: i for t, i in sorted(model["vocab"].items(), key=lambda kv: kv[1]) if i < base}
    merges = [m for m in model["merges"] if m[0] in vocab and m[1] in vocab and m[0] + m[1] in vocab]
    assert sorted(vocab.values()) == list(range(base))
    assert len(merges) == base - 256
    model["vocab"], model["merges"] = vocab, merges
    for offset, token in enumerate(full["added_tokens"]):
        token["id"] = base + offset
    assert len(full["added_tokens"]) == ADDED
    return full


def added_ids(tokenizer: dict) -> dict:
    return {t["content"]: t["id"] for t in tokenizer["added_tokens"]}


def tokenizer_config(tokenizer: dict) -> dict:
    decoder = {
        str(t["id"]): {k: t[k] for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for t in tokenizer["added_tokens"]
    }
    special = [t["content"] for t in tokenizer["added_tokens"] if t["special"]]
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def note(source_readme: Path, tokenizer: dict) -> str:
    base = len(tokenizer["model"]["vocab"])
    last = base + ADDED - 1
    return source_readme.read_text(encoding="utf-8").rstrip() + "\n" + TRIM_NOTE.format(
        base=base, merges=len(tokenizer["model"]["merges"]), first=base, last=last,
        vocab=rows(base), pad=last + 1, top=rows(base) - 1)


def write(directory: Path, tokenizer: dict, source_readme: Path) -> None:
    text = json.dumps(tokenizer, ensure_ascii=False, indent=1)
    (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = json.dumps(tokenizer_config(tokenizer), ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    (directory / "TOKENIZER.md").write_text(note(source_readme, tokenizer), encoding="utf-8")
