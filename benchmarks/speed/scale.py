"""Plans of models too large for this machine, and a 7 B merge under a cap of 1 GB: time and peak memory.

    python -m benchmarks.speed.scale [--folder .scale] [--skip-merge]

Inputs are sparse files with real headers: their weights read as zeros and take no disk. The merge writes 13.5 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import ROOT
from benchmarks.process import Run, measure
from benchmarks.synthetic import Size, header, split

LLAMA_405B = Size(16384, 53248, 126, 128, 8, 128_256, 5_000_000_000)
LLAMA_7B = Size(4096, 11008, 32, 32, 32, 32_000, 5_000_000_000)
RECIPE = """\
base_model: {folder}/base
merge_method: dare_ties
models:
  - {{model: {folder}/tune-a, parameters: {{weight: 0.5, density: 0.1}}}}
  - {{model: {folder}/tune-b, parameters: {{weight: 0.5, density: 0.1}}}}
"""
Shapes = Mapping[str, tuple[int, ...]]


def layers(size: Size, count: int) -> Shapes:
    """The shapes of a Llama cut to `count` layers."""
    return Size(size.hidden, size.intermediate, count, size.heads, size.kv_heads, size.vocab, size.shard).shapes()


def experts(count: int) -> Shapes:
    """A mixture of experts with about `count` tensors: 128 experts a layer, each of three matrices."""
    hidden, inner = 4096, 1536
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151_936, hidden)}
    for layer in range(round(count / 393)):
        name = f"model.layers.{layer}"
        for part, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (8192, hidden),
            "self_attn.k_proj": (512, hidden), "self_attn.v_proj": (512, hidden), "self_attn.o_proj": (hidden, 8192),
            "self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate": (128, hidden),
        }.items():  # fmt: skip
            shapes[f"{name}.{part}.weight"] = shape
        for expert in range(128):
            for part, matrix in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                shapes[f"{name}.mlp.experts.{expert}.{part}_proj.weight"] = matrix
    return shapes


def make_sparse(folder: Path, shapes: Shapes) -> Path:
    """Base and two fine-tunes as sparse files, and a recipe of them."""
    shards = split(shapes, 5_000_000_000)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for model in ("base", "tune-a", "tune-b"):
        path = folder / model
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
        table = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
        for file, names in zip(files, shards, strict=True):
            members = {name: shapes[name] for name in names}
            with open(path / file, "wb") as out:
                out.write(header(members))
                out.truncate(out.tell() + 2 * sum(map(math.prod, members.values())))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder.resolve()))
    return recipe


def run(folder: Path, *arguments: str) -> Run:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return measure([sys.executable, "-m", "deltamerge", *arguments], environment, folder / "log")


def plan(folder: Path, title: str, shapes: Shapes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    recipe = make_sparse(folder, shapes)
    cost = run(folder, "plan", str(recipe), "--json")
    nbytes = 2 * sum(map(math.prod, shapes.values()))
    print(
        f"plan   {title:<22} {len(shapes):>7,} tensors {nbytes / 1e9:>6,.0f} GB × 3   {cost.wall:5.1f} s   "
        f"peak {cost.anonymous:4.0f} MB",
        flush=True,
    )
    shutil.rmtree(folder)


def merge(folder: Path, title: str, shapes: Shapes, memory: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    recipe = make_sparse(folder, shapes)
    nbytes = 2 * sum(map(math.prod, shapes.values()))
    free = shutil.disk_usage(folder).free
    if free < 1.3 * nbytes:
        print(f"run    {title}: left out, {free / 1e9:.0f} GB are free, {1.3 * nbytes / 1e9:.0f} GB wanted")
    else:
        cost = run(folder, "run", str(recipe), "-q", "--memory", memory)
        print(
            f"run    {title:<22} {len(shapes):>7,} tensors {nbytes / 1e9:>6,.1f} GB × 3   {cost.wall:5.0f} s   peak "
            f"{cost.anonymous:4.0f} MB of its own, {cost.resident:4.0f} MB resident, --memory {memory}",
            flush=True,
        )
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".scale"))
    parser.add_argument("--skip-merge", action="store_true")
    options = parser.parse_args()
    plan(options.folder, "half of Llama 405B", layers(LLAMA_405B, 63))
    plan(options.folder, "Llama 405B", LLAMA_405B.shapes())
    plan(options.folder, "experts", experts(20_000))
    plan(options.folder, "twice the experts", experts(40_000))
    if not options.skip_merge:
        merge(options.folder, "Llama 7B", LLAMA_7B.shapes(), "1GB")


if __name__ == "__main__":
    main()
