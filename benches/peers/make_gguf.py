#!/usr/bin/env python3
"""Writes Qwen2.5-VL-3B with random BF16 weights as two GGUF files for llama.cpp.

    make_gguf.py DIR    ->  DIR/decoder.gguf (6.2 GB), DIR/vision.gguf (1.3 GB)

Tensor names, element types and metadata keys are those that llama.cpp's own converter gives the published
checkpoint with `--outtype bf16`: matrices in BF16; norms, biases and the patch embedding in F32. The tokenizer is a
valid byte-level one with a single merge, since no benchmark reads text. Values come from one pool of normal
numbers, read from a different place for each tensor: speed does not depend on them, as long as they stay finite.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 36, 16, 2, 128
INTERMEDIATE, VOCAB = 11008, 151936
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS, VISION_INTERMEDIATE = 1280, 32, 16, 3420
MERGED = 4 * VISION_HIDDEN
FIRST_SPECIAL = 151643
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]


class Pool:
    """Normal numbers of standard deviation 0.02 as BF16 bit patterns; prime in length, so that tensors differ."""

    LENGTH = 33_554_393

    def __init__(self) -> None:
        values = np.random.default_rng(1).standard_normal(self.LENGTH, dtype=np.float32) * 0.02
        self.bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        self.next = 0

    def take(self, count: int) -> np.ndarray:
        indices_start = self.next
        self.next = (self.next + count) % self.LENGTH
        repeats = -(-(indices_start + count) // self.LENGTH)
        return np.tile(self.bits, repeats)[indices_start : indices_start + count]


class Tensors:
    """Announces every tensor first, then streams the data, so that one tensor at a time is in memory."""

    def __init__(self, writer: gguf.GGUFWriter) -> None:
        self.writer = writer
        self.plan: list[tuple[tuple[int, ...], str]] = []

    def _add(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        count = int(np.prod(shape))
        if kind == "matrix":
            self.writer.add_tensor_info(
                name, shape, np.dtype(np.uint16), 2 * count, raw_dtype=gguf.GGMLQuantizationType.BF16
            )
        else:
            self.writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * count)
        self.plan.append((shape, kind))

    def matrix(self, name: str, rows: int, columns: int) -> None:
        """`[rows, columns]` BF16, as y = x·Wᵀ reads it."""
        self._add(f"{name}.weight", (rows, columns), "matrix")

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.matrix(name, rows, columns)
        self._add(f"{name}.bias", (rows,), "small")

    def norm(self, name: str, width: int) -> None:
        self._add(f"{name}.weight", (width,), "ones")

    def patches(self, name: str) -> None:
        self._add(name, (VISION_HIDDEN, 3, 14, 14), "small")

    def write(self, pool: Pool) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for shape, kind in self.plan:
            count = int(np.prod(shape))
            if kind == "matrix":
                data = pool.take(count)
            elif kind == "small":
                data = (pool.take(count).astype(np.uint32) << 16).view(np.float32)
            else:
                data = np.ones(count, dtype=np.float32)
            self.writer.write_tensor_data(data)
        self.writer.close()


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE (GPT-2's published mapping)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = byte_alphabet()
    merge = (tokens[ord("a")], tokens[ord("b")])
    tokens.append("".join(merge))
    types = [gguf.TokenType.NORMAL] * len(tokens)
    tokens += [f"<unused{index}>" for index in range(len(tokens), FIRST_SPECIAL)]
    types += [gguf.TokenType.UNUSED] * (FIRST_SPECIAL - len(types))
    tokens += SPECIAL
    types += [gguf.TokenType.CONTROL] * len(SPECIAL)
    tokens += [f"<padding{index}>" for index in range(len(tokens), VOCAB)]
    types += [gguf.TokenType.UNUSED] * (VOCAB - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge)])
    writer.add_bos_token_id(FIRST_SPECIAL)
    writer.add_eos_token_id(FIRST_SPECIAL + 2)
    writer.add_add_bos_token(False)


def write_decoder(path: Path, pool: Pool) -> None:
    writer = gguf.GGUFWriter(path, "qwen2vl")
    writer.add_name("Qwen2.5-VL-3B shape, random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(128_000)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_sections([16, 24, 24, 0])
    add_tokenizer(writer)

    tensors = Tensors(writer)
    tensors.matrix("token_embd", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        tensors.norm(f"{block}.attn_norm", HIDDEN)
        tensors.linear(f"{block}.attn_q", HEADS * HEAD_DIM, HIDDEN)
        tensors.linear(f"{block}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
        tensors.linear(f"{block}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
        tensors.matrix(f"{block}.attn_output", HIDDEN, HEADS * HEAD_DIM)
        tensors.norm(f"{block}.ffn_norm", HIDDEN)
        tensors.matrix(f"{block}.ffn_gate", INTERMEDIATE, HIDDEN)
        tensors.matrix(f"{block}.ffn_up", INTERMEDIATE, HIDDEN)
        tensors.matrix(f"{block}.ffn_down", HIDDEN, INTERMEDIATE)
    tensors.norm("output_norm", HIDDEN)
    tensors.write(pool)


def write_vision(path: Path, pool: Pool) -> None:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name("Qwen2.5-VL-3B vision shape, random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN25VL)
    writer.add_vision_projection_dim(HIDDEN)
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(14)
    writer.add_vision_embedding_length(VISION_HIDDEN)
    writer.add_vision_feed_forward_length(VISION_INTERMEDIATE)
    writer.add_vision_block_count(VISION_LAYERS)
    writer.add_vision_head_count(VISION_HEADS)
    writer.add_vision_image_mean([0.48145466, 0.4578275, 0.40821073])
    writer.add_vision_image_std([0.26862954, 0.26130258, 0.27577711])
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(8)
    writer.add_vision_attention_layernorm_eps(1e-6)

    tensors = Tensors(writer)
    tensors.patches("v.patch_embd.weight")
    tensors.patches("v.patch_embd.weight.1")
    for layer in range(VISION_LAYERS):
        block = f"v.blk.{layer}"
        tensors.norm(f"{block}.ln1", VISION_HIDDEN)
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors.linear(f"{block}.{part}", VISION_HIDDEN, VISION_HIDDEN)
        tensors.norm(f"{block}.ln2", VISION_HIDDEN)
        tensors.linear(f"{block}.ffn_gate", VISION_INTERMEDIATE, VISION_HIDDEN)
        tensors.linear(f"{block}.ffn_up", VISION_INTERMEDIATE, VISION_HIDDEN)
        tensors.linear(f"{block}.ffn_down", VISION_HIDDEN, VISION_INTERMEDIATE)
    tensors.norm("v.post_ln", VISION_HIDDEN)
    tensors.linear("mm.0", MERGED, MERGED)
    tensors.linear("mm.2", HIDDEN, MERGED)
    tensors.write(pool)


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    pool = Pool()
    for name, write in (("vision.gguf", write_vision), ("decoder.gguf", write_decoder)):
        target = directory / name
        if target.exists():
            continue
        unfinished = directory / f"{name}.part"
        write(unfinished, pool)
        unfinished.rename(target)


if __name__ == "__main__":
    main()
