"""Synthetic Llama checkpoints in bfloat16, and how two such checkpoints differ; numpy alone, streamed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGMA = 7e-4
CHUNK = 1 << 22

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama: grouped-query attention, an untied head; `shard` is the most bytes that go into one file."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shard: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, m, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        layer = {
            "input_layernorm": (h,), "mlp.down_proj": (h, m), "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h),
            "post_attention_layernorm": (h,), "self_attn.k_proj": (kv, h), "self_attn.o_proj": (h, h),
            "self_attn.q_proj": (h, h), "self_attn.v_proj": (kv, h),
        }  # fmt: skip
        return {
            "model.embed_tokens.weight": (self.vocab, h),
            **{f"model.layers.{i}.{n}.weight": s for i in range(self.layers) for n, s in layer.items()},
            "model.norm.weight": (h,),
            "lm_head.weight": (self.vocab, h),
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "vocab_size": self.vocab,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "dtype": "bfloat16", "torch_dtype": "bfloat16",
        }  # fmt: skip


SIZES = {
    "tiny": Size(64, 176, 2, 4, 2, 256, 150_000),
    "M": Size(1280, 3456, 24, 20, 4, 32_000, 400_000_000),
    "L": Size(2048, 5632, 22, 32, 4, 32_000, 1_000_000_000),
}


def many_tensors(count: int) -> Size:
    """A model of about `count` tiny tensors (3 + 9 per layer)."""
    return Size(8, 16, max(1, round((count - 3) / 9)), 2, 1, 32, 1_000_000_000)


def bf16(values: Array) -> NDArray[np.uint16]:
    """Bits of float32 `values` rounded to bfloat16, nearest even (finite values)."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def widen(bits: Array) -> NDArray[np.float32]:
    """The float32 values of bfloat16 `bits`."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def make_checkpoints(folder: Path, size: Size, tunes: int = 2) -> list[Path]:
    """The base and `tunes` fine-tunes of it; a tensor's values depend on its model and its place there alone."""
    models = ["base", *(f"tune-{letter}" for letter in ascii_lowercase[:tunes])]
    paths = [folder / name for name in models]
    if folder.exists():
        return paths
    print(f"making {folder}", file=sys.stderr, flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shapes = size.shapes()
    seeds = {name: i for i, name in enumerate(shapes)}
    shards = split(shapes, size.shard)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name in models:
        write_small_files(partial / name, size, dict(zip(files, shards, strict=True)))
    for file, names in zip(files, shards, strict=True):
        with ExitStack() as stack:
            outs = [stack.enter_context(open(partial / model / file, "wb")) for model in models]
            for out in outs:
                out.write(header({name: shapes[name] for name in names}))
            for name in names:
                generators = [np.random.default_rng([m, seeds[name]]) for m in range(len(models))]
                mean = 1.0 if len(shapes[name]) == 1 else 0.0
                total = math.prod(shapes[name])
                for start in range(0, total, CHUNK):
                    draws = [g.standard_normal(min(CHUNK, total - start), np.float32) for g in generators]
                    base = bf16(draws[0] * np.float32(0.02) + np.float32(mean))
                    tunes = [bf16(widen(base) + draw * np.float32(SIGMA)) for draw in draws[1:]]
                    for out, bits in zip(outs, [base, *tunes], strict=True):
                        out.write(bits.data)
    partial.rename(folder)
    return paths


def split(shapes: Mapping[str, tuple[int, ...]], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `limit` bytes, sorted inside a shard as save_file does."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return [sorted(shard) for shard in shards]


def header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors header of bfloat16 tensors in the order given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_small_files(folder: Path, size: Size, shards: Mapping[str, Sequence[str]]) -> None:
    """The index, config and a word-level tokenizer."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size.vocab))])}
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    contents: dict[str, Any] = {
        "config.json": size.config(),
        "model.safetensors.index.json": {
            "metadata": {"total_size": 2 * size.parameters, "total_parameters": size.parameters},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        },
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "added_tokens": [{"id": vocab[t], "content": t, **special} for t in ("<unk>", "<s>", "</s>")],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tensors(folder: Path) -> dict[str, Array]:
    """Mapped bfloat16 bits of every tensor of a checkpoint."""
    found: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
        length = int.from_bytes(mapped[:8].tobytes(), "little")
        for name, entry in json.loads(mapped[8 : 8 + length].tobytes()).items():
            if name != "__metadata__":
                if entry["dtype"] != "BF16":
                    sys.exit(f"{file}: {name} is {entry['dtype']}, not BF16")
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = mapped[start:stop].view(np.uint16)
    return found


def ordered(bits: Array) -> NDArray[np.int32]:
    """bfloat16 bits as integers in the order of their values, so that a difference counts roundings (ulp)."""
    signed = bits.astype(np.int32)
    return np.where(signed >= 0x8000, 0x8000 - signed, signed)


def agreement(ours: Path, theirs: Path) -> dict[str, Any]:
    """How two bf16 checkpoints differ: fractions of elements over 0 and 1 ulp apart, the greatest gap."""
    a, b = tensors(ours), tensors(theirs)
    elements = unequal = far = 0
    greatest = 0.0
    for name in a.keys() & b.keys():
        if a[name].size != b[name].size:
            sys.exit(f"{name}: {a[name].size} elements in {ours}, {b[name].size} in {theirs}")
        for start in range(0, a[name].size, CHUNK):
            x, y = a[name][start : start + CHUNK], b[name][start : start + CHUNK]
            ulps = np.abs(ordered(x) - ordered(y))
            elements += ulps.size
            unequal += int(np.count_nonzero(ulps))
            far += int(np.count_nonzero(ulps > 1))
            greatest = max(greatest, float(np.abs(widen(x) - widen(y)).max()))
    return {
        "elements": elements, "differ": unequal / elements, "differ_more_than_1_ulp": far / elements,
        "greatest_difference": greatest, "tensors_in_one_only": sorted(a.keys() ^ b.keys()),
    }  # fmt: skip
