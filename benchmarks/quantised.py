"""Merges over a quantised base beside the same merge over the same base in bfloat16: time, CPU and peak memory.

    python benchmarks/quantised.py [--layers 2] [--schemes bf16 fp8 int4] [--methods task_arithmetic ties] [--rounds 3]
    python benchmarks/quantised.py --layers 32 --sparse --schemes fp8 --methods dare_ties --memory 1GB

Models have Llama 7B's shapes, cut to some layers: a base, its FP8 and 4-bit forms, and two fine-tunes in bfloat16.
With `--sparse` weights are holes in their files that read as zeros and take no disk; only scales are real, so that a
merge of all 32 layers takes the room of its output.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from process import Run, measure, warm
from synthetic import Array, Size, bf16, split, widen

BLOCK, GROUP = 128, 128
SHARD = 5_000_000_000
LARGEST = 448.0
METHODS = {
    "task_arithmetic": "{weight: 0.5}", "ties": "{weight: 0.5, density: 0.1}", "linear": "{weight: 0.5}",
    "dare_ties": "{weight: 0.5, density: 0.1}",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"},
    "int4": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": True},
        }},
    },
}  # fmt: skip
Entry = tuple[str, tuple[int, ...], Array | int]  # dtype, shape, and its values or, of a hole, its bytes


def drawn(shape: tuple[int, ...], seed: int) -> Array:
    """Weights of deviation 0.02, a million drawn and repeated."""
    some = np.random.default_rng(seed).normal(0, 0.02, 1 << 20).astype(np.float32)
    return np.resize(some, shape)


def plain(name: str, shape: tuple[int, ...], model: int, sparse: bool) -> Iterator[tuple[str, Entry]]:
    if sparse:
        yield name, ("BF16", shape, 2 * math.prod(shape))
        return
    values = drawn(shape, 0)
    if model:
        values += np.resize(np.random.default_rng(model).normal(0, 7e-4, (1 << 20) + 7).astype(np.float32), shape)
    yield name, ("BF16", shape, bf16(values))


def fp8(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    grid = -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
    if sparse:
        yield name, ("F8_E4M3", shape, math.prod(shape))
        yield f"{name}_scale_inv", ("F32", grid, np.full(grid, 0.1 / LARGEST, np.float32))
        return
    import torch

    values = widen(bf16(drawn(shape, 0)))
    starts = [np.arange(0, side, BLOCK) for side in shape]
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(values), starts[0], axis=0), starts[1], axis=1)
    scales = (largest / LARGEST).astype(np.float32)
    values /= np.repeat(np.repeat(scales, BLOCK, 0)[: shape[0]], BLOCK, 1)[:, : shape[1]]
    yield name, ("F8_E4M3", shape, torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    yield f"{name}_scale_inv", ("F32", grid, scales)


def int4(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    start, grid, words = name.removesuffix("weight"), (shape[0], shape[1] // GROUP), (shape[0], shape[1] // 8)
    if sparse:
        yield f"{start}weight_packed", ("I32", words, 4 * math.prod(words))
        scales = np.full(grid, 0.01, np.float32)
    else:
        values = widen(bf16(drawn(shape, 0))).reshape(*grid, GROUP)
        scales = np.abs(values).max(-1) / np.float32(7.5)
        codes = (np.clip(np.rint(values / scales[..., None]), -8, 7) + 8).astype(np.uint32).reshape(*words, 8)
        packed = (codes << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
        yield f"{start}weight_packed", ("I32", words, packed)
    yield f"{start}weight_scale", ("BF16", grid, bf16(scales))
    yield f"{start}weight_shape", ("I64", (2,), np.array(shape, np.int64))


def entries(name: str, shape: tuple[int, ...], scheme: str, model: int, sparse: bool) -> Iterator[tuple[str, Entry]]:
    if scheme == "bf16" or len(shape) < 2 or "proj" not in name:
        yield from plain(name, shape, model, sparse)
    else:
        yield from {"fp8": fp8, "int4": int4}[scheme](name, shape, sparse)


def write_model(folder: Path, size: Size, scheme: str, model: int, sparse: bool) -> None:
    folder.mkdir(parents=True)
    settings = {"quantization_config": SETTINGS[scheme]} if SETTINGS[scheme] else {}
    (folder / "config.json").write_text(json.dumps(size.config() | settings))
    shards = split(size.shapes(), SHARD)
    table: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = size.shapes()
        made = [entry for name in names for entry in entries(name, shapes[name], scheme, model, sparse)]
        _write(folder / file, made)
        table |= {name: file for name, _ in made}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def _write(path: Path, made: list[tuple[str, Entry]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, held) in made:
        nbytes = held if isinstance(held, int) else held.nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, (_, _, held) in made:
            out.seek(held, 1) if isinstance(held, int) else out.write(held.tobytes())
        out.truncate()


def recipe_of(folder: Path, base: str, method: str) -> Path:
    path = folder / f"{base}-{method}.yaml"
    models = "".join(f"  - {{model: ./{name}, parameters: {METHODS[method]}}}\n" for name in ("tune-a", "tune-b"))
    path.write_text(f"merge_method: {method}\nbase_model: ./{base}\nmodels:\n{models}")
    return path


def merge(folder: Path, base: str, method: str, memory: str | None) -> Run:
    if memory is None:
        warm([folder / name for name in (base, "tune-a", "tune-b")])
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = ["run", str(recipe_of(folder, base, method)), "--out", str(folder / "out"), "-q"]
    arguments += ["--memory", memory] if memory else []
    found = measure([sys.executable, "-m", "deltamerge", *arguments], environment, folder / "log")
    shutil.rmtree(folder / "out")
    return found


def report(method: str, runs: Mapping[str, list[Run]], read: Mapping[str, int], parameters: int) -> None:
    """Medians; `per byte` is CPU over bytes read, as a multiple of the bfloat16 merge's."""
    cpu = {scheme: statistics.median(run.cpu for run in found) for scheme, found in runs.items()}
    for scheme, found in runs.items():
        wall = statistics.median(run.wall for run in found)
        anonymous = max(run.anonymous for run in found)
        line = (
            f"{method:<16} {scheme:<5} wall {wall:6.2f} s  CPU {cpu[scheme]:6.2f} s  {anonymous:5.0f} MB of its own  "
        )
        line += f"{read[scheme] / 1e9:5.1f} GB read  {1e9 * cpu[scheme] / parameters:5.2f} ns a parameter"
        if "bf16" in runs and scheme != "bf16":
            ratio = cpu[scheme] / cpu["bf16"]
            line += f"  CPU × {ratio:.2f}, per byte × {ratio * read['bf16'] / read[scheme]:.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".quantised"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32_000, help="fewer, where few layers are to count for many")
    parser.add_argument("--schemes", nargs="+", default=["bf16", "fp8", "int4"], choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "dare_ties"], choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    options = parser.parse_args()
    size = Size(4096, 11008, options.layers, 32, 32, options.vocab, SHARD)
    folder = options.folder
    if not folder.exists():
        for scheme in options.schemes:
            write_model(folder / scheme, size, scheme, 0, options.sparse)
        for number, name in enumerate(("tune-a", "tune-b"), 1):
            write_model(folder / name, size, "bf16", number, options.sparse)
    sizes = {
        name.name: sum(f.stat().st_size for f in name.glob("*.safetensors"))
        for name in folder.iterdir()
        if name.is_dir()
    }
    read = {scheme: sizes[scheme] + sizes["tune-a"] + sizes["tune-b"] for scheme in options.schemes}
    for method in options.methods:
        runs: dict[str, list[Run]] = {scheme: [] for scheme in options.schemes}
        for _ in range(options.rounds):
            for scheme in options.schemes:
                runs[scheme].append(merge(folder, scheme, method, options.memory))
        report(method, runs, read, size.parameters)
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
